// Two fp32 numbers as two fp16 ones each.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/ptx/convert.cuh"

namespace mixed_attention::cuda::hopper {

// The numbers rounded, and what they are missing rounded.
struct HalfPair {
  uint32_t high, low;

  __device__ static HalfPair split(float a, float b) {
    const uint32_t high = ptx::pack<__half>(a, b);
    const float2 rounded = __half22float2(reinterpret_cast<const __half2&>(high));
    return {high, ptx::pack<__half>(a - rounded.x, b - rounded.y)};
  }
};

}  // namespace mixed_attention::cuda::hopper
