#include "optim.h"

#include <omp.h>

#include <memory>
#include <stdexcept>

#include "chunks.h"
#include "kernels.h"

// Nothing in a parallel region may throw: that would end the process.
namespace gmp::cpu {
namespace {

// Bits that somebody has written since the offsets were counted would lead a kernel past the end of the state.
bool offsets_hold(const UpdateTensor& t, const Chunk& c) {
  if (t.chunk_offsets == nullptr) return true;
  const int64_t* const offset = t.chunk_offsets + c.begin / kChunk;
  return kernels_of(t.dtype).count_bits(t.mask + c.begin / 8, c.end - c.begin) == offset[1] - offset[0];
}

void check_offsets(int64_t num_wrong) {
  if (num_wrong == 0) return;
  throw std::invalid_argument("expected the bits by which compact state was laid out, got a mask written since then");
}

// Packing and unpacking access up to a vector more than their values, so both go through buffers.
inline constexpr size_t kBufferWords = kChunk + kGatherSlackBytes / sizeof(uint64_t);

// The first value of a tensor's state in a chunk.
template <typename Bits>
Bits* values_of(const UpdateTensor& t, const Chunk& c) {
  return static_cast<Bits*>(t.state[0]) + (t.chunk_offsets == nullptr ? c.begin : t.chunk_offsets[c.begin / kChunk]);
}

template <typename Bits>
void move_chunk(const UpdateTensor& source, const UpdateTensor& target, const Chunk& c, uint64_t* buffers) {
  const Kernels& kernels = kernels_of(source.dtype);
  const Bits* const from = values_of<Bits>(source, c);
  Bits* const to = values_of<Bits>(target, c);
  Bits* const dense = reinterpret_cast<Bits*>(buffers);
  Bits* const compact = reinterpret_cast<Bits*>(buffers + kBufferWords);
  const int64_t n = c.end - c.begin;
  if (source.mask == nullptr) {
    std::copy_n(from, n, dense);
  } else {
    const int64_t* const offset = source.chunk_offsets + c.begin / kChunk;
    std::copy_n(from, offset[1] - offset[0], compact);
    kernels.unpack(compact, source.mask + c.begin / 8, n, dense);
  }
  if (target.mask == nullptr) {
    std::copy_n(dense, n, to);
  } else {
    std::copy_n(compact, kernels.pack(dense, target.mask + c.begin / 8, n, compact), to);
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
    // To wake a thread takes longer than to count the bits of some chunks.
#pragma omp parallel for schedule(guided, 8) num_threads(num_threads) reduction(+ : num_wrong) if (num_chunks > 64)
    for (int64_t i = 0; i < num_chunks; ++i) {
      const Chunk& c = chunks[static_cast<size_t>(i)];
      num_wrong += !offsets_hold(tensors[c.tensor], c);
    }
    check_offsets(num_wrong);
  }
#pragma omp parallel for schedule(guided, 8) num_threads(threads_for(num_chunks, 8, num_threads))
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
#pragma omp parallel for schedule(guided, 8) num_threads(threads_for(num_chunks, 8, num_threads))
  for (int64_t i = 0; i < num_chunks; ++i) {
    const Chunk& c = chunks[static_cast<size_t>(i)];
    const LayerView& layer = gradients[c.tensor];
    sums[static_cast<size_t>(i)] = kernels_of(layer.dtype).sum_squares(layer, c.begin, c.end);
  }
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

void move_state(const std::vector<UpdateTensor>& sources, const std::vector<UpdateTensor>& targets, int num_threads) {
  const std::vector<Chunk> chunks = chunks_of(sources);
  const int64_t num_chunks = static_cast<int64_t>(chunks.size());
  const std::unique_ptr<uint64_t[]> buffers{new uint64_t[static_cast<size_t>(num_threads) * 2 * kBufferWords]};
  active_kernels();  // may throw at its first call
  int64_t num_wrong = 0;
#pragma omp parallel for schedule(guided, 8) num_threads(threads_for(num_chunks, 8, num_threads)) \
    reduction(+ : num_wrong)
  for (int64_t i = 0; i < num_chunks; ++i) {
    const Chunk& c = chunks[static_cast<size_t>(i)];
    num_wrong += !offsets_hold(sources[c.tensor], c) + !offsets_hold(targets[c.tensor], c);
  }
  check_offsets(num_wrong);
#pragma omp parallel for schedule(guided, 8) num_threads(threads_for(num_chunks, 8, num_threads))
  for (int64_t i = 0; i < num_chunks; ++i) {
    const Chunk& c = chunks[static_cast<size_t>(i)];
    uint64_t* const own = buffers.get() + static_cast<size_t>(omp_get_thread_num()) * 2 * kBufferWords;
    const UpdateTensor &source = sources[c.tensor], &target = targets[c.tensor];
    with_dtype(source.dtype, [&](auto infinity) { move_chunk<decltype(infinity)>(source, target, c, own); });
  }
}

std::vector<int64_t> chunk_offsets(const uint8_t* mask, int64_t n) {
  std::vector<int64_t> offsets{0};
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    offsets.push_back(offsets.back() +
                      active_kernels().front().count_bits(mask + begin / 8, std::min(kChunk, n - begin)));
  }
  return offsets;
}

}  // namespace gmp::cpu
