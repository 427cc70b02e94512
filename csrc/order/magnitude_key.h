// The order of magnitudes, shared by every kernel.
//
// The key of a weight is its bit pattern without the sign, read as an unsigned integer: for IEEE formats that integer
// grows exactly with |w|, so -0 equals +0, subnormals are distinct, and no compare depends on flush-to-zero modes.
// Every NaN gets the one key right above Inf: payloads differ between machines, and ties are settled by index.
//
// Among weights whose key equals the threshold, those of lowest flat index are kept. Weights whose mask bit is 0 are
// pruned already: they come before every key and are counted, never compared.
#pragma once

namespace gmp {

// Key: uint16_t, uint32_t or uint64_t. `infinity` is the bit pattern of +Inf (it tells float16 from bfloat16).
template <typename Key>
inline constexpr Key kSignBit = static_cast<Key>(Key{1} << (sizeof(Key) * 8 - 1));

// always_inline: each instruction set's translation unit must get its own copy (see cpu/kernels_impl.h).
template <typename Key>
__attribute__((always_inline)) constexpr Key magnitude_key(Key bits, Key infinity) {
  const Key key = static_cast<Key>(bits & static_cast<Key>(~kSignBit<Key>));
  const Key nan = static_cast<Key>(infinity + 1);
  return key < nan ? key : nan;
}

}  // namespace gmp
