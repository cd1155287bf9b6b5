#include "cuda/common/check.h"

#include <stdexcept>
#include <string>

namespace mixed_attention::cuda {

void throw_error(cudaError_t status, const char* call, const std::source_location& where) {
  throw std::runtime_error(std::string(call) + " failed with " + cudaGetErrorName(status) + " (" +
                           cudaGetErrorString(status) + ") at " + where.file_name() + ":" +
                           std::to_string(where.line()));
}

}  // namespace mixed_attention::cuda
