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

// Bits that somebody has written since the ranks were counted would lead a kernel past the end of the state.
bool ranks_hold(const KernelSet& kernels, const uint8_t* mask, const int64_t* ranks, const Chunk& c) {
  if (ranks == nullptr) return true;
  const int64_t* const rank = ranks + c.begin / kChunk;
  return kernels.count_bits(mask + c.begin / 8, c.end - c.begin) == rank[1] - rank[0];
}

template <typename Task, typename Holds>
void check_ranks(const std::vector<Task>& tasks, const ChunkTable& chunks, int num_threads, Holds holds) {
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

// Room for a chunk of values, dense and compact, on one thread.
struct RepackBuffers {
  static constexpr size_t kBytes = kChunk * sizeof(uint64_t) + kGatherSlackBytes;
  std::unique_ptr<uint64_t[]> dense{new uint64_t[kBytes / sizeof(uint64_t)]};
  std::unique_ptr<uint64_t[]> compact{new uint64_t[kBytes / sizeof(uint64_t)]};
};

// Through buffers, since packing and unpacking touch up to a vector more than their values.
template <typename Bits, typename StateKernels>
void repack_chunk(const StateKernels& kernels, const RepackTask& task, const Chunk& c, const RepackBuffers& buffers) {
  Bits* const dense = reinterpret_cast<Bits*>(buffers.dense.get());
  Bits* const compact = reinterpret_cast<Bits*>(buffers.compact.get());
  const int64_t n = c.end - c.begin;
  const auto first = [&](const StateView& state) {
    return static_cast<Bits*>(state.values) + (state.mask == nullptr ? c.begin : state.ranks[c.begin / kChunk]);
  };
  const Bits* const from = first(task.from);
  if (task.from.mask == nullptr) {
    std::copy_n(from, n, dense);
  } else {
    const uint8_t* const mask = task.from.mask + c.begin / 8;
    std::copy_n(from, task.from.ranks[c.begin / kChunk + 1] - task.from.ranks[c.begin / kChunk], compact);
    kernels.unpack(compact, mask, n, dense);
  }
  Bits* const to = first(task.to);
  if (task.to.mask == nullptr) {
    std::copy_n(dense, n, to);
  } else {
    std::copy_n(compact, kernels.pack(dense, task.to.mask + c.begin / 8, n, compact), to);
  }
}

}  // namespace

void update(Rule rule, const std::vector<UpdateTensor>& tensors, const std::vector<UpdateConstants<double>>& constants,
            int num_threads) {
  std::vector<int64_t> sizes;
  for (const UpdateTensor& tensor : tensors) sizes.push_back(tensor.run.n);
  const ChunkTable chunks(std::move(sizes));
  const KernelSet& set = active_kernels();
  if (std::any_of(tensors.begin(), tensors.end(), [](const UpdateTensor& t) { return t.run.compact; })) {
    check_ranks(tensors, chunks, num_threads,
                [&](const UpdateTensor& t, const Chunk& c) { return ranks_hold(set, t.run.mask, t.ranks, c); });
  }
  for_each_chunk(tensors, chunks, num_threads, [&](const UpdateTensor& t, const Chunk& c, int64_t) {
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
  const ChunkTable chunks(sizes_of(tasks));
  const std::vector<RepackBuffers> buffers(static_cast<size_t>(num_threads));
  const KernelSet& kernels = active_kernels();
  check_ranks(tasks, chunks, num_threads, [&](const RepackTask& task, const Chunk& c) {
    return ranks_hold(kernels, task.from.mask, task.from.ranks, c) &&
           ranks_hold(kernels, task.to.mask, task.to.ranks, c);
  });
  for_each_chunk(tasks, chunks, num_threads, [&](const RepackTask& task, const Chunk& c, int64_t) {
    const RepackBuffers& own = buffers[static_cast<size_t>(omp_get_thread_num())];
    if (task.value_bytes == 4) {
      repack_chunk<uint32_t>(kernels.float32.state, task, c, own);
    } else {
      repack_chunk<uint64_t>(kernels.float64.state, task, c, own);
    }
  });
}

std::vector<int64_t> ranks_of(const uint8_t* mask, int64_t n) {
  std::vector<int64_t> ranks{0};
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    ranks.push_back(ranks.back() + active_kernels().count_bits(mask + begin / 8, std::min(kChunk, n - begin)));
  }
  return ranks;
}

}  // namespace gmp::cpu
