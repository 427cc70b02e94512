// With unchanged.h, the only file that knows Python: integers in, integers out. Pointers come as addresses whose owners
// the caller keeps alive, each with the size of the tensor it was taken from, so that sizes that do not match are
// refused here and no kernel walks past an end. The GIL is released while weights are read or written. All memory for
// results is allocated before the first write.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <iterator>
#include <optional>
#include <stdexcept>

#include "arrays.h"
#include "cpu/apply.h"
#include "cpu/draw.h"
#include "cpu/kernels.h"
#include "cpu/life.h"
#include "cpu/optim.h"
#include "cpu/select.h"
#include "dlpack.h"
#include "names.h"
#include "slots.h"
#include "unchanged.h"

namespace py = pybind11;

using gmp::cpu::LayerView;
using gmp::cpu::UpdateTensor;
using Layers = std::vector<LayerView>;          // checked and converted once, for all calls until they change
using UpdateBatch = std::vector<UpdateTensor>;  // tensors that step together, without their gradients
PYBIND11_MAKE_OPAQUE(Layers)                    // stay here from call to call, as classes
PYBIND11_MAKE_OPAQUE(UpdateBatch)

namespace {

using namespace gmp::arrays;
using gmp::dtype_of;

// dtype, the weights, the packed mask, and channels and positions of the filters; for a ranking of its own the dtype of
// what ranks the weights, that itself, the dtype of its sums, and kind and numbers of the pattern, else none
using PatternTuple = std::tuple<int, int64_t, int64_t, int64_t>;
using RankingTuple = std::tuple<std::string, Array, std::string, PatternTuple>;
using LayerTuple = std::tuple<std::string, Array, Array, std::pair<int64_t, int64_t>, std::optional<RankingTuple>>;

void set_ranking(LayerView& layer, const RankingTuple& given) {
  const auto& [source_dtype, source, sums_dtype, numbers] = given;
  const auto [kind, a, b, c] = numbers;
  const gmp::Pattern pattern{kind, a, b, c};
  const bool is_blocks = pattern.kind == gmp::kBlocks, has_numbers = a > 0 && b > 0 && c > 0;
  bool is_whole = pattern.kind == gmp::kNoPattern;
  if (pattern.kind == gmp::kGroups && has_numbers) is_whole = a <= b && b <= layer.n / c && layer.n % (b * c) == 0;
  if (is_blocks && has_numbers) is_whole = c % b == 0 && layer.n % c == 0 && layer.n / c % a == 0;
  if (!is_whole) throw std::invalid_argument("a layer needs a pattern, and whole groups or blocks");
  layer.ranking = {pattern, dtype_of(source_dtype), layer.dtype, layer.weights, layer.n, layer.filter};
  layer.weights = checked(source, layer.n, "scores");
  layer.dtype = dtype_of(sums_dtype);
  if (is_blocks) {
    layer.n /= a * b;
    layer.filter = {};
  }
}

Layers layers_of(const std::vector<LayerTuple>& given) {
  Layers layers;
  for (const auto& [dtype, weights, mask, filter, ranking] : given) {
    const int64_t n = weights.second;
    const auto [channels, positions] = filter;
    if (weights.first == 0 || n <= 0) throw std::invalid_argument("a layer needs an address and at least one weight");
    if (channels < 1 || positions < 1 || n % channels != 0 || n / channels % positions != 0) {
      throw std::invalid_argument("a layer needs whole filters");
    }
    layers.push_back({dtype_of(dtype),
                      pointer(weights.first),
                      n,
                      optional<const uint8_t>(mask, bytes_of_bits(n), "a mask"),
                      {channels, positions}});
    if (ranking) set_ranking(layers.back(), *ranking);
  }
  return layers;
}

using BracketTuple = std::pair<uint64_t, uint64_t>;

// Columns with an entry per layer: key, num_below, num_ties, num_ties_kept, tie index, nonfinite. All but the last two
// are those of the layer's group.
using CutoffColumns = std::tuple<std::vector<uint64_t>, std::vector<int64_t>, std::vector<int64_t>,
                                 std::vector<int64_t>, std::vector<int64_t>, std::vector<int64_t>>;

// num_prune, group_sizes (in layers): one per group; brackets: one per group, empty if a sample is to give one, or none
// at all.
CutoffColumns select_cutoffs(const Layers& layers, const std::vector<int64_t>& num_prune,
                             const std::vector<size_t>& group_sizes, const std::vector<BracketTuple>& brackets,
                             int num_threads) {
  check_threads(num_threads);
  if (group_sizes.size() != num_prune.size() || (!brackets.empty() && brackets.size() != num_prune.size())) {
    throw std::invalid_argument("a selection needs one count, one size and, if there are any, one bracket per group");
  }
  std::vector<gmp::cpu::Group> groups;
  size_t first = 0;
  for (size_t g = 0; g < num_prune.size(); ++g) {
    if (group_sizes[g] < 1 || group_sizes[g] > layers.size() - first) {
      throw std::invalid_argument("groups need a layer each, and all layers together");
    }
    int64_t n = 0;
    const size_t end = first + group_sizes[g];
    for (size_t l = first; l < end; ++l) {
      if (layers[l].dtype != layers[first].dtype) throw std::invalid_argument("a group needs layers of one dtype");
      n += layers[l].n;
    }
    if (num_prune[g] < 0 || num_prune[g] > n) {
      throw std::invalid_argument("num_prune exceeds the number of weights");
    }
    const auto [lo, hi] = brackets.empty() ? BracketTuple{1, 0} : brackets[g];
    groups.push_back({first, group_sizes[g], num_prune[g], {lo, hi}});
    first = end;
  }
  if (first != layers.size()) throw std::invalid_argument("groups need a layer each, and all layers together");
  CutoffColumns columns;
  auto& [keys, num_below, num_ties, num_kept, tie_indices, nonfinite] = columns;
  tie_indices.resize(layers.size());
  nonfinite.resize(layers.size(), -1);
  py::gil_scoped_release release;
  gmp::cpu::select(layers, groups, tie_indices, nonfinite, num_threads);
  for (const gmp::cpu::Group& group : groups) {
    keys.insert(keys.end(), group.num_layers, group.bracket.lo);
    num_below.insert(num_below.end(), group.num_layers, group.counts.pruned + group.counts.below);
    num_ties.insert(num_ties.end(), group.num_layers, group.counts.inside);
    num_kept.insert(num_kept.end(), group.num_layers, gmp::cpu::num_ties_kept(group));
  }
  return columns;
}

// below, inside, pruned, nonfinite
using CountsTuple = std::tuple<int64_t, int64_t, int64_t, int64_t>;

// candidates: one per layer; bins: one row of num_bins zeros per layer; chunk_bins: none, or one per chunk.
std::vector<CountsTuple> count(const Layers& layers, const std::vector<BracketTuple>& brackets,
                               const std::vector<Array>& candidates, const Array& bins, const Array& chunk_bins,
                               int64_t num_bins, int num_threads) {
  check_threads(num_threads);
  const size_t n = layers.size();
  if (brackets.size() != n || candidates.size() != n || num_bins < 1) {
    throw std::invalid_argument("a count needs one bracket and one place for candidates per layer, and bins");
  }
  int64_t num_chunks = 0;
  for (const LayerView& layer : layers) num_chunks += gmp::cpu::num_chunks(layer.n);
  auto* next_of_chunks = optional<uint16_t>(chunk_bins, num_chunks * num_bins, "bins of chunks");
  int64_t* next_bins = checked<int64_t>(bins, num_bins * static_cast<int64_t>(n), "bins");
  std::vector<gmp::cpu::Group> groups(n);
  std::vector<gmp::cpu::Group*> addresses;
  for (size_t l = 0; l < n; ++l) {
    const auto [address, capacity] = candidates[l];
    groups[l] = {l, 1, 0, {brackets[l].first, brackets[l].second}, {}, next_bins, pointer(address), capacity};
    if (address == 0) groups[l].capacity = 0;
    addresses.push_back(&groups[l]);
    next_bins += num_bins;
    groups[l].chunk_bins = next_of_chunks;
    if (next_of_chunks != nullptr) next_of_chunks += gmp::cpu::num_chunks(layers[l].n) * num_bins;
  }
  std::vector<int64_t> nonfinite(n, -1);
  std::vector<CountsTuple> result;
  py::gil_scoped_release release;
  gmp::cpu::count(layers, addresses, num_bins, nonfinite, num_threads);
  for (size_t l = 0; l < n; ++l) {
    const gmp::BracketCounts& counts = groups[l].counts;
    result.emplace_back(counts.below, counts.inside, counts.pruned, nonfinite[l]);
  }
  return result;
}

// groups: first layer, number of layers, weights wanted; keys: a row for each. Returns how many keys its row has got,
// and how many of its sampled weights are pruned.
std::vector<std::pair<int64_t, int64_t>> draw(const Layers& layers,
                                              const std::vector<std::tuple<size_t, size_t, int64_t>>& groups,
                                              const Array& keys, int64_t row_size, int num_threads) {
  check_threads(num_threads);
  void* const rows = checked(keys, row_size * static_cast<int64_t>(groups.size()), "keys");
  py::gil_scoped_release release;
  return gmp::cpu::draw(layers, groups, rows, row_size, num_threads);
}

int64_t num_weights(const LayerView& layer) { return layer.is_plain() ? layer.n : layer.ranking.num_weights; }

// Weights kept before, and now, per layer.
using KeptColumns = std::pair<std::vector<int64_t>, std::vector<int64_t>>;

// The key and tie index of each layer, and the place for its new bits; if `places` is empty, that is its mask.
KeptColumns prune(const Layers& layers, const std::vector<uint64_t>& keys, const std::vector<int64_t>& tie_indices,
                  const std::vector<Array>& out, int num_threads) {
  check_threads(num_threads);
  const size_t n = layers.size();
  if (keys.size() != n || tie_indices.size() != n || (!out.empty() && out.size() != n)) {
    throw std::invalid_argument("keys and tie indices need one entry per layer, and so does out if there are any");
  }
  std::vector<uint8_t*> outputs;
  for (size_t l = 0; l < n; ++l) {
    outputs.push_back(out.empty() ? const_cast<uint8_t*>(layers[l].mask)
                                  : checked<uint8_t>(out[l], bytes_of_bits(num_weights(layers[l])), "new bits"));
    if (outputs.back() == nullptr) throw std::invalid_argument("bits need a place to go");
    if (tie_indices[l] < 0 || tie_indices[l] > layers[l].n)
      throw std::invalid_argument("a tie index exceeds its layer");
  }
  py::gil_scoped_release release;
  return gmp::cpu::apply(layers, keys, tie_indices, outputs, num_threads);
}

void apply_masks(const Layers& layers, int num_threads) {
  check_threads(num_threads);
  py::gil_scoped_release release;
  gmp::cpu::apply(layers, {}, {}, {}, num_threads);
}

// Checked chunk offsets of compact state: kept weights before each chunk, and their total.
const int64_t* offsets_of(const Array& chunk_offsets, int64_t n, int64_t num_kept) {
  const int64_t num_chunks = gmp::cpu::num_chunks(n);
  const int64_t* const offsets = optional<const int64_t>(chunk_offsets, num_chunks + 1, "chunk offsets");
  if (offsets == nullptr) return nullptr;
  bool holds = offsets[0] == 0 && offsets[num_chunks] == num_kept;
  for (int64_t c = 0; c < num_chunks; ++c) holds = holds && offsets[c] <= offsets[c + 1];
  if (!holds) {
    throw std::invalid_argument("expected chunk offsets of " + std::to_string(num_kept) + " values of compact state");
  }
  return offsets;
}

// Checked and converted once, for all steps until an address changes; without the gradient.
UpdateTensor update_tensor(const std::string& dtype, const Array& weights, const Array& master,
                           const std::vector<Array>& state, const std::string& state_dtype, const Array& mask,
                           const Array& chunk_offsets, int64_t num_kept) {
  const int64_t n = weights.second;
  if (weights.first == 0 || n <= 0) throw std::invalid_argument("a tensor needs an address and at least one weight");
  UpdateTensor t{};
  if (state.size() > std::size(t.state)) {
    throw std::invalid_argument("a tensor has " + std::to_string(std::size(t.state)) + " arrays of state at most");
  }
  t.dtype = dtype_of(dtype);
  t.state_dtype = dtype_of(state_dtype);
  const bool is_double = t.dtype == gmp::DType::float64;
  if (t.state_dtype != (is_double ? gmp::DType::float64 : gmp::DType::float32) &&
      (is_double || t.state_dtype != gmp::DType::bfloat16)) {
    throw std::invalid_argument("expected state of float32 or bfloat16, or of float64 for float64 weights, got " +
                                state_dtype);
  }
  t.weights = pointer(weights.first);
  t.master = optional(master, n, "master weights");
  t.mask = optional<const uint8_t>(mask, bytes_of_bits(n), "a mask");
  t.chunk_offsets = offsets_of(chunk_offsets, n, num_kept);
  t.n = n;
  if (t.chunk_offsets != nullptr && t.mask == nullptr) throw std::invalid_argument("compact state needs a mask");
  const int64_t num_values = t.chunk_offsets == nullptr ? n : num_kept;
  for (const Array& values : state) {
    // State of a tensor that keeps no weight has no address.
    t.state[t.num_states] = optional(values, num_values, "state");
    if (t.state[t.num_states++] == nullptr && num_values != 0) throw std::invalid_argument("state needs an address");
  }
  return t;
}

UpdateBatch update_batch(const std::vector<const UpdateTensor*>& tensors) {
  UpdateBatch batch;
  for (const UpdateTensor* t : tensors) batch.push_back(*t);
  return batch;
}

// The gradients of one step, one per tensor.
struct Gradients {
  std::vector<Array> arrays;
};

// Looks at tensors through the capsule of their type. None if one has elements but no address.
py::object gradients_at(const py::capsule& exchange, const py::list& tensors) {
  const auto* const table = gmp::dlpack::understood(exchange.get_pointer<gmp::dlpack::Exchange>());
  Gradients gradients;
  for (const py::handle object : tensors) {
    gmp::dlpack::Tensor tensor{};
    if (table == nullptr || !gmp::dlpack::look_at(*table, object.ptr(), tensor)) {
      gmp::drop_error();
      return py::none();
    }
    gradients.arrays.emplace_back(reinterpret_cast<uintptr_t>(gmp::dlpack::address_of(tensor)),
                                  gmp::dlpack::numel_of(tensor));
  }
  return py::cast(std::move(gradients));
}

// Reads a row of constants, of which absent ones have no effect.
gmp::UpdateConstants<double> constants_of(const py::dict& given) {
  const auto value_of = [&](PyObject* name, double absent) {
    PyObject* const found = PyDict_GetItemWithError(given.ptr(), name);
    const double value = found == nullptr ? absent : PyFloat_AsDouble(found);
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    return value;
  };
#define GMP_CONSTANT(name, absent) static PyObject* const name = PyUnicode_InternFromString(#name);
  GMP_CONSTANTS(GMP_CONSTANT)
#undef GMP_CONSTANT
#define GMP_CONSTANT(name, absent) value_of(name, absent),
  return {GMP_CONSTANTS(GMP_CONSTANT)};
#undef GMP_CONSTANT
}

// rows: an index into the constants per tensor.
void update(const std::string& rule_name, const UpdateBatch& batch, const Gradients& gradients,
            const std::vector<size_t>& rows, const std::vector<py::dict>& constants, int num_threads) {
  check_threads(num_threads);
  const gmp::Rule rule = gmp::rule_of(rule_name);
  const auto [fewest, most] = gmp::kNumStates[static_cast<int>(rule)];
  std::vector<gmp::UpdateConstants<double>> typed_constants;
  for (const py::dict& given : constants) typed_constants.push_back(constants_of(given));
  UpdateBatch tensors = batch;
  if (gradients.arrays.size() != tensors.size() || rows.size() != tensors.size()) {
    throw std::invalid_argument("an update needs one gradient and one row of constants per tensor");
  }
  for (size_t i = 0; i < tensors.size(); ++i) {
    UpdateTensor& t = tensors[i];
    if (t.num_states < fewest || t.num_states > most) {
      throw std::invalid_argument("a rule of " + std::to_string(fewest) + " to " + std::to_string(most) +
                                  " arrays of state got others");
    }
    if (rows[i] >= constants.size()) throw std::invalid_argument("a tensor needs its constants");
    t.grads = checked(gradients.arrays[i], t.n, "a gradient");
    t.constants = rows[i];
  }
  py::gil_scoped_release release;
  gmp::cpu::update(rule, tensors, typed_constants, num_threads);
}

double sum_squares(const Layers& gradients, int num_threads) {
  check_threads(num_threads);
  py::gil_scoped_release release;
  return gmp::cpu::sum_squares(gradients, num_threads);
}

// values and, for compact state, their mask and chunk offsets
using StateTuple = std::tuple<Array, Array, Array>;
// source, target, number of weights, dtype
using MoveTuple = std::tuple<StateTuple, StateTuple, int64_t, std::string>;

void move_state(const std::vector<MoveTuple>& given, int num_threads) {
  check_threads(num_threads);
  std::vector<UpdateTensor> sources, targets;
  for (const auto& [source, target, n, dtype] : given) {
    if (n == 0) continue;
    if (n < 0) throw std::invalid_argument("expected a number of weights, got " + std::to_string(n));
    for (auto* const tensors : {&sources, &targets}) {
      const auto& [values, mask, chunk_offsets] = tensors == &sources ? source : target;
      UpdateTensor t{};
      t.dtype = dtype_of(dtype);
      t.n = n;
      t.mask = optional<const uint8_t>(mask, bytes_of_bits(n), "a mask");
      t.chunk_offsets = offsets_of(chunk_offsets, n, values.second);
      if ((t.mask == nullptr) != (t.chunk_offsets == nullptr)) {
        throw std::invalid_argument("compact state needs a mask and chunk offsets");
      }
      t.state[0] = t.mask == nullptr ? checked(values, n, "state") : pointer(values.first);
      tensors->push_back(t);
    }
  }
  py::gil_scoped_release release;
  gmp::cpu::move_state(sources, targets, num_threads);
}

// Writes the chunk offsets of all masks, given with their numbers of weights, one after the other. Returns how many
// weights each keeps.
std::vector<int64_t> chunk_offsets(const std::vector<std::pair<Array, int64_t>>& masks, const Array& out) {
  int64_t size = 0;
  for (const auto& [mask, n] : masks) size += gmp::cpu::num_chunks(n) + 1;
  auto* next = checked<int64_t>(out, size, "chunk offsets");
  std::vector<int64_t> num_kept;
  for (const auto& [mask, n] : masks) {
    const uint8_t* const bits = n == 0 ? nullptr : checked<const uint8_t>(mask, bytes_of_bits(n), "a mask");
    const std::vector<int64_t> offsets = gmp::cpu::chunk_offsets(bits, n);
    next = std::copy(offsets.begin(), offsets.end(), next);
    num_kept.push_back(offsets.back());
  }
  return num_kept;
}

// Describes all tensors one after the other. Equal results mean equal layouts and, with addresses, equal places; with
// storages, also as much memory there. None if a tensor has elements but no address, or negates its memory.
// `exchange` is the capsule of the tensors' type.
py::object describe(const py::capsule& exchange, const py::list& tensors, bool with_addresses, bool with_storages) {
  const auto* const table = gmp::dlpack::understood(exchange.get_pointer<gmp::dlpack::Exchange>());
  if (table == nullptr) return py::none();
  std::string bytes;
  bytes.reserve(tensors.size() * 96);  // four dimensions each
  for (const py::handle tensor : tensors) {
    if (gmp::describe_plain(*table, tensor.ptr(), with_addresses, bytes) &&
        (!with_storages || gmp::describe_storage(tensor.ptr(), bytes))) {
      continue;
    }
    gmp::drop_error();  // the caller finds out what the object is
    return py::none();
  }
  return py::bytes(bytes);
}

// Looks at a sample of the pruned weights of a tensor, each `turn` at another. None for a tensor that is not on the
// host, or does not lie as its mask does, which is given by bits, shape and whether it is row-major.
py::object sees_life(const py::capsule& exchange, const py::handle& weight, const py::handle& packed,
                     const std::vector<int64_t>& shape, bool is_row_major, int64_t turn) {
  const auto* const table = gmp::dlpack::understood(exchange.get_pointer<gmp::dlpack::Exchange>());
  gmp::dlpack::Tensor values{}, bits{};
  if (table == nullptr || !gmp::dlpack::look_at(*table, weight.ptr(), values) ||
      !gmp::dlpack::look_at(*table, packed.ptr(), bits)) {
    gmp::drop_error();
    return py::none();
  }
  const auto dtype = gmp::dlpack::dtype_of(values);
  const int64_t n = gmp::dlpack::numel_of(values);
  const bool fits = dtype && gmp::dlpack::lies_on_host(values, shape, is_row_major) && bits.type_bits == 8 &&
                    gmp::dlpack::lies_on_host(bits, {bytes_of_bits(n)}, true);
  if (!fits) return py::none();
  const gmp::cpu::LayerView layer{*dtype, gmp::dlpack::address_of(values), n,
                                  static_cast<const uint8_t*>(gmp::dlpack::address_of(bits))};
  return py::bool_(gmp::cpu::sees_life(layer, turn));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  // No constructors: pybind11 registers their objects outside of any try block, so running out of memory there would
  // end the process. It registers objects returned by functions inside one.
  py::class_<UpdateTensor>(m, "UpdateTensor");
  py::class_<Layers>(m, "Layers");
  py::class_<UpdateBatch>(m, "UpdateBatch");
  py::class_<Gradients>(m, "Gradients");
  m.def("layers", &layers_of);
  m.def("update_tensor", &update_tensor);
  m.def("update_batch", &update_batch);
  m.def("select", &select_cutoffs);
  m.def("count", &count);
  m.def("draw", &draw);
  m.attr("DRAW_SLACK_BYTES") = gmp::cpu::kGatherSlackBytes;
  m.def("count_slots", &gmp::count_slots, py::call_guard<py::gil_scoped_release>());
  m.def("prune", &prune);
  m.def("apply_masks", &apply_masks);
  m.def("gradients", [](const std::vector<Array>& arrays) { return Gradients{arrays}; });
  m.def("gradients_at", &gradients_at);
  m.def("gradients_if_unchanged", &gmp::gradients_if_unchanged);
  m.def("has_settings", &gmp::has_settings);
  m.def("update", &update);
  m.def("sum_squares", &sum_squares);
  m.def("move_state", &move_state);
  m.def("chunk_offsets", &chunk_offsets);
  m.attr("CHUNK") = gmp::cpu::kChunk;
  m.def("describe", &describe);
  m.def("sees_life", &sees_life);
  m.def("isa", [] { return std::string(gmp::cpu::active_kernels().front().name); });
}
