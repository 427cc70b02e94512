// One row per dtype; adding a dtype is adding a row: GMP_DTYPE(name, key type, bits of +Inf).
#pragma once

#include <cstdint>

#define GMP_DTYPES(GMP_DTYPE)                         \
  GMP_DTYPE(float32, uint32_t, 0x7f800000u)           \
  GMP_DTYPE(float64, uint64_t, 0x7ff0000000000000ull) \
  GMP_DTYPE(float16, uint16_t, 0x7c00u)               \
  GMP_DTYPE(bfloat16, uint16_t, 0x7f80u)

namespace gmp {

enum class DType : int {
#define GMP_DTYPE(name, key, infinity) name,
  GMP_DTYPES(GMP_DTYPE)
#undef GMP_DTYPE
};

// Calls visit(+Inf as a key of the dtype) and returns what it does.
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

}  // namespace gmp
