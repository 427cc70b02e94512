#include "optim.h"

#include <algorithm>
#include <memory>
#include <type_traits>

#include "chunks.h"
#include "kernels.h"

namespace gmp::cpu {
namespace {

// Calls visit(kernels, bytes of a weight, zero of the type it is computed in).
template <typename Visit>
auto with_kernels(DType dtype, Visit visit) {
  const KernelSet& set = active_kernels();
  switch (dtype) {
    case DType::float32:
      return visit(set.float32, 4, float{});
    case DType::float64:
      return visit(set.float64, 8, double{});
    case DType::float16:
      return visit(set.float16, 2, float{});
    case DType::bfloat16:
      return visit(set.bfloat16, 2, float{});
  }
  __builtin_unreachable();
}

void* advance(void* p, int64_t bytes) { return p == nullptr ? nullptr : static_cast<char*>(p) + bytes; }

template <typename Task, typename Work>
void for_each_chunk(const std::vector<Task>& tasks, const ChunkTable& chunks, int num_threads, Work work) {
#pragma omp parallel for schedule(guided, 8) num_threads(num_threads)
  for (int64_t i = 0; i < chunks.size(); ++i) {
    const Chunk chunk = chunks[i];
    work(tasks[chunk.tensor], chunk, i);
  }
}

int64_t count_bits(const uint8_t* mask, int64_t n) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += 64) {
    uint64_t bits = 0;
    __builtin_memcpy(&bits, mask + i / 8, static_cast<size_t>(std::min<int64_t>(8, (n - i + 7) / 8)));
    count += __builtin_popcountll(bits);
  }
  return count;
}

// Through buffers, since packing and unpacking touch up to a vector more than their values.
template <typename Bits, typename Kernels>
void repack_chunk(const Kernels& kernels, const RepackTask& task, const Chunk& c) {
  constexpr size_t kRoom = kChunk + kGatherSlackBytes / sizeof(Bits);
  const std::unique_ptr<Bits[]> dense(new Bits[kRoom]()), compact(new Bits[kRoom]);
  const int64_t n = c.end - c.begin;
  const auto first = [&](const uint8_t* mask, const int64_t* ranks) {
    return mask == nullptr ? c.begin : ranks[c.begin / kChunk];
  };
  const Bits* const from = static_cast<const Bits*>(task.from) + first(task.from_mask, task.from_ranks);
  if (task.from_mask == nullptr) {
    std::copy_n(from, n, dense.get());
  } else {
    const uint8_t* const mask = task.from_mask + c.begin / 8;
    std::copy_n(from, count_bits(mask, n), compact.get());
    kernels.unpack(compact.get(), mask, n, dense.get());
  }
  Bits* const to = static_cast<Bits*>(task.to) + first(task.to_mask, task.to_ranks);
  if (task.to_mask == nullptr) {
    std::copy_n(dense.get(), n, to);
  } else {
    std::copy_n(compact.get(), kernels.pack(dense.get(), task.to_mask + c.begin / 8, n, compact.get()), to);
  }
}

}  // namespace

void update(Rule rule, const std::vector<UpdateTensor>& tensors, const std::vector<UpdateConstants<double>>& constants,
            int num_threads) {
  std::vector<int64_t> sizes;
  for (const UpdateTensor& tensor : tensors) sizes.push_back(tensor.run.n);
  for_each_chunk(tensors, ChunkTable(std::move(sizes)), num_threads,
                 [&](const UpdateTensor& t, const Chunk& c, int64_t) {
                   with_kernels(t.dtype, [&](const auto& kernels, int weight_bytes, auto zero) {
                     using T = decltype(zero);
                     const UpdateConstants<T> given = constants[t.constants].as<T>();
                     if (given.skip != 0) return;
                     constexpr int64_t kStateBytes = sizeof(T);
                     UpdateRun run = t.run;
                     run.weights = advance(run.weights, c.begin * weight_bytes);
                     run.grads = static_cast<const char*>(run.grads) + c.begin * weight_bytes;
                     run.master = advance(run.master, c.begin * kStateBytes);
                     const int64_t first_state = run.compact ? t.ranks[c.begin / kChunk] : c.begin;
                     for (void*& state : run.state) state = advance(state, first_state * kStateBytes);
                     if (run.mask != nullptr) run.mask += c.begin / 8;
                     run.n = c.end - c.begin;
                     kernels.update[static_cast<int>(rule)](run, given);
                   });
                 });
}

double sum_squares(const std::vector<GradView>& grads, int num_threads) {
  const ChunkTable chunks(sizes_of(grads));
  std::vector<double> sums(static_cast<size_t>(chunks.size()));
  for_each_chunk(grads, chunks, num_threads, [&](const GradView& view, const Chunk& c, int64_t i) {
    sums[static_cast<size_t>(i)] = with_kernels(view.dtype, [&](const auto& kernels, int bytes, auto) {
      const uint8_t* const mask = view.mask == nullptr ? nullptr : view.mask + c.begin / 8;
      return kernels.sum_squares(static_cast<const char*>(view.grads) + c.begin * bytes, mask, c.end - c.begin);
    });
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

void repack(const std::vector<RepackTask>& tasks, int num_threads) {
  for_each_chunk(tasks, ChunkTable(sizes_of(tasks)), num_threads, [](const RepackTask& task, const Chunk& c, int64_t) {
    if (task.value_bytes == 4) {
      repack_chunk<uint32_t>(active_kernels().float32.state, task, c);
    } else {
      repack_chunk<uint64_t>(active_kernels().float64.state, task, c);
    }
  });
}

std::vector<int64_t> ranks_of(const uint8_t* mask, int64_t n) {
  std::vector<int64_t> ranks{0};
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    ranks.push_back(ranks.back() + count_bits(mask + begin / 8, std::min(kChunk, n - begin)));
  }
  return ranks;
}

}  // namespace gmp::cpu
