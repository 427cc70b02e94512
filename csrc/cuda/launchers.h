// Every operation as launches on a stream: nothing is allocated, and only `fetch` waits for the device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "tables.h"

namespace gmp::cuda {

// `stream` is a cudaStream_t; on the host it is ignored. Addresses are those of the device's memory, dtypes positions
// in order/dtypes.h.
struct Launch {
  uint64_t stream;
  int device;
  unsigned multiprocessors;  // of the device, for the sizes of persistent grids
};

// All of these throw std::runtime_error if a launch fails. They also do so if any earlier launch in this process has
// failed, and then launch nothing.

void select(const Launch& launch, const Tables& tables);
void apply(const Launch& launch, const Tables& tables);
// rows: CountRow
void count(const Launch& launch, int64_t dtype, uint64_t rows, int64_t num_rows, int64_t num_chunks);

// The rows of the next two are PatternRow.

enum PatternWork : int64_t { kWeights, kLongGroups, kWholeBlocks };  // which kernels a pattern needs
// Those; the weights of a chunk when it is ranked; and whether it is settled without having been ranked.
using PatternPlan = std::tuple<int64_t, int64_t, bool>;
PatternPlan plan_of(const Pattern& pattern, const Filter& filter);
// a PatternWork, dtype, first row, number of rows, and of chunks, which each part numbers anew
using PatternPart = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;
// dtype: of what ranks the layers. Writes `ranked` and `sums`.
void rank(const Launch& launch, uint64_t rows, const std::vector<PatternPart>& parts);
// dtype: of what is ranked, the sums of blocks. Writes `weights`, `out` and the answer, kChunk weights to a chunk.
void settle(const Launch& launch, uint64_t rows, const std::vector<PatternPart>& parts);

// The rows of the others are TensorRow.

// dtype, dtype of the state, first row, number of rows, and of chunks, which each part numbers anew
using UpdatePart = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;
// constants: the address of UpdateConstants<double>; if it is 0, those in `argument` are used.
void update(const Launch& launch, const std::string& rule, uint64_t rows, const std::vector<UpdatePart>& parts,
            uint64_t constants, const ArgumentConstants& argument);
void move_state(const Launch& launch, uint64_t rows, int64_t num_rows, int64_t num_chunks);
// counts: int64_t, the weights that each chunk keeps.
void count_kept(const Launch& launch, uint64_t rows, int64_t num_rows, int64_t num_chunks, uint64_t counts);
// sums: double, one per chunk.
void sum_squares(const Launch& launch, uint64_t rows, int64_t num_rows, int64_t num_chunks, uint64_t sums);

// Most words of eight bytes that `store` takes; for more of them, a copy from pinned memory takes less time.
int64_t most_stored();
// `from` has been read when `store` returns: the words travel as arguments of the launches, so there is no copy for
// which the owner of `from` would have to wait.
void store(const Launch& launch, const uint64_t* from, int64_t count, uint64_t to);
void fetch(const Launch& launch, uint64_t from, size_t bytes, void* to);

// Loads all kernels for a device, so that no first launch has to, and returns the number of its multiprocessors. May be
// called while a graph is captured. Throws std::runtime_error if there is no such device.
unsigned load_kernels(int device);
void load_steps();  // parts of that
void load_patterns();

}  // namespace gmp::cuda
