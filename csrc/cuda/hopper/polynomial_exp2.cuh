// 2^x by multiplications and additions, for the share of the weights that relieves the exponential unit.
#pragma once

#include "cuda/ptx/math.cuh"

namespace mixed_attention::cuda::hopper {

// 2^(scale * a - offset) to a relative 7.5e-5, a fiftieth of what bf16 keeps, for exponents that are clamped to +-125.
// NaN gives 2^125: more than any weight may be, so that whoever checks for overflow finds it.
struct PolynomialExp2 {
  static constexpr float kRange = 250.f;
  // Adding it rounds to an integer, which ends in the low bits.
  static constexpr float kRounding = 12582912.f + kRange / 2;  // 1.5 * 2^23, and what brings the exponent to [0, 250]

  float scale, offset;

  __device__ PolynomialExp2(float scale, float offset)
      : scale(scale * (-1 / kRange)), offset(fmaf(offset, 1 / kRange, 0.5f)) {}

  __device__ float operator()(float a) const {
    const float y = ptx::fma_saturated(a, scale, offset);  // exponent = kRange / 2 - kRange * y
    const float rounded = fmaf(y, -kRange, kRounding);
    const float x = fmaf(y, -kRange, kRounding - rounded);  // in [-0.5, 0.5], exact
    float power = fmaf(x, 0.0551716639f, 0.242611137f);
    power = fmaf(x, power, 0.693260988f);
    power = fmaf(x, power, 0.999928073f);
    return __int_as_float(__float_as_int(power) + (__float_as_int(rounded) << 23));
  }
};

}  // namespace mixed_attention::cuda::hopper
