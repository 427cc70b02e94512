// Every operation as launches on a stream: no allocation, no synchronization, nothing read back.
#pragma once

#include <cstdint>
#include <string>

#include "../dtypes.h"
#include "../update_constants.h"
#include "tables.h"

namespace gmp::cuda {

// `stream` is a cudaStream_t; on the host it is ignored. Tables and buffers are in the device's memory.
struct Launch {
  uint64_t stream;
  unsigned num_blocks;  // of the persistent grids
};

// Throws std::runtime_error if a launch fails. bins: kBins zeros per group, which they are again afterwards; lists:
// kListCapacity keys per chunk; list_counts, tie_counts: one per chunk.
void select(const Launch& launch, DType dtype, LayerRow* layers, int64_t num_layers, GroupRow* groups,
            int64_t num_groups, int64_t num_chunks, void* bins, void* lists, unsigned* list_counts,
            unsigned* tie_counts);
void apply(const Launch& launch, DType dtype, LayerRow* layers, int64_t num_layers, int64_t num_chunks);
void update(const Launch& launch, DType dtype, Rule rule, const UpdateRow* rows, int64_t num_rows, int64_t num_chunks,
            const UpdateConstants<double>* constants);
void repack(const Launch& launch, const RepackRow* rows, int64_t num_rows, int64_t num_chunks);
void ranks(const Launch& launch, const uint8_t* mask, int64_t n, int64_t* ranks);
// sums: one per chunk, and one more, which receives the total.
void sum_squares(const Launch& launch, const GradRow* rows, int64_t num_rows, int64_t num_chunks, double* sums);

// Of the current device, or "" and a reason why there is none.
struct DeviceInfo {
  std::string reason;
  int multiprocessors, major, minor;
};
DeviceInfo device_info();

}  // namespace gmp::cuda
