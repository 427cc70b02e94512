#include "optim.h"

#include <omp.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <type_traits>

#include "chunks.h"
#include "kernels.h"

namespace gmp::cpu {
namespace {

// `work` must not throw: an exception in a thread of a parallel region ends the process.
template <typename Task, typename Work>
void for_each_chunk(const std::vector<Task>& tasks, const ChunkTable& chunks, int num_threads, Work work) {
  active_kernels();  // may throw at its first call
#pragma omp parallel for schedule(guided, 8) num_threads(num_threads)
  for (int64_t i = 0; i < chunks.size(); ++i) {
    const Chunk chunk = chunks[i];
    work(tasks[chunk.tensor], chunk, i);
  }
}

template <typename T>
T* advance(T* p, int64_t bytes) {
  using Bytes = std::conditional_t<std::is_const_v<T>, const char, char>;
  return p == nullptr ? nullptr : static_cast<Bytes*>(p) + bytes;
}

// One chunk as a tensor of its own.
UpdateTensor part_of(const UpdateTensor& tensor, const Chunk& c, const UpdateKernels& kernels) {
  UpdateTensor part = tensor;
  part.n = c.end - c.begin;
  part.weights = advance(part.weights, c.begin * kernels.weight_bytes);
  part.grads = advance(part.grads, c.begin * kernels.weight_bytes);
  part.master = advance(part.master, c.begin * kernels.state_bytes);
  if (part.mask != nullptr) part.mask += c.begin / 8;
  int64_t first_state = c.begin;
  if (part.chunk_offsets != nullptr) {
    part.chunk_offsets += c.begin / kChunk;
    first_state = part.chunk_offsets[0];
  }
  for (void*& state : part.state) state = advance(state, first_state * kernels.state_bytes);
  return part;
}

// Bits that somebody has written since the offsets were counted would lead a kernel past the end of the state.
bool offsets_hold(const KernelSet& kernels, const uint8_t* mask, const int64_t* chunk_offsets, const Chunk& c) {
  if (chunk_offsets == nullptr) return true;
  const int64_t* const offset = chunk_offsets + c.begin / kChunk;
  return kernels.count_bits(mask + c.begin / 8, c.end - c.begin) == offset[1] - offset[0];
}

template <typename Task, typename Holds>
void check_offsets(const std::vector<Task>& tasks, const ChunkTable& chunks, int num_threads, Holds holds) {
  int64_t wrong = 0;
  for_each_chunk(tasks, chunks, num_threads, [&](const Task& task, const Chunk& c, int64_t) {
    if (holds(task, c)) return;
#pragma omp atomic
    ++wrong;
  });
  if (wrong != 0) {
    throw std::invalid_argument("expected the bits by which compact state was laid out, got a mask written since then");
  }
}

// Packing and unpacking touch up to a vector more than their values: both go through buffers.
inline constexpr size_t kBufferWords = kChunk + kGatherSlackBytes / sizeof(uint64_t);

template <typename Bits>
void move_chunk(const StateMove& move, const Chunk& c, uint64_t* buffers) {
  const Kernels<Bits>& kernels = kernels_for<Bits>();
  Bits* const dense = reinterpret_cast<Bits*>(buffers);
  Bits* const compact = reinterpret_cast<Bits*>(buffers + kBufferWords);
  const int64_t n = c.end - c.begin;
  const auto first = [&](const State& state) {
    return static_cast<Bits*>(state.values) + (state.mask == nullptr ? c.begin : state.chunk_offsets[c.begin / kChunk]);
  };
  const State &source = move.source, &target = move.target;
  const Bits* const from = first(source);
  if (source.mask == nullptr) {
    std::copy_n(from, n, dense);
  } else {
    const int64_t* const offset = source.chunk_offsets + c.begin / kChunk;
    std::copy_n(from, offset[1] - offset[0], compact);
    kernels.unpack(compact, source.mask + c.begin / 8, n, dense);
  }
  Bits* const to = first(target);
  if (target.mask == nullptr) {
    std::copy_n(dense, n, to);
  } else {
    std::copy_n(compact, kernels.pack(dense, target.mask + c.begin / 8, n, compact), to);
  }
}

}  // namespace

void update(Rule rule, const std::vector<UpdateTensor>& tensors, const std::vector<UpdateConstants<double>>& constants,
            int num_threads) {
  const ChunkTable chunks(sizes_of(tensors));
  const KernelSet& set = active_kernels();
  if (std::any_of(tensors.begin(), tensors.end(), [](const UpdateTensor& t) { return t.chunk_offsets != nullptr; })) {
    check_offsets(tensors, chunks, num_threads,
                  [&](const UpdateTensor& t, const Chunk& c) { return offsets_hold(set, t.mask, t.chunk_offsets, c); });
  }
  for_each_chunk(tensors, chunks, num_threads, [&](const UpdateTensor& t, const Chunk& c, int64_t) {
    const UpdateConstants<double>& given = constants[t.constants];
    if (given.skip != 0) return;
    const UpdateKernels& kernels = set.update_kernels[static_cast<int>(t.dtype)];
    kernels.update[static_cast<int>(rule)](part_of(t, c, kernels), given);
  });
}

double sum_squares(const std::vector<UpdateTensor>& tensors, int num_threads) {
  const ChunkTable chunks(sizes_of(tensors));
  const KernelSet& set = active_kernels();
  std::vector<double> sums(static_cast<size_t>(chunks.size()));
  for_each_chunk(tensors, chunks, num_threads, [&](const UpdateTensor& t, const Chunk& c, int64_t i) {
    const UpdateKernels& kernels = set.update_kernels[static_cast<int>(t.dtype)];
    sums[static_cast<size_t>(i)] = kernels.sum_squares(part_of(t, c, kernels));
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

void move_state(const std::vector<StateMove>& moves, int num_threads) {
  const ChunkTable chunks(sizes_of(moves));
  const std::unique_ptr<uint64_t[]> buffers{new uint64_t[static_cast<size_t>(num_threads) * 2 * kBufferWords]};
  const KernelSet& set = active_kernels();
  check_offsets(moves, chunks, num_threads, [&](const StateMove& move, const Chunk& c) {
    return offsets_hold(set, move.source.mask, move.source.chunk_offsets, c) &&
           offsets_hold(set, move.target.mask, move.target.chunk_offsets, c);
  });
  for_each_chunk(moves, chunks, num_threads, [&](const StateMove& move, const Chunk& c, int64_t) {
    uint64_t* const own = buffers.get() + static_cast<size_t>(omp_get_thread_num()) * 2 * kBufferWords;
    move.value_bytes == 4 ? move_chunk<uint32_t>(move, c, own) : move_chunk<uint64_t>(move, c, own);
  });
}

std::vector<int64_t> chunk_offsets(const uint8_t* mask, int64_t n) {
  std::vector<int64_t> offsets{0};
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    offsets.push_back(offsets.back() + active_kernels().count_bits(mask + begin / 8, std::min(kChunk, n - begin)));
  }
  return offsets;
}

}  // namespace gmp::cpu
