// Two fp32 numbers as one or two fp16 ones each.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/ptx/convert.cuh"

namespace mixed_attention::cuda::hopper {

// The numbers rounded, and what they are missing rounded.
template <int kParts>
struct HalfPair {
  uint32_t parts[kParts];

  __device__ static HalfPair split(float a, float b) {
    HalfPair pair{ptx::pack<__half>(a, b)};
    if constexpr (kParts == 2) {
      const float2 rounded = __half22float2(reinterpret_cast<const __half2&>(pair.parts[0]));
      pair.parts[1] = ptx::pack<__half>(a - rounded.x, b - rounded.y);
    }
    return pair;
  }
};

}  // namespace mixed_attention::cuda::hopper
