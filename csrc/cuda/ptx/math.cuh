// Single instructions on fp32.
#pragma once

namespace mixed_attention::cuda::ptx {

// 2^x to about 2 ulp; exp2f without its steps around denormal results, which are zero here.
__device__ inline float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace mixed_attention::cuda::ptx
