#include "optim.h"

#include <omp.h>

#include <memory>
#include <stdexcept>

#include "chunks.h"
#include "kernels.h"

// Nothing in a parallel region may throw: that would end the process.
namespace gmp::cpu {
namespace {

// If the bits were written after the offsets were counted, a kernel would walk past the end of the state.
bool offsets_hold(const uint8_t* mask, const int64_t* chunk_offsets, const Chunk& c) {
  if (chunk_offsets == nullptr) return true;
  const int64_t* const offset = chunk_offsets + c.begin / kChunk;
  return active_kernels().count_bits(mask + c.begin / 8, c.end - c.begin) == offset[1] - offset[0];
}

void check_offsets(int64_t num_wrong) {
  if (num_wrong == 0) return;
  throw std::invalid_argument("expected the bits by which compact state was laid out, got a mask written since then");
}

// Packing and unpacking access up to a vector more than their values, so both go through buffers.
inline constexpr size_t kBufferWords = kChunk + kGatherSlackBytes / sizeof(uint64_t);

template <typename Bits>
void move_chunk(const StateMove& move, const Chunk& c, uint64_t* buffers) {
  const Kernels& kernels = kernels_of(sizeof(Bits) == 4 ? DType::float32 : DType::float64);
  Bits* const dense = reinterpret_cast<Bits*>(buffers);
  Bits* const compact = reinterpret_cast<Bits*>(buffers + kBufferWords);
  const int64_t n = c.end - c.begin;
  const auto bits = [&](int side) { return move.masks[side] + c.begin / 8; };
  const auto values = [&](int side) {
    const int64_t* const offsets = move.chunk_offsets[side];
    return static_cast<Bits*>(move.values[side]) + (offsets == nullptr ? c.begin : offsets[c.begin / kChunk]);
  };
  if (move.masks[0] == nullptr) {
    std::copy_n(values(0), n, dense);
  } else {
    const int64_t* const offset = move.chunk_offsets[0] + c.begin / kChunk;
    std::copy_n(values(0), offset[1] - offset[0], compact);
    kernels.unpack(compact, bits(0), n, dense);
  }
  if (move.masks[1] == nullptr) {
    std::copy_n(dense, n, values(1));
  } else {
    std::copy_n(compact, kernels.pack(dense, bits(1), n, compact), values(1));
  }
}

}  // namespace

void update(Rule rule, const std::vector<UpdateTensor>& tensors, const std::vector<UpdateConstants<double>>& constants,
            int num_threads) {
  const std::vector<Chunk> chunks = chunks_of(tensors);
  const int64_t num_chunks = static_cast<int64_t>(chunks.size());
  active_kernels();  // may throw at its first call
  if (std::any_of(tensors.begin(), tensors.end(), [](const UpdateTensor& t) { return t.chunk_offsets != nullptr; })) {
    int64_t num_wrong = 0;
#pragma omp parallel for schedule(guided, 8) num_threads(num_threads) reduction(+ : num_wrong)
    for (int64_t i = 0; i < num_chunks; ++i) {
      const Chunk& c = chunks[static_cast<size_t>(i)];
      num_wrong += !offsets_hold(tensors[c.tensor].mask, tensors[c.tensor].chunk_offsets, c);
    }
    check_offsets(num_wrong);
  }
#pragma omp parallel for schedule(guided, 8) num_threads(num_threads)
  for (int64_t i = 0; i < num_chunks; ++i) {
    const Chunk& c = chunks[static_cast<size_t>(i)];
    const UpdateTensor& t = tensors[c.tensor];
    const UpdateConstants<double>& given = constants[t.constants];
    if (given.skip == 0) kernels_of(t.dtype).update[static_cast<int>(rule)](t, c.begin, c.end, given);
  }
}

double sum_squares(const std::vector<LayerView>& gradients, int num_threads) {
  const std::vector<Chunk> chunks = chunks_of(gradients);
  std::vector<double> sums(chunks.size());
  const int64_t num_chunks = static_cast<int64_t>(chunks.size());
  active_kernels();  // may throw at its first call
#pragma omp parallel for schedule(guided, 8) num_threads(num_threads)
  for (int64_t i = 0; i < num_chunks; ++i) {
    const Chunk& c = chunks[static_cast<size_t>(i)];
    const LayerView& layer = gradients[c.tensor];
    sums[static_cast<size_t>(i)] = kernels_of(layer.dtype).sum_squares(layer, c.begin, c.end);
  }
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

void move_state(const std::vector<StateMove>& moves, int num_threads) {
  const std::vector<Chunk> chunks = chunks_of(moves);
  const int64_t num_chunks = static_cast<int64_t>(chunks.size());
  const std::unique_ptr<uint64_t[]> buffers{new uint64_t[static_cast<size_t>(num_threads) * 2 * kBufferWords]};
  active_kernels();  // may throw at its first call
  int64_t num_wrong = 0;
#pragma omp parallel for schedule(guided, 8) num_threads(num_threads) reduction(+ : num_wrong)
  for (int64_t i = 0; i < num_chunks; ++i) {
    const Chunk& c = chunks[static_cast<size_t>(i)];
    const StateMove& move = moves[c.tensor];
    for (int side = 0; side < 2; ++side) num_wrong += !offsets_hold(move.masks[side], move.chunk_offsets[side], c);
  }
  check_offsets(num_wrong);
#pragma omp parallel for schedule(guided, 8) num_threads(num_threads)
  for (int64_t i = 0; i < num_chunks; ++i) {
    const Chunk& c = chunks[static_cast<size_t>(i)];
    uint64_t* const own = buffers.get() + static_cast<size_t>(omp_get_thread_num()) * 2 * kBufferWords;
    const StateMove& move = moves[c.tensor];
    move.value_bytes == 4 ? move_chunk<uint32_t>(move, c, own) : move_chunk<uint64_t>(move, c, own);
  }
}

std::vector<int64_t> chunk_offsets(const uint8_t* mask, int64_t n) {
  std::vector<int64_t> offsets{0};
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    offsets.push_back(offsets.back() + active_kernels().count_bits(mask + begin / 8, std::min(kChunk, n - begin)));
  }
  return offsets;
}

}  // namespace gmp::cpu
