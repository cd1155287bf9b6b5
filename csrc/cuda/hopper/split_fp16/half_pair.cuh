// Two fp32 numbers as one or two fp16 ones each.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/ptx/convert.cuh"

namespace mixed_attention::cuda::hopper {

// The numbers rounded, and what they are missing rounded.
template <int kLimbs>
struct HalfPair {
  uint32_t limbs[kLimbs];

  __device__ static HalfPair split(float a, float b) {
    HalfPair pair{ptx::pack<__half>(a, b)};
    if constexpr (kLimbs == 2) {
      const float2 rounded = __half22float2(reinterpret_cast<const __half2&>(pair.limbs[0]));
      pair.limbs[1] = ptx::pack<__half>(a - rounded.x, b - rounded.y);
    }
    return pair;
  }
};

}  // namespace mixed_attention::cuda::hopper
