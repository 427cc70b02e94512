// Tensors as Python passes them to C++: addresses, each with a size that is checked.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace gmp::arrays {

// Address and number of elements of a tensor; 0 and 0 for none.
using Array = std::pair<uintptr_t, int64_t>;

template <typename T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Only errors that could corrupt memory are checked again here; Python has reported all others.
template <typename T = void>
T* checked(const Array& array, int64_t expected, const char* what) {
  if (array.first == 0 || array.second != expected) {
    throw std::invalid_argument("expected " + std::to_string(expected) + " elements of " + what + ", got " +
                                std::to_string(array.first == 0 ? 0 : array.second));
  }
  return pointer<T>(array.first);
}

// Returns nullptr for no tensor.
template <typename T = void>
T* optional(const Array& array, int64_t expected, const char* what) {
  return array.first == 0 && array.second == 0 ? nullptr : checked<T>(array, expected, what);
}

inline void check_threads(int num_threads) {
  if (num_threads < 1) throw std::invalid_argument("expected at least one thread, got " + std::to_string(num_threads));
}

inline int64_t bytes_of_bits(int64_t n) { return (n + 7) / 8; }

}  // namespace gmp::arrays
