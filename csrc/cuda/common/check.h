// CUDA errors as exceptions that name the call and its place.
#pragma once

#include <cuda_runtime_api.h>

#include <source_location>

namespace mixed_attention::cuda {

// Throws std::runtime_error. It stands apart, as every file of kernels would have to read <string> for it.
[[noreturn]] void throw_error(cudaError_t status, const char* call, const std::source_location& where);

inline void check(cudaError_t status, const char* call, std::source_location where = std::source_location::current()) {
  if (status != cudaSuccess) throw_error(status, call, where);
}

}  // namespace mixed_attention::cuda
