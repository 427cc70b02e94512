// Descriptions of tensors through the C exchange API of DLPack: one C call per tensor, where Python needs four calls.
// Source: DLPack 1.3, https://dmlc.github.io/dlpack/latest/c_api.html; the layouts are those of its ABI's version 1.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "order/dtypes.h"

namespace gmp::dlpack {

inline constexpr uint32_t kMajor = 1;

struct Tensor {
  void* data;
  int32_t device_type, device_id, num_dimensions;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  const int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct Exchange {
  uint32_t major, minor;
  const Exchange* older;
  const void *allocate, *take, *give;           // not needed here
  int (*describe)(void* object, Tensor* into);  // may be missing
};

// Returns the table whose version is known here and that can describe tensors, if there is one.
inline const Exchange* understood(const Exchange* table) {
  while (table != nullptr && table->major != kMajor) table = table->older;
  return table != nullptr && table->describe != nullptr ? table : nullptr;
}

inline int64_t numel_of(const Tensor& tensor) {
  return std::accumulate(tensor.shape, tensor.shape + tensor.num_dimensions, int64_t{1}, std::multiplies<>());
}

inline void* address_of(const Tensor& tensor) { return static_cast<char*>(tensor.data) + tensor.byte_offset; }

// Nothing for a dtype whose weights have no order here.
inline std::optional<DType> dtype_of(const Tensor& tensor) {
  constexpr uint8_t kFloat = 2, kBfloat = 4;
  if (tensor.type_lanes != 1) return std::nullopt;
  if (tensor.type_code == kBfloat && tensor.type_bits == 16) return DType::bfloat16;
  if (tensor.type_code != kFloat) return std::nullopt;
  switch (tensor.type_bits) {
    case 16:
      return DType::float16;
    case 32:
      return DType::float32;
    case 64:
      return DType::float64;
    default:
      return std::nullopt;
  }
}

// Whether a tensor is on the host, of this shape, and without gaps in row-major order; or else in that of
// channels_last, in which the second dimension comes last.
inline bool lies_on_host(const Tensor& tensor, const std::vector<int64_t>& shape, bool is_row_major) {
  constexpr int32_t kHost = 1;
  const auto num_dimensions = static_cast<size_t>(tensor.num_dimensions);
  if (tensor.device_type != kHost ||
      !std::equal(shape.begin(), shape.end(), tensor.shape, tensor.shape + num_dimensions))
    return false;
  int64_t expected = 1;
  const auto follows = [&](size_t d) {
    const bool is_next = shape[d] == 1 || tensor.strides[d] == expected;
    expected *= shape[d];
    return is_next;
  };
  if (!is_row_major && (num_dimensions < 2 || !follows(1))) return false;
  for (size_t d = num_dimensions; d-- > 0;) {
    if ((is_row_major || d != 1) && !follows(d)) return false;
  }
  return true;
}

// Returns whether strides and address of a tensor are known, which then are in `tensor`: the address is not null if
// there are elements. That of a tensor whose storage was freed is only its offset.
inline bool look_at(const Exchange& table, void* object, Tensor& tensor) {
  if (table.describe(object, &tensor) != 0 || tensor.strides == nullptr) return false;
  return tensor.data != nullptr || numel_of(tensor) == 0;
}

// Adds device, dtype, shape and strides of a tensor, and perhaps its address.
inline void describe(const Tensor& tensor, bool with_address, std::string& bytes) {
  const auto append = [&](const void* from, size_t size) { bytes.append(static_cast<const char*>(from), size); };
  const auto size = static_cast<size_t>(tensor.num_dimensions) * sizeof(int64_t);
  append(&tensor.device_type, offsetof(Tensor, shape) - offsetof(Tensor, device_type));
  append(tensor.shape, size);
  for (int d = 0; d < tensor.num_dimensions; ++d) {
    const int64_t stride = tensor.shape[d] == 1 ? 1 : tensor.strides[d];  // which reaches nothing where the size is 1
    append(&stride, sizeof(stride));
  }
  if (with_address) {
    append(&tensor.data, sizeof(tensor.data));
    append(&tensor.byte_offset, sizeof(tensor.byte_offset));
  }
}

}  // namespace gmp::dlpack
