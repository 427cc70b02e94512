// Prints a digest of what every kernel of one instruction set writes for pseudo-random weights: equal digests on all
// instruction sets and processors, those that an emulator runs included, mean equal bits.
//
// Compile it with the file of one instruction set, and with GMP_TESTED defined as the variable in that file.
//
// NaNs are left out, because their bits after arithmetic are the processor's choice.
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cpu/kernels.h"

using namespace gmp;
using namespace gmp::cpu;

namespace {

uint64_t state = 1, digest = 0xcbf29ce484222325ull;

uint64_t next() {  // xorshift64*
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return state * 0x2545f4914f6cdd1dull;
}

void add(const void* values, size_t size) {  // FNV-1a
  for (size_t i = 0; i < size; ++i) digest = (digest ^ static_cast<const uint8_t*>(values)[i]) * 0x100000001b3ull;
}

template <typename T>
void add(const T& value) {
  add(&value, sizeof(value));
}

// Bytes with guards around them, which are part of the digest.
struct Buffer {
  explicit Buffer(int64_t size) : bytes(static_cast<size_t>(size) + 2 * kGatherSlackBytes, 0x5a) {}
  void* at() { return bytes.data() + kGatherSlackBytes; }
  void digest(int64_t size) { add(bytes.data(), static_cast<size_t>(size) + kGatherSlackBytes); }
  std::vector<uint8_t> bytes;
};

// Magnitudes from 2^-6 to 2^2, so that no rule overflows, with ties and zeros; every 16th is subnormal.
void fill(DType dtype, Buffer& buffer, int64_t n, bool is_positive) {
  with_dtype(dtype, [&](auto infinity) {
    using Key = decltype(infinity);
    constexpr int kBits = 8 * sizeof(Key);
    int mantissa = 0;
    while (!(infinity >> mantissa & 1)) ++mantissa;
    const int exponents = kBits - 1 - mantissa;
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t random = next();
      const uint64_t exponent = random % 16 == 0 ? 0 : (uint64_t{1} << (exponents - 1)) - 7 + random / 16 % 8;
      uint64_t fraction = next() & ((uint64_t{1} << mantissa) - 1);
      if (random / 256 % 4 == 0) fraction = fraction >> (mantissa - 2) << (mantissa - 2);
      const uint64_t sign = is_positive ? 0 : random >> 63;
      const Key key = static_cast<Key>(sign << (kBits - 1) | exponent << mantissa | fraction);
      std::memcpy(static_cast<char*>(buffer.at()) + i * static_cast<int64_t>(sizeof(Key)), &key, sizeof(Key));
    }
  });
}

struct Mask {
  Mask(int64_t n, int one_in) : bits(static_cast<size_t>(n + 7) / 8 + 64), offsets{0} {
    for (int64_t i = 0; i < n; ++i) {
      if (next() % static_cast<uint64_t>(one_in) == 0) {
        bits[static_cast<size_t>(i / 8)] |= static_cast<uint8_t>(1 << i % 8);
        ++kept;
      }
      if ((i + 1) % kChunk == 0 || i + 1 == n) offsets.push_back(kept);
    }
  }
  std::vector<uint8_t> bits;
  std::vector<int64_t> offsets;
  int64_t kept = 0;
};

void select(const Kernels& kernels, DType dtype, int64_t n, Mask* mask) {
  const int64_t size = bytes_of(dtype);
  Buffer weights(n * size), gathered(n * size);
  fill(dtype, weights, n, false);
  LayerView layer{dtype, weights.at(), n, mask == nullptr ? nullptr : mask->bits.data()};
  uint64_t some = 0;
  std::memcpy(&some, static_cast<char*>(weights.at()) + n / 2 * size, static_cast<size_t>(size));
  some &= (uint64_t{1} << (8 * size - 1)) - 1;
  for (const Bracket& bracket : {Bracket{some, some}, Bracket{some / 2, some}}) {
    for (void* into : {static_cast<void*>(nullptr), gathered.at()}) {
      const BracketCounts counts = kernels.scan(layer, 0, n, bracket, into);
      for (int64_t count : {counts.below, counts.inside, counts.pruned}) add(count);
      if (into != nullptr) add(into, static_cast<size_t>(counts.inside * size));
    }
  }
  std::vector<uint16_t> places(static_cast<size_t>(std::min(n, kChunk)));
  add(places.data(), static_cast<size_t>(kernels.find(layer, 0, std::min(n, kChunk), some, places.data())) * 2);
  if (mask != nullptr) {
    add(kernels.count_bits(layer.mask, n));
    Buffer packed(n * size + kGatherSlackBytes), spread(n * size);
    const int64_t count = kernels.pack(layer.weights, layer.mask, n, packed.at());
    add(packed.at(), static_cast<size_t>(count * size));
    kernels.unpack(packed.at(), layer.mask, n, spread.at());
    spread.digest(n * size);
  }
  add(kernels.sum_squares(layer, 0, n));
  Buffer kept((n + 7) / 8);
  int64_t before = 0;
  add(kernels.apply(layer, 0, n, static_cast<uint8_t*>(kept.at()), some, n / 3, before));
  add(before);
  weights.digest(n * size);
  kept.digest((n + 7) / 8);
}

void rank(const Kernels& kernels, DType dtype, int64_t n, Mask* mask) {
  const int64_t size = bytes_of(dtype);
  constexpr Pattern kPatterns[] = {{kGroups, 1, 2, 1}, {kGroups, 2, 4, 1},  {kGroups, 4, 8, 1}, {kGroups, 3, 5, 1},
                                   {kGroups, 2, 4, 9}, {kGroups, 3, 64, 1}, {kBlocks, 2, 4, 40}};
  for (const Pattern& pattern : kPatterns) {
    const int64_t whole = pattern.kind == kBlocks ? pattern.rows() * pattern.width() : pattern.of() * pattern.stride();
    const int64_t num_weights = n / whole * whole;
    if (num_weights == 0) continue;
    Buffer weights(num_weights * size), bits((num_weights + 7) / 8), sums(num_weights * 8);
    fill(dtype, weights, num_weights, false);
    LayerView layer{dtype, weights.at(), num_weights, mask == nullptr ? nullptr : mask->bits.data()};
    layer.ranking.pattern = pattern;
    uint8_t* const found = static_cast<uint8_t*>(bits.at());
    if (pattern.kind == kBlocks) {
      const int64_t blocks = num_weights / (pattern.rows() * pattern.cols());
      kernels.score(layer, 0, blocks, sums.at(), found);
      add(sums.at(), static_cast<size_t>(blocks) * (size == 8 ? 8 : 4));
      if (mask != nullptr) add(found, static_cast<size_t>(blocks + 7) / 8);
      continue;
    }
    add(kernels.protect(layer, found));
    bits.digest((num_weights + 7) / 8);
    if (pattern.of() != 4 || pattern.stride() != 1) continue;
    const BracketCounts counts = kernels.scan(layer, 0, num_weights, {1, uint64_t{1} << (8 * size - 3)}, sums.at());
    for (int64_t count : {counts.below, counts.inside, counts.pruned}) add(count);
    add(sums.at(), static_cast<size_t>(counts.inside * size));
    int64_t before = 0;
    add(kernels.apply(layer, 0, num_weights, found, uint64_t{1} << (8 * size - 3), num_weights / 3, before));
    add(before);
    weights.digest(num_weights * size);
    bits.digest((num_weights + 7) / 8);
  }
}

void step(const Kernels& kernels, DType dtype, DType state_dtype, int64_t n, Mask* mask, Rule rule, int num_states,
          bool has_master, bool is_compact, const UpdateConstants<double>& constants) {
  const int64_t size = bytes_of(dtype), wide = size == 8 ? 8 : 4, of_state = bytes_of(state_dtype);
  const int64_t values = is_compact ? mask->kept : n;
  Buffer weights(n * size), grads(n * size), master(n * wide), first(values * of_state), second(values * of_state),
      third(values * of_state);
  Buffer* const states[] = {&first, &second, &third};
  fill(dtype, weights, n, false);
  fill(dtype, grads, n, false);
  fill(DType::float32, master, has_master ? n : 0, false);
  for (Buffer* s : states) fill(state_dtype, *s, values, s != &first);
  UpdateTensor t{};
  t.dtype = dtype;
  t.weights = weights.at();
  t.grads = grads.at();
  t.n = n;
  t.mask = mask == nullptr ? nullptr : mask->bits.data();
  t.master = has_master ? master.at() : nullptr;
  t.num_states = num_states;
  t.state_dtype = state_dtype;
  for (int k = 0; k < num_states; ++k) t.state[k] = states[k]->at();
  t.chunk_offsets = is_compact ? mask->offsets.data() : nullptr;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    kernels.update[static_cast<int>(rule)](t, begin, begin + kChunk < n ? begin + kChunk : n, constants);
  }
  weights.digest(n * size);
  if (has_master) master.digest(n * wide);
  for (int k = 0; k < num_states; ++k) states[k]->digest(values * of_state);
}

void steps(const Kernels& kernels, DType dtype, int64_t n, Mask* mask) {
  const DType wide = bytes_of(dtype) == 8 ? DType::float64 : DType::float32;
  UpdateConstants<double> plain{}, all{};
  plain.grad_factor = plain.decay = plain.one_minus_dampening = 1;
  plain.lr = plain.step_size = 0.01;
  plain.momentum = 0.9;
  plain.one_minus_beta1 = 0.1;
  plain.beta2 = 0.99;
  plain.one_minus_beta2 = 0.01;
  plain.bias_correction2_sqrt = 0.3;
  plain.eps = 1e-8;
  all = plain;
  all.grad_factor = 0.5;
  all.decay = 0.999;
  all.weight_decay = 0.01;
  all.nesterov = 1;
  all.one_minus_beta1 = 0.75;
  all.rounding_seed = 16'777'215;
  UpdateConstants<double> coupled = plain, first = plain;
  coupled.weight_decay = 0.01;
  first.first_step = 1;
  for (const auto& constants : {plain, all, coupled, first}) {
    for (int rule = 0; rule < kNumRules; ++rule) {
      for (int k = kNumStates[rule][0]; k <= kNumStates[rule][1]; ++k) {
        for (bool has_master : {false, true}) {
          if (has_master && bytes_of(dtype) != 2) continue;
          for (bool is_compact : {false, true}) {
            if (is_compact && mask == nullptr) continue;
            step(kernels, dtype, wide, n, mask, static_cast<Rule>(rule), k, has_master, is_compact, constants);
            if (k == 0 || wide == DType::float64) continue;
            step(kernels, dtype, DType::bfloat16, n, mask, static_cast<Rule>(rule), k, has_master, is_compact,
                 constants);
          }
        }
      }
    }
  }
}

}  // namespace

int main() {
  const KernelSet& set = gmp::cpu::GMP_TESTED;
  for (int d = 0; d < kNumDTypes; ++d) {
    const DType dtype = static_cast<DType>(d);
    for (int64_t n : {1, 7, 8, 9, 31, 64, 65, 1000, 4103, 16384 + 77}) {
      for (int one_in : {0, 1, 2, 20, 100}) {
        Mask mask(n, one_in == 0 ? 1 : one_in);
        select(set[static_cast<size_t>(d)], dtype, n, one_in == 0 ? nullptr : &mask);
        rank(set[static_cast<size_t>(d)], dtype, n, one_in == 0 ? nullptr : &mask);
        steps(set[static_cast<size_t>(d)], dtype, n, one_in == 0 ? nullptr : &mask);
      }
    }
  }
  std::printf("%s %016" PRIx64 "\n", set.front().name, digest);
}
