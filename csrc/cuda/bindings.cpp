// The launches as a Python module of their own, _cuda, or _simt where the kernels run on the host: addresses and
// numbers in, nothing out. Tables are tensors of eight-byte integers that the caller keeps alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>

#include "launchers.h"
#include "names.h"
#include "transfers.h"

#if defined(GMP_SIMT)
#include "../simt/simt.h"
#endif

namespace py = pybind11;

namespace {

using gmp::dtype_of;
using gmp::cuda::Launch;
using gmp::cuda::Tables;

template <typename T>
T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

Tables tables_of(uint64_t layers, int64_t num_layers, uint64_t groups, int64_t num_groups, int64_t num_chunks,
                 uint64_t bins, uint64_t lists, uint64_t list_counts, uint64_t tie_counts, int64_t capacity,
                 uint64_t nonfinite) {
  return {pointer<gmp::cuda::LayerRow>(layers),
          num_layers,
          pointer<gmp::cuda::GroupRow>(groups),
          num_groups,
          num_chunks,
          {bins, lists, list_counts, tie_counts, capacity, nonfinite}};
}

void begin(const Launch& launch, const std::string& dtype, const Tables& tables) {
  gmp::cuda::begin(launch, dtype_of(dtype), tables);
}

void select_cutoffs(const Launch& launch, const std::string& dtype, const Tables& tables) {
  gmp::cuda::select(launch, dtype_of(dtype), tables);
}

// dtype, tables, and the address of the places of the new bits or 0
using ApplyTuple = std::tuple<std::string, const Tables*, uint64_t>;

// All parts in one call: between two of them Python must not take its turn, and raise what somebody has sent.
void apply(const Launch& launch, const std::vector<ApplyTuple>& parts, uint64_t stop) {
  std::vector<gmp::DType> dtypes;
  for (const ApplyTuple& part : parts) dtypes.push_back(dtype_of(std::get<0>(part)));
  for (size_t i = 0; i < parts.size(); ++i) {
    const auto& [_, tables, out] = parts[i];
    gmp::cuda::apply(launch, dtypes[i], *tables, pointer<uint64_t>(out), pointer<int64_t>(stop));
  }
}

void count_layers(const Launch& launch, const std::string& dtype, uint64_t rows, int64_t num_rows, int64_t num_chunks) {
  gmp::cuda::count(launch, dtype_of(dtype), pointer<gmp::cuda::CountRow>(rows), num_rows, num_chunks);
}

// dtype, address of the rows, their number and that of their chunks
using UpdateTuple = std::tuple<std::string, uint64_t, int64_t, int64_t>;

// All parts in one call, as in apply.
void update(const Launch& launch, const std::string& rule_name, const std::vector<UpdateTuple>& parts,
            uint64_t constants, const py::buffer& values) {
  // Only without an address are the values looked at.
  gmp::cuda::ArgumentConstants argument{};
  if (constants == 0) {
    const py::buffer_info given = values.request();
    const auto bytes = static_cast<size_t>(given.size * given.itemsize);
    if (bytes == 0 || bytes > sizeof(argument) || bytes % sizeof(argument.rows[0]) != 0) {
      throw std::invalid_argument("update: expected 1 to " + std::to_string(gmp::cuda::kMaxArgumentConstants) +
                                  " rows of constants, got " + std::to_string(bytes) + " bytes");
    }
    std::memcpy(argument.rows, given.ptr, bytes);
  }
  const gmp::Rule rule = gmp::rule_of(rule_name);
  std::vector<gmp::DType> dtypes;
  for (const UpdateTuple& part : parts) dtypes.push_back(dtype_of(std::get<0>(part)));
  for (size_t i = 0; i < parts.size(); ++i) {
    const auto& [_, rows, num_rows, num_chunks] = parts[i];
    gmp::cuda::update(launch, dtypes[i], rule, pointer<gmp::cuda::UpdateRow>(rows), num_rows, num_chunks,
                      pointer<gmp::UpdateConstants<double>>(constants), argument);
  }
}

void move_state(const Launch& launch, uint64_t rows, int64_t num_rows, int64_t num_chunks) {
  gmp::cuda::move_state(launch, pointer<gmp::cuda::StateMoveRow>(rows), num_rows, num_chunks);
}

void chunk_offsets(const Launch& launch, uint64_t rows, int64_t num_rows, int64_t num_chunks, uint64_t totals) {
  gmp::cuda::chunk_offsets(launch, pointer<gmp::cuda::OffsetsRow>(rows), num_rows, num_chunks,
                           pointer<int64_t>(totals));
}

void sum_squares(const Launch& launch, uint64_t rows, int64_t num_rows, int64_t num_chunks, uint64_t sums) {
  gmp::cuda::sum_squares(launch, pointer<gmp::cuda::GradRow>(rows), num_rows, num_chunks, pointer<double>(sums));
}

// `values` are eight-byte numbers in a row.
void store(const Launch& launch, uint64_t to, const py::buffer& values) {
  const py::buffer_info given = values.request();
  gmp::cuda::store(launch, static_cast<const uint64_t*>(given.ptr),
                   given.size * given.itemsize / static_cast<py::ssize_t>(sizeof(uint64_t)), pointer<uint64_t>(to));
}

void fetch(const Launch& launch, uint64_t from, const py::buffer& into) {
  const py::buffer_info taken = into.request(true);
  const py::gil_scoped_release waiting;
  gmp::cuda::fetch(launch, pointer<void>(from), static_cast<size_t>(taken.size * taken.itemsize), taken.ptr);
}

void load_kernels(const Launch& launch) {
  gmp::cuda::load_kernels(launch);
  gmp::cuda::load_transfers(launch);
}

}  // namespace

PYBIND11_MODULE(GMP_MODULE, m) {
  m.attr("CHUNK") = gmp::cuda::kChunk;
  m.attr("LIST_CAPACITY") = gmp::cuda::kListCapacity;
  m.attr("BINS") = gmp::cuda::kBins;
  m.attr("MAX_ARGUMENT_CONSTANTS") = gmp::cuda::kMaxArgumentConstants;
  m.attr("TOUCHED_BY") = gmp::cuda::kTouchedBy;
  m.attr("MOST_STORED") = gmp::cuda::most_stored();
  // Names in order, and the values of those that are absent.
  py::dict constants;
  for (const auto& [name, value] : gmp::kConstants) constants[name] = value;
  m.attr("CONSTANTS") = constants;
  // Local to the module: _cuda and _simt may be in one process. Without constructors, as in ../bindings.cpp.
  py::class_<Launch>(m, "Launch", py::module_local()).def_readonly("stream", &Launch::stream);
  py::class_<Tables>(m, "Tables", py::module_local());
  m.def("launch_on",
        [](uint64_t stream, int device, unsigned multiprocessors) { return Launch{stream, device, multiprocessors}; });
  m.def("tables", &tables_of);
  m.def("num_counting_blocks", &gmp::cuda::num_counting_blocks);
  m.def("begin", &begin);
  m.def("select", &select_cutoffs);
  m.def("apply", &apply);
  m.def("count", &count_layers);
  m.def("update", &update);
  m.def("move_state", &move_state);
  m.def("chunk_offsets", &chunk_offsets);
  m.def("sum_squares", &sum_squares);
  m.def("store", &store);
  m.def("fetch", &fetch);
  m.def("load_kernels", &load_kernels);
  m.def("multiprocessors_of", &gmp::cuda::multiprocessors_of);
#if defined(GMP_SIMT)
  m.def("set_seed", &simt::set_seed);
  m.def("take_traffic", &simt::take_traffic);
#endif
}
