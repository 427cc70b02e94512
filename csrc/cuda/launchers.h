// Every operation as launches on a stream: no allocation, no synchronization, nothing read back.
#pragma once

#include <cstdint>
#include <string>

#include "optim/rules.h"
#include "order/dtypes.h"
#include "tables.h"

namespace gmp::cuda {

// `stream` is a cudaStream_t; on the host it is ignored. Tables and buffers are in the device's memory.
struct Launch {
  uint64_t stream;
  int device;
  unsigned multiprocessors;  // of the device, for the sizes of persistent grids
};

// How many blocks of a selection need bins at most.
unsigned num_counting_blocks(unsigned multiprocessors);

// Layers and groups of a selection, and its workspace.
struct Tables {
  LayerRow* layers;
  int64_t num_layers;
  GroupRow* groups;
  int64_t num_groups, num_chunks;
  Workspace space;
};

// All of these throw std::runtime_error if a launch fails, or if an earlier one of anybody has: then nothing is
// launched.

// Brackets from samples. What begins a selection.
void begin(const Launch& launch, DType dtype, const Tables& tables);
// The rest of it.
void select(const Launch& launch, DType dtype, const Tables& tables);
// out: addresses; stop: nothing is written if that is not 0. Each may be null, and so may the groups.
void apply(const Launch& launch, DType dtype, const Tables& tables, const uint64_t* out, const int64_t* stop);
void count(const Launch& launch, DType dtype, CountRow* rows, int64_t num_rows, int64_t num_chunks);

// constants: on the device, or null: then they are those of the argument.
void update(const Launch& launch, DType dtype, Rule rule, const UpdateRow* rows, int64_t num_rows, int64_t num_chunks,
            const UpdateConstants<double>* constants, const ArgumentConstants& argument);
void move_state(const Launch& launch, const StateMoveRow* rows, int64_t num_rows, int64_t num_chunks);
// totals: how many weights each row keeps.
void chunk_offsets(const Launch& launch, const OffsetsRow* rows, int64_t num_rows, int64_t num_chunks, int64_t* totals);
// sums: one per chunk, and one more, which receives the total.
void sum_squares(const Launch& launch, const GradRow* rows, int64_t num_rows, int64_t num_chunks, double* sums);

// Loads all kernels for a device, so that none has to be at its first launch. May be called while a graph is captured.
void load_kernels(const Launch& launch);
void load_steps(const Launch& launch);  // a part of that

// Throws std::runtime_error if there is no such device.
unsigned multiprocessors_of(int device);

}  // namespace gmp::cuda
