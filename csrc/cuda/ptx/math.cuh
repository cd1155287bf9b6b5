// Single instructions on fp32.
#pragma once

namespace mixed_attention::cuda::ptx {

// 2^x to about 2 ulp; exp2f without its steps around denormal results, which are zero here.
__device__ inline float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// a * b + c, clamped to [0, 1]; 0 for NaN.
__device__ inline float fma_saturated(float a, float b, float c) {
  float d;
  asm("fma.rn.ftz.sat.f32 %0, %1, %2, %3;\n" : "=f"(d) : "f"(a), "f"(b), "f"(c));
  return d;
}

}  // namespace mixed_attention::cuda::ptx
