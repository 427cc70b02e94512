#include "simt.h"

#include <omp.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <thread>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the registers that a call must preserve on the running stack, and continues on another stack where it stopped.
extern "C" void simt_switch(void** from, void* to);
asm(R"(
.text
.globl simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");

__thread uint4 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {
namespace {

constexpr size_t kStackBytes = 256 << 10;

std::atomic<uint64_t> global_seed{0};
std::mutex traffic_mutex;
std::map<std::string, std::array<int64_t, 3>> traffic;

// Sectors that a block has accessed: mostly in order, and many of them several times.
thread_local std::vector<uint64_t> sectors_loaded, sectors_stored;
constexpr uint64_t kSectorBytes = 32;

void add_sectors(std::vector<uint64_t>& sectors, const void* address, int64_t bytes) {
  if (bytes <= 0) return;
  const uint64_t first = reinterpret_cast<uint64_t>(address);
  const uint64_t last = (first + static_cast<uint64_t>(bytes) - 1) / kSectorBytes;
  for (uint64_t s = first / kSectorBytes; s <= last; ++s) {
    if (sectors.empty() || sectors.back() != s) sectors.push_back(s);
  }
}

int64_t take_bytes(std::vector<uint64_t>& sectors) {
  std::sort(sectors.begin(), sectors.end());
  const auto end = std::unique(sectors.begin(), sectors.end());
  const int64_t bytes = (end - sectors.begin()) * static_cast<int64_t>(kSectorBytes);
  sectors.clear();
  return bytes;
}

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* sp = nullptr;
  bool done = true;
  const uint64_t* awaited = nullptr;  // runs again once this is no longer `seen`
  uint64_t seen = 0;
};

struct Warp {
  uint64_t values[2][kWarp];
  int arrived = 0;
  uint64_t generation = 0;
};

// One block at a time, on one host thread.
class Block {
 public:
  void run(unsigned index, unsigned grid, unsigned size, const std::function<void()>& body, uint64_t seed) {
    random_.seed(seed + index * 0x9e3779b97f4a7c15ull);
    shuffled_ = seed != 0;
    body_ = &body;
    fibers_.resize(std::max<size_t>(fibers_.size(), size));
    warps_.assign(size / kWarp, Warp{});
    order_.resize(size);
    std::iota(order_.begin(), order_.end(), 0u);
    arrived_ = 0;
    running_ = size;
    blockIdx = {index, 0, 0, 0};
    gridDim = {grid, 0, 0, 0};
    blockDim = {size, 0, 0, 0};
    for (unsigned t = 0; t < size; ++t) start(fibers_[t]);
    // If shuffled, one warp at a time stays behind until the others cannot go on; they may be a barrier ahead.
    const unsigned num_warps = size / kWarp;
    unsigned behind = num_warps;
    while (running_ > 0) {
      if (shuffled_) {
        std::shuffle(order_.begin(), order_.end(), random_);
        if (random_() % 16 == 0) behind = static_cast<unsigned>(random_() % (num_warps + 1));
      }
      bool progress = false, held = false;
      for (unsigned t : order_) {
        Fiber& fiber = fibers_[t];
        if (fiber.done || (fiber.awaited != nullptr && *fiber.awaited == fiber.seen)) continue;
        if (t / kWarp == behind) {
          held = true;
          continue;
        }
        fiber.awaited = nullptr;
        progress = true;
        resume(t);
      }
      if (!progress && held) {
        behind = num_warps;
        // Give the blocks of other host threads time to get ahead of that warp.
        if (random_() % 8 == 0) std::this_thread::sleep_for(std::chrono::microseconds(100));
      } else if (!progress) {
        throw std::runtime_error("a block cannot go on: some of its threads wait where the others never come");
      }
    }
  }

  void barrier() {
    const uint64_t generation = generation_;
    if (++arrived_ == running_) {
      arrived_ = 0;
      ++generation_;
      return;
    }
    wait(generation_, generation);
  }

  const uint64_t* exchange(uint64_t value) {
    Warp& warp = warps_[threadIdx.x / kWarp];
    const uint64_t generation = warp.generation;
    // There are two sets of values, because lanes may bring the next ones while others still read these.
    warp.values[generation & 1][threadIdx.x % kWarp] = value;
    if (++warp.arrived == kWarp) {
      warp.arrived = 0;
      ++warp.generation;
    } else {
      wait(warp.generation, generation);
    }
    return warp.values[generation & 1];
  }

  void interruption() {
    if (shuffled_ && random_() % 16 == 0) yield();
  }

 private:
  static void enter();

  void start(Fiber& fiber) {
    fiber.done = false;
    fiber.awaited = nullptr;
    // The stack holds six registers and the return address; a function expects it 8 bytes off a multiple of 16.
    void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(fiber.stack.get()) + kStackBytes) & ~15ull);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&Block::enter);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fiber.sp = top;
  }

  void resume(unsigned t) {
    running_fiber_ = t;
    threadIdx = {t, 0, 0, 0};
    switch_stacks(&host_sp_, fibers_[t].sp, fibers_[t].stack.get(), kStackBytes, &host_fake_stack_);
  }

  void yield() {
    const unsigned t = threadIdx.x;
    Fiber& fiber = fibers_[t];
    void* fake_stack = nullptr;
    switch_stacks(&fiber.sp, host_sp_, host_stack_, host_stack_bytes_, fiber.done ? nullptr : &fake_stack);
    threadIdx = {t, 0, 0, 0};
  }

  void wait(const uint64_t& generation, uint64_t seen) {
    Fiber& fiber = fibers_[threadIdx.x];
    fiber.awaited = &generation;
    fiber.seen = seen;
    yield();
  }

  // The address sanitizer must know which stack is in use.
  void switch_stacks(void** from, void* to, [[maybe_unused]] const void* stack, [[maybe_unused]] size_t bytes,
                     [[maybe_unused]] void** fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
    simt_switch(from, to);
    __sanitizer_finish_switch_fiber(fake_stack == nullptr ? nullptr : *fake_stack, nullptr, nullptr);
#else
    simt_switch(from, to);
#endif
  }

  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<unsigned> order_;
  const std::function<void()>* body_ = nullptr;
  std::mt19937_64 random_;
  bool shuffled_ = false;
  unsigned arrived_ = 0, running_ = 0, running_fiber_ = 0;
  uint64_t generation_ = 0;
  void* host_sp_ = nullptr;
  void* host_fake_stack_ = nullptr;
  const void* host_stack_ = nullptr;
  size_t host_stack_bytes_ = 0;
};

thread_local Block block;

void Block::enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.host_stack_, &block.host_stack_bytes_);
#endif
  Block& self = block;
  (*self.body_)();
  Fiber& fiber = self.fibers_[threadIdx.x];
  fiber.done = true;
  --self.running_;
  // Threads at a barrier wait only for threads that have not ended.
  if (self.running_ > 0 && self.arrived_ == self.running_) {
    self.arrived_ = 0;
    ++self.generation_;
  }
  self.yield();
}

}  // namespace

void set_seed(uint64_t seed) { global_seed = seed; }

void barrier() { block.barrier(); }
const uint64_t* exchange(uint64_t value) { return block.exchange(value); }
void interruption() { block.interruption(); }
void count_load(const void* address, int64_t bytes) { add_sectors(sectors_loaded, address, bytes); }
void count_store(const void* address, int64_t bytes) { add_sectors(sectors_stored, address, bytes); }

void launch(const char* kernel, unsigned grid, unsigned size, const std::function<void()>& body) {
  if (size == 0 || size % kWarp != 0) throw std::invalid_argument("a block needs whole warps");
  const uint64_t seed = global_seed;
  std::vector<unsigned> blocks(grid);
  std::iota(blocks.begin(), blocks.end(), 0u);
  if (seed != 0) {
    std::mt19937_64 random(seed);
    std::shuffle(blocks.begin(), blocks.end(), random);
  }
  std::string error;
  int64_t loaded = 0, stored = 0;
  // If shuffled, blocks run at the same time as others wherever that is possible.
  const int num_threads = seed != 0 ? std::max(2, omp_get_max_threads()) : omp_get_max_threads();
#pragma omp parallel for schedule(dynamic, 1) reduction(+ : loaded, stored) num_threads(num_threads) if (grid > 1)
  for (unsigned i = 0; i < grid; ++i) {
    try {
      block.run(blocks[i], grid, size, body, seed);
    } catch (const std::exception& caught) {
#pragma omp critical(gmp_kernels_simt)
      error = caught.what();
    }
    loaded += take_bytes(sectors_loaded);
    stored += take_bytes(sectors_stored);
  }
  if (!error.empty()) throw std::runtime_error(std::string(kernel) + ": " + error);
  const std::lock_guard<std::mutex> lock(traffic_mutex);
  auto& [launches, bytes_loaded, bytes_stored] = traffic[kernel];
  ++launches;
  bytes_loaded += loaded;
  bytes_stored += stored;
}

std::vector<std::tuple<std::string, int64_t, int64_t, int64_t>> take_traffic() {
  const std::lock_guard<std::mutex> lock(traffic_mutex);
  std::vector<std::tuple<std::string, int64_t, int64_t, int64_t>> rows;
  for (const auto& [kernel, row] : traffic) rows.emplace_back(kernel, row[0], row[1], row[2]);
  traffic.clear();
  return rows;
}

}  // namespace simt
