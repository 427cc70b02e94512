// Descriptions of tensors through the C exchange API of DLPack: one C call per tensor, where Python needs four calls.
// Source: DLPack 1.3, https://dmlc.github.io/dlpack/latest/c_api.html; the layouts are those of its ABI's version 1.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>

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

inline bool is_empty(const Tensor& tensor) {
  return std::any_of(tensor.shape, tensor.shape + tensor.num_dimensions, [](int64_t size) { return size == 0; });
}

// Adds device, dtype, shape and strides of a tensor, and perhaps its address. Returns whether all of them are known,
// and the address is not null if there are elements. The address of a tensor whose storage was freed is only its
// offset.
inline bool describe(const Exchange& table, void* object, bool with_address, std::string& bytes) {
  Tensor tensor{};
  if (table.describe(object, &tensor) != 0 || tensor.strides == nullptr) return false;
  if (tensor.data == nullptr && !is_empty(tensor)) return false;
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
  return true;
}

}  // namespace gmp::dlpack
