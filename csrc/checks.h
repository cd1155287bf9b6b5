// Checks whose messages name the argument, what was expected and what was got.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>

namespace mixed_attention {

inline void check_rank(const char* name, const at::Tensor& tensor, int64_t rank, const char* shape) {
  TORCH_CHECK_VALUE(tensor.dim() == rank, name, ": expected shape ", shape, ", got ", tensor.sizes());
}

inline void check_shape(const char* name, const at::Tensor& tensor, at::IntArrayRef expected, const char* why) {
  TORCH_CHECK_VALUE(tensor.sizes() == expected, name, ": expected shape ", expected, " ", why, ", got ",
                    tensor.sizes());
}

inline void check_dtype(const char* name, const at::Tensor& tensor, at::ScalarType expected, const char* why) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == expected, name, ": expected dtype ", expected, " ", why, ", got ",
                    tensor.scalar_type());
}

inline void check_device(const char* name, const at::Tensor& tensor, at::Device expected) {
  TORCH_CHECK_VALUE(tensor.device() == expected, name, ": expected device ", expected, " like q, got ",
                    tensor.device());
}

}  // namespace mixed_attention
