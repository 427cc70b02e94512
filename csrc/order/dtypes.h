// One row per dtype: GMP_DTYPE(name, key type, bits of +Inf). A new dtype takes a new row. If it is neither float nor
// double, optimizers also need its conversions to float, in cpu/update_impl.h and cuda/formats.cuh.
#pragma once

#include <cstdint>
#include <type_traits>

#define GMP_DTYPES(GMP_DTYPE)                         \
  GMP_DTYPE(float32, uint32_t, 0x7f800000u)           \
  GMP_DTYPE(float64, uint64_t, 0x7ff0000000000000ull) \
  GMP_DTYPE(float16, uint16_t, 0x7c00u)               \
  GMP_DTYPE(bfloat16, uint16_t, 0x7f80u)

// Their key types.
#define GMP_KEYS(GMP_KEY) GMP_KEY(uint16_t) GMP_KEY(uint32_t) GMP_KEY(uint64_t)

namespace gmp {

enum class DType : int {
#define GMP_DTYPE(name, key, infinity) name,
  GMP_DTYPES(GMP_DTYPE)
#undef GMP_DTYPE
};
#define GMP_DTYPE(name, key, infinity) +1
inline constexpr int kNumDTypes = GMP_DTYPES(GMP_DTYPE);
#undef GMP_DTYPE

// The key of +Inf, for a dtype known to the compiler.
template <DType kDType>
constexpr auto infinity_of() {
#define GMP_DTYPE(name, Key, infinity) \
  if constexpr (kDType == DType::name) return Key{infinity};
  GMP_DTYPES(GMP_DTYPE)
#undef GMP_DTYPE
}

// The bits of a weight, and the type in which optimizers compute with it.
template <DType kDType>
using KeyOf = decltype(infinity_of<kDType>());
template <DType kDType>
using ComputeOf = std::conditional_t<sizeof(KeyOf<kDType>) == 8, double, float>;
// That type as a dtype: that of optimizers' state, unless it is kept in bfloat16.
template <DType kDType>
inline constexpr DType kComputeDType = sizeof(KeyOf<kDType>) == 8 ? DType::float64 : DType::float32;

// Calls visit(key of +Inf) for the dtype and returns its result.
template <typename Visit>
auto with_dtype(DType dtype, Visit visit) {
  switch (dtype) {
#define GMP_DTYPE(name, Key, infinity) \
  case DType::name:                    \
    return visit(Key{infinity});
    GMP_DTYPES(GMP_DTYPE)
#undef GMP_DTYPE
  }
  __builtin_unreachable();
}

// Bytes of a weight.
inline int64_t bytes_of(DType dtype) {
  return with_dtype(dtype, [](auto infinity) { return int64_t{sizeof(infinity)}; });
}

}  // namespace gmp
