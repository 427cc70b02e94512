// The launches as a Python module of their own: _cuda, or _simt if the kernels run on the host. Addresses and numbers
// go in, nothing comes out. Tables are in memory that the caller keeps alive.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>

#include "launchers.h"
#include "names.h"

#if defined(GMP_SIMT)
#include "../simt/simt.h"
#endif

namespace py = pybind11;

namespace {

using gmp::cuda::Launch;

// A field of a row: its name, and the offset and number of its eight-byte integers.
#define GMP_FIELD(Row, name) {#name, offsetof(gmp::cuda::Row, name), sizeof(gmp::cuda::Row::name) / sizeof(int64_t)}

// The dtype of a row of so many bytes, for numpy.
py::dtype row_of(size_t size, const std::vector<std::tuple<const char*, size_t, size_t>>& fields) {
  py::list names, formats, offsets;
  for (const auto& [name, offset, count] : fields) {
    names.append(name);
    formats.append((count > 1 ? std::to_string(count) : "") + "i8");
    offsets.append(offset);
  }
  return py::dtype(names, formats, offsets, static_cast<py::ssize_t>(size));
}

// All tables in one call, because between two calls Python could raise an interrupt.
template <typename Launcher>
void for_each_of(const Launch& launch, const py::buffer& tables, Launcher launcher) {
  const py::buffer_info given = tables.request();
  const auto* const rows = static_cast<const gmp::cuda::Tables*>(given.ptr);
  const size_t count = static_cast<size_t>(given.size * given.itemsize) / sizeof(gmp::cuda::Tables);
  for (size_t i = 0; i < count; ++i) launcher(launch, rows[i]);
}

void update(const Launch& launch, const std::string& rule, uint64_t rows,
            const std::vector<gmp::cuda::UpdatePart>& parts, uint64_t constants, const py::buffer& values) {
  // The values are used only if there is no address.
  gmp::cuda::ArgumentConstants argument{};
  if (constants == 0) {
    const py::buffer_info given = values.request();
    const auto bytes = static_cast<size_t>(given.size * given.itemsize);
    if (bytes == 0 || bytes > sizeof(argument) || bytes % sizeof(argument[0]) != 0) {
      throw std::invalid_argument("update: expected 1 to " + std::to_string(argument.size()) +
                                  " rows of constants, got " + std::to_string(bytes) + " bytes");
    }
    std::memcpy(argument.data(), given.ptr, bytes);
  }
  gmp::cuda::update(launch, rule, rows, parts, constants, argument);
}

// `values` are eight-byte numbers in a row.
void store(const Launch& launch, uint64_t to, const py::buffer& values) {
  const py::buffer_info given = values.request();
  gmp::cuda::store(launch, static_cast<const uint64_t*>(given.ptr),
                   given.size * given.itemsize / static_cast<py::ssize_t>(sizeof(uint64_t)), to);
}

void fetch(const Launch& launch, uint64_t from, const py::buffer& into) {
  const py::buffer_info taken = into.request(true);
  const py::gil_scoped_release waiting;
  gmp::cuda::fetch(launch, from, static_cast<size_t>(taken.size * taken.itemsize), taken.ptr);
}

}  // namespace

PYBIND11_MODULE(GMP_MODULE, m) {
  m.attr("CHUNK") = gmp::cuda::kChunk;
  m.attr("LIST_CAPACITY") = gmp::cuda::kListCapacity;
  m.attr("BINS") = gmp::cuda::kBins;
  m.attr("READERS") = gmp::cuda::kReaders;
  m.attr("MAX_ARGUMENT_CONSTANTS") = gmp::cuda::ArgumentConstants{}.size();
  m.attr("TOUCHED_BY") = gmp::cuda::kTouchedBy;
  m.attr("MOST_STORED") = gmp::cuda::most_stored();
  // Names in order, with the values that absent ones have.
  py::dict constants;
  for (const auto& [name, value] : gmp::kConstants) constants[name] = value;
  m.attr("CONSTANTS") = constants;
#define F(name) GMP_FIELD(Tables, name)
  m.attr("TABLES") =
      row_of(sizeof(gmp::cuda::Tables),
             {F(buffer), F(layers), F(groups), F(bins), F(lists), F(list_counts), F(tie_counts), F(nonfinite),
              F(num_layers), F(num_groups), F(num_chunks), F(capacity), F(dtype), F(permuted), F(out), F(finite)});
#undef F
#define F(name) GMP_FIELD(LayerRow, name)
  m.attr("LAYER_ROW") =
      row_of(sizeof(gmp::cuda::LayerRow), {F(weights), F(mask), F(n), F(first_chunk), F(group), F(cut), F(nonfinite),
                                           F(filter), F(tie_index), F(kept_before), F(kept), F(touched)});
#undef F
#define F(name) GMP_FIELD(GroupRow, name)
  m.attr("GROUP_ROW") = row_of(sizeof(gmp::cuda::GroupRow),
                               {F(first_layer), F(num_layers), F(n), F(num_prune), F(first_chunk), F(num_chunks), F(lo),
                                F(hi), F(key), F(num_below), F(num_ties), F(num_ties_kept)});
#undef F
#define F(name) GMP_FIELD(CountRow, name)
  m.attr("COUNT_ROW") = row_of(sizeof(gmp::cuda::CountRow),
                               {F(weights), F(mask), F(n), F(first_chunk), F(lo), F(hi), F(shift), F(candidates),
                                F(capacity), F(bins), F(num_bins), F(below), F(inside), F(pruned), F(nonfinite)});
#undef F
#define F(name) GMP_FIELD(PatternRow, name)
  m.attr("PATTERN_ROW") =
      row_of(sizeof(gmp::cuda::PatternRow),
             {F(source), F(mask), F(ranked), F(sums), F(weights), F(out), F(n), F(first_chunk), F(pattern), F(filter),
              F(nonfinite), F(layer), F(group), F(key), F(tie_index), F(kept_before), F(kept)});
#undef F
#define F(name) GMP_FIELD(TensorRow, name)
  m.attr("TENSOR_ROW") =
      row_of(sizeof(gmp::cuda::TensorRow), {F(weights), F(grads), F(master), F(state), F(mask), F(chunk_offsets), F(n),
                                            F(first_chunk), F(constants), F(dtype)});
#undef F
  // Local to the module, because _cuda and _simt may be in one process. No constructor, as in ../bindings.cpp.
  py::class_<Launch>(m, "Launch", py::module_local()).def_readonly("stream", &Launch::stream);
  m.def("launch_on",
        [](uint64_t stream, int device, unsigned multiprocessors) { return Launch{stream, device, multiprocessors}; });
  m.def("select",
        [](const Launch& launch, const py::buffer& tables) { for_each_of(launch, tables, gmp::cuda::select); });
  m.def("apply", [](const Launch& launch, const py::buffer& tables) { for_each_of(launch, tables, gmp::cuda::apply); });
  m.def("count", &gmp::cuda::count);
  m.def("plan_of", [](const std::array<int64_t, 4>& pattern, const std::array<int64_t, 2>& filter) {
    return gmp::cuda::plan_of({pattern[0], pattern[1], pattern[2], pattern[3]}, {filter[0], filter[1]});
  });
  m.def("rank", &gmp::cuda::rank);
  m.def("settle", &gmp::cuda::settle);
  m.def("update", &update);
  m.def("move_state", &gmp::cuda::move_state);
  m.def("count_kept", &gmp::cuda::count_kept);
  m.def("sum_squares", &gmp::cuda::sum_squares);
  m.def("store", &store);
  m.def("fetch", &fetch);
  m.def("load_kernels", &gmp::cuda::load_kernels);
#if defined(GMP_SIMT)
  m.def("set_seed", &simt::set_seed);
  m.def("take_traffic", &simt::take_traffic);
#endif
}
