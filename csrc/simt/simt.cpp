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

// One block at a time, on one host thread.
class Block {
 public:
  void run(unsigned index, unsigned grid, unsigned size, const std::function<void()>& body, uint64_t seed) {
    random_.seed(seed + index * 0x9e3779b97f4a7c15ull);
    shuffled_ = seed != 0;
    body_ = &body;
    while (stacks_.size() < size) stacks_.emplace_back(new char[kStackBytes]);
    stack_tops_.resize(size);
    waiting_.assign(size, false);
    for (auto& values : values_) values.resize(size);
    exchanges_.assign(size / kWarp, 0);
    exchanging_.assign(size / kWarp, 0);
    at_barrier_ = 0;
    order_.resize(size);
    std::iota(order_.begin(), order_.end(), 0u);
    running_ = size;
    blockIdx = {index, 0, 0, 0};
    gridDim = {grid, 0, 0, 0};
    blockDim = {size, 0, 0, 0};
    for (unsigned t = 0; t < size; ++t) start(t);
    // Shuffled, one warp at a time stays behind until the others can do no more: they may be a barrier ahead.
    const unsigned num_warps = size / kWarp;
    unsigned behind = num_warps;
    while (running_ > 0) {
      if (shuffled_) {
        std::shuffle(order_.begin(), order_.end(), random_);
        if (random_() % 16 == 0) behind = static_cast<unsigned>(random_() % (num_warps + 1));
      }
      bool progress = false, held = false;
      for (unsigned t : order_) {
        if (stack_tops_[t] == nullptr || waiting_[t]) continue;
        if (t / kWarp == behind) {
          held = true;
          continue;
        }
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
    ++at_barrier_;
    if (!open_barrier()) wait();
  }

  const uint64_t* exchange(uint64_t value) {
    const unsigned warp = threadIdx.x / kWarp, first = warp * kWarp;
    // Two sets of values: lanes may bring the next ones while others still read these.
    std::vector<uint64_t>& values = values_[exchanges_[warp] % 2];
    values[threadIdx.x] = value;
    if (++exchanging_[warp] == kWarp) {
      exchanging_[warp] = 0;
      ++exchanges_[warp];
      std::fill_n(waiting_.begin() + first, kWarp, false);
    } else {
      wait();
    }
    return values.data() + first;
  }

  void interruption() {
    if (shuffled_ && random_() % 16 == 0) yield();
  }

 private:
  static void enter();

  void start(unsigned t) {
    // Six registers and the address to return to; a function expects its stack 8 bytes off a multiple of 16.
    void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stacks_[t].get()) + kStackBytes) & ~15ull);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&Block::enter);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_tops_[t] = top;
  }

  void resume(unsigned t) {
    threadIdx = {t, 0, 0, 0};
    switch_stacks(&host_stack_top_, stack_tops_[t], stacks_[t].get(), kStackBytes, &host_fake_stack_);
  }

  void yield() {
    const unsigned t = threadIdx.x;
    void* fake_stack = nullptr;
    switch_stacks(&stack_tops_[t], host_stack_top_, host_stack_, host_stack_bytes_, &fake_stack);
    threadIdx = {t, 0, 0, 0};
  }

  void wait() {
    waiting_[threadIdx.x] = true;
    yield();
  }

  // Those who wait at a barrier wait for the living only.
  bool open_barrier() {
    if (at_barrier_ < running_) return false;
    at_barrier_ = 0;
    std::fill(waiting_.begin(), waiting_.end(), false);
    return true;
  }

  // The address sanitizer has to be told which stack is in use.
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

  // By thread. A stack's top is where it was left; nullptr: the thread has returned.
  std::vector<std::unique_ptr<char[]>> stacks_;
  std::vector<void*> stack_tops_;
  std::vector<char> waiting_;
  std::vector<uint64_t> values_[2];
  // By warp: how many exchanges are over, and how many lanes have come to the next one.
  std::vector<unsigned> exchanges_, exchanging_;
  unsigned at_barrier_ = 0, running_ = 0;
  std::vector<unsigned> order_;
  const std::function<void()>* body_ = nullptr;
  std::mt19937_64 random_;
  bool shuffled_ = false;
  void* host_stack_top_ = nullptr;
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
  --self.running_;
  self.open_barrier();
  self.stack_tops_[threadIdx.x] = nullptr;
  void* never = nullptr;  // where nobody goes on
  self.switch_stacks(&never, self.host_stack_top_, self.host_stack_, self.host_stack_bytes_, nullptr);
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
