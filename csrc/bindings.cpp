// The only file that knows Python: integers in, integers out. Pointers come as addresses whose owners the caller keeps
// alive; the GIL is released while weights are read or written.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>

#include "cpu/apply.h"
#include "cpu/census.h"
#include "cpu/kernels.h"
#include "cpu/optim.h"
#include "cpu/select.h"
#include "names.h"

namespace py = pybind11;

namespace {

using gmp::dtype_of;
using gmp::cpu::LayerView;

// address of the weights, number of weights, address of the packed mask or 0
using LayerTuple = std::tuple<uintptr_t, int64_t, uintptr_t>;

// Only what could corrupt memory is checked again here; ops.py has explained everything else.
std::vector<LayerView> views_of(const std::vector<LayerTuple>& layers) {
  std::vector<LayerView> views;
  for (const auto& [weights, n, mask] : layers) {
    if (weights == 0 || n <= 0) throw std::invalid_argument("a layer needs an address and at least one weight");
    views.push_back({reinterpret_cast<void*>(weights), n, reinterpret_cast<const uint8_t*>(mask)});
  }
  return views;
}

// Layers of one dtype, checked and converted once for as many calls as they stay where they are.
struct Rows {
  gmp::DType dtype;
  std::vector<LayerView> views;

  Rows(const std::string& dtype_name, const std::vector<LayerTuple>& layers)
      : dtype(dtype_of(dtype_name)), views(views_of(layers)) {}
};

using ThresholdTuple = std::tuple<double, int64_t, int64_t, int64_t>;

void check_counts(const std::vector<LayerView>& layers, const std::vector<int64_t>& num_prune) {
  const bool global = num_prune.size() == 1;
  if (!global && num_prune.size() != layers.size()) {
    throw std::invalid_argument("num_prune needs one entry per layer, or one for all");
  }
  int64_t total = 0;
  for (const LayerView& layer : layers) total += layer.n;
  for (size_t i = 0; i < num_prune.size(); ++i) {
    if (num_prune[i] < 0 || num_prune[i] > (global ? total : layers[i].n)) {
      throw std::invalid_argument("num_prune exceeds the number of weights");
    }
  }
}

// By column: value, num_below, num_ties and num_ties_kept of every selection; cut and nonfinite of every layer.
using SelectionColumns = std::tuple<std::vector<double>, std::vector<int64_t>, std::vector<int64_t>,
                                    std::vector<int64_t>, std::vector<int64_t>, std::vector<int64_t>>;

// hints: one per entry of num_prune, or none at all.
SelectionColumns select_thresholds(const Rows& rows, const std::vector<int64_t>& num_prune,
                                   const std::vector<std::optional<ThresholdTuple>>& hints, int num_threads) {
  check_counts(rows.views, num_prune);
  if ((!hints.empty() && hints.size() != num_prune.size()) || num_threads < 1) {
    throw std::invalid_argument("hints need one entry per count");
  }
  std::vector<std::optional<gmp::cpu::Threshold>> typed_hints(num_prune.size());
  for (size_t i = 0; i < hints.size(); ++i) {
    if (!hints[i]) continue;
    const auto& [value, num_below, num_ties, num_ties_kept] = *hints[i];
    typed_hints[i] = gmp::cpu::Threshold{value, num_below, num_ties, num_ties_kept};
  }
  py::gil_scoped_release release;
  SelectionColumns columns;
  auto& [values, num_below, num_ties, num_ties_kept, cuts, nonfinite] = columns;
  for (const auto& found : gmp::cpu::select(rows.dtype, rows.views, num_prune, typed_hints, num_threads)) {
    values.push_back(found.threshold.value);
    num_below.push_back(found.threshold.num_below);
    num_ties.push_back(found.threshold.num_ties);
    num_ties_kept.push_back(found.threshold.num_ties_kept);
    cuts.insert(cuts.end(), found.cuts.begin(), found.cuts.end());
    nonfinite.insert(nonfinite.end(), found.nonfinite.begin(), found.nonfinite.end());
  }
  return columns;
}

using BracketTuple = std::pair<uint64_t, uint64_t>;

std::vector<BracketTuple> sample(const std::string& dtype, const std::vector<LayerTuple>& layers,
                                 const std::vector<int64_t>& num_prune, int num_threads) {
  const std::vector<LayerView> views = views_of(layers);
  check_counts(views, num_prune);
  std::vector<BracketTuple> result;
  py::gil_scoped_release release;
  for (const auto& [lo, hi] : gmp::cpu::sample(dtype_of(dtype), views, num_prune, num_threads)) {
    result.emplace_back(lo, hi);
  }
  return result;
}

// below, inside, pruned, nonfinite
using CensusTuple = std::tuple<int64_t, int64_t, int64_t, int64_t>;

// rooms: address and capacity, one per layer; bins: address of one row of num_bins zeros per layer.
std::vector<CensusTuple> count(const std::string& dtype, const std::vector<LayerTuple>& layers,
                               const std::vector<BracketTuple>& brackets,
                               const std::vector<std::pair<uintptr_t, int64_t>>& rooms, uintptr_t bins,
                               int64_t num_bins, int num_threads) {
  const std::vector<LayerView> views = views_of(layers);
  if (brackets.size() != views.size() || rooms.size() != views.size() || bins == 0 || num_bins < 1) {
    throw std::invalid_argument("a count needs one bracket and one room per layer, and bins");
  }
  std::vector<gmp::cpu::Bracket> typed_brackets;
  for (const auto& [lo, hi] : brackets) typed_brackets.push_back({lo, hi});
  std::vector<gmp::cpu::Room> typed_rooms;
  for (const auto& [address, capacity] : rooms) typed_rooms.push_back({reinterpret_cast<void*>(address), capacity});
  std::vector<CensusTuple> result;
  py::gil_scoped_release release;
  for (const auto& c : gmp::cpu::count(dtype_of(dtype), views, typed_brackets, typed_rooms,
                                       reinterpret_cast<int64_t*>(bins), num_bins, num_threads)) {
    result.emplace_back(c.below, c.inside, c.pruned, c.nonfinite);
  }
  return result;
}

// Per layer the weights kept before, and now. Their bits go to the addresses `out`; if there are none, to the masks.
using KeptColumns = std::pair<std::vector<int64_t>, std::vector<int64_t>>;

KeptColumns prune(const Rows& rows, const std::vector<double>& values, const std::vector<int64_t>& cuts,
                  const std::vector<uintptr_t>& out, int num_threads) {
  const size_t n = rows.views.size();
  if (values.size() != n || cuts.size() != n || (!out.empty() && out.size() != n) || num_threads < 1) {
    throw std::invalid_argument("values and cuts need one entry per layer, and so does out if there are any");
  }
  std::vector<gmp::cpu::Cut> typed_cuts;
  std::vector<uint8_t*> outputs;
  for (size_t i = 0; i < n; ++i) {
    typed_cuts.push_back({values[i], cuts[i]});
    outputs.push_back(out.empty() ? const_cast<uint8_t*>(rows.views[i].mask) : reinterpret_cast<uint8_t*>(out[i]));
    if (outputs.back() == nullptr) throw std::invalid_argument("bits need a place to go");
  }
  py::gil_scoped_release release;
  KeptColumns kept;
  for (const auto& counts : gmp::cpu::apply(rows.dtype, rows.views, typed_cuts, outputs, num_threads)) {
    kept.first.push_back(counts.kept_before);
    kept.second.push_back(counts.kept);
  }
  return kept;
}

void apply_masks(const Rows& rows, int num_threads) {
  py::gil_scoped_release release;
  gmp::cpu::apply(rows.dtype, rows.views, {}, {}, num_threads);
}

template <typename T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// One tensor of an update less its gradient, checked and converted once.
struct UpdateRow {
  gmp::cpu::UpdateTensor tensor;

  UpdateRow(const std::string& dtype, int64_t n, uintptr_t weights, uintptr_t master,
            const std::array<uintptr_t, 3>& state, uintptr_t mask, uintptr_t ranks) {
    if (weights == 0 || n <= 0) throw std::invalid_argument("a tensor needs an address and at least one weight");
    tensor = {dtype_of(dtype),
              {pointer(weights),
               nullptr,
               pointer(master),
               {pointer(state[0]), pointer(state[1]), pointer(state[2])},
               pointer<const uint8_t>(mask),
               ranks != 0,
               n},
              pointer<const int64_t>(ranks),
              0};
  }
};

// Tensors that step together, less their gradients.
struct UpdateBatch {
  std::vector<gmp::cpu::UpdateTensor> tensors;

  explicit UpdateBatch(const std::vector<const UpdateRow*>& rows) {
    for (const UpdateRow* row : rows) tensors.push_back(row->tensor);
  }
};

using ConstantsDict = std::map<std::string, double>;

// gradients: an address per tensor; rows: an index into the constants per tensor.
void update(const std::string& rule, const UpdateBatch& batch, const std::vector<uintptr_t>& gradients,
            const std::vector<size_t>& rows, const std::vector<ConstantsDict>& constants, int num_threads) {
  std::vector<gmp::UpdateConstants<double>> typed_constants;
  for (const ConstantsDict& given : constants) typed_constants.push_back(gmp::constants_of(given));
  std::vector<gmp::cpu::UpdateTensor> typed = batch.tensors;
  if (gradients.size() != typed.size() || rows.size() != typed.size()) {
    throw std::invalid_argument("an update needs one gradient and one row of constants per tensor");
  }
  for (size_t i = 0; i < typed.size(); ++i) {
    if (gradients[i] == 0 || rows[i] >= constants.size()) throw std::invalid_argument("a tensor needs its constants");
    typed[i].run.grads = pointer(gradients[i]);
    typed[i].constants = rows[i];
  }
  py::gil_scoped_release release;
  gmp::cpu::update(gmp::rule_of(rule), typed, typed_constants, num_threads);
}

// dtype, address of the gradients, n, address of the mask or 0
using GradTuple = std::tuple<std::string, uintptr_t, int64_t, uintptr_t>;

double sum_squares(const std::vector<GradTuple>& grads, int num_threads) {
  std::vector<gmp::cpu::GradView> views;
  for (const auto& [dtype, address, n, mask] : grads) {
    views.push_back({dtype_of(dtype), pointer(address), n, pointer<const uint8_t>(mask)});
  }
  py::gil_scoped_release release;
  return gmp::cpu::sum_squares(views, num_threads);
}

// from, its mask and ranks (0: dense), to, its mask and ranks, n, bytes per value
using RepackTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int>;

void repack(const std::vector<RepackTuple>& tasks, int num_threads) {
  std::vector<gmp::cpu::RepackTask> typed;
  for (const auto& [from, from_mask, from_ranks, to, to_mask, to_ranks, n, value_bytes] : tasks) {
    typed.push_back({pointer(from), pointer<const uint8_t>(from_mask), pointer<const int64_t>(from_ranks), pointer(to),
                     pointer<const uint8_t>(to_mask), pointer<const int64_t>(to_ranks), n, value_bytes});
  }
  py::gil_scoped_release release;
  gmp::cpu::repack(typed, num_threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::class_<UpdateRow>(m, "UpdateRow")
      .def(py::init<const std::string&, int64_t, uintptr_t, uintptr_t, const std::array<uintptr_t, 3>&, uintptr_t,
                    uintptr_t>());
  py::class_<Rows>(m, "Rows").def(py::init<const std::string&, const std::vector<LayerTuple>&>());
  py::class_<UpdateBatch>(m, "UpdateBatch").def(py::init<const std::vector<const UpdateRow*>&>());
  m.def("select", &select_thresholds);
  m.def("sample", &sample);
  m.def("count", &count);
  m.def("prune", &prune);
  m.def("apply_masks", &apply_masks);
  m.def("update", &update);
  m.def("sum_squares", &sum_squares);
  m.def("repack", &repack);
  m.def("ranks", [](uintptr_t mask, int64_t n) { return gmp::cpu::ranks_of(pointer<const uint8_t>(mask), n); });
  m.def("isa", [] { return std::string(gmp::cpu::active_kernels().name); });
}
