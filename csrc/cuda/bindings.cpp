// The launches as a Python module of their own, _cuda, or _simt where the kernels run on the host: addresses and
// numbers in, nothing out. Tables are tensors of eight-byte integers that the caller keeps alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>

#include "../names.h"
#include "launchers.h"

#if defined(GMP_SIMT)
#include "../simt/simt.h"
#endif

namespace py = pybind11;

namespace {

using gmp::cuda::Launch;

template <typename T>
T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

void select_thresholds(uint64_t stream, unsigned blocks, const std::string& dtype, uint64_t layers, int64_t num_layers,
                       uint64_t groups, int64_t num_groups, int64_t num_chunks, uint64_t bins, uint64_t lists,
                       uint64_t list_counts, uint64_t tie_counts) {
  gmp::cuda::select({stream, blocks}, gmp::dtype_of(dtype), pointer<gmp::cuda::LayerRow>(layers), num_layers,
                    pointer<gmp::cuda::GroupRow>(groups), num_groups, num_chunks, pointer<void>(bins),
                    pointer<void>(lists), pointer<unsigned>(list_counts), pointer<unsigned>(tie_counts));
}

void apply(uint64_t stream, unsigned blocks, const std::string& dtype, uint64_t layers, int64_t num_layers,
           int64_t num_chunks) {
  gmp::cuda::apply({stream, blocks}, gmp::dtype_of(dtype), pointer<gmp::cuda::LayerRow>(layers), num_layers,
                   num_chunks);
}

void update(uint64_t stream, unsigned blocks, const std::string& dtype, const std::string& rule, uint64_t rows,
            int64_t num_rows, int64_t num_chunks, uint64_t constants) {
  gmp::cuda::update({stream, blocks}, gmp::dtype_of(dtype), gmp::rule_of(rule), pointer<gmp::cuda::UpdateRow>(rows),
                    num_rows, num_chunks, pointer<gmp::UpdateConstants<double>>(constants));
}

void repack(uint64_t stream, unsigned blocks, uint64_t rows, int64_t num_rows, int64_t num_chunks) {
  gmp::cuda::repack({stream, blocks}, pointer<gmp::cuda::RepackRow>(rows), num_rows, num_chunks);
}

void ranks(uint64_t stream, uint64_t mask, int64_t n, uint64_t out) {
  gmp::cuda::ranks({stream, 1}, pointer<uint8_t>(mask), n, pointer<int64_t>(out));
}

void sum_squares(uint64_t stream, unsigned blocks, uint64_t rows, int64_t num_rows, int64_t num_chunks, uint64_t sums) {
  gmp::cuda::sum_squares({stream, blocks}, pointer<gmp::cuda::GradRow>(rows), num_rows, num_chunks,
                         pointer<double>(sums));
}

// The constants of one step as the kernels read them.
py::bytes pack_constants(const std::map<std::string, double>& given) {
  const gmp::UpdateConstants<double> constants = gmp::constants_of(given);
  return py::bytes(reinterpret_cast<const char*>(&constants), sizeof(constants));
}

}  // namespace

PYBIND11_MODULE(GMP_MODULE, m) {
  m.attr("CHUNK") = gmp::cuda::kChunk;
  m.attr("LIST_CAPACITY") = gmp::cuda::kListCapacity;
  m.attr("BINS") = gmp::cuda::kBins;
  m.def("select", &select_thresholds);
  m.def("apply", &apply);
  m.def("update", &update);
  m.def("repack", &repack);
  m.def("ranks", &ranks);
  m.def("sum_squares", &sum_squares);
  m.def("pack_constants", &pack_constants);
  m.def("device_info", [] {
    const gmp::cuda::DeviceInfo info = gmp::cuda::device_info();
    return py::make_tuple(info.reason, info.multiprocessors, info.major, info.minor);
  });
#if defined(GMP_SIMT)
  m.def("set_seed", &simt::set_seed);
  m.def("take_traffic", [] {
    py::list rows;
    for (const simt::Traffic& t : simt::take_traffic()) {
      rows.append(py::make_tuple(t.kernel, t.launches, t.bytes_loaded, t.bytes_stored));
    }
    return rows;
  });
#endif
}
