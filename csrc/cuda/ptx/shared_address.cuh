// Addresses as instructions on shared memory take them.
#pragma once

#include <cstdint>

namespace mixed_attention::cuda::ptx {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace mixed_attention::cuda::ptx
