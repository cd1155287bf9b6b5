// CUDA errors as exceptions that name the call and its place.
#pragma once

#include <cuda_runtime_api.h>

#include <source_location>
#include <stdexcept>
#include <string>

namespace mixed_attention::cuda {

inline void check(cudaError_t status, const char* call, std::source_location where = std::source_location::current()) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(call) + " failed with " + cudaGetErrorName(status) + " (" +
                           cudaGetErrorString(status) + ") at " + where.file_name() + ":" +
                           std::to_string(where.line()));
}

}  // namespace mixed_attention::cuda
