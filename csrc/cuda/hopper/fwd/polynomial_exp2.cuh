// 2^x by multiplications and additions, for the share of p that relieves the exponential unit.
#pragma once

namespace mixed_attention::cuda::hopper {

// 2^(scale * a - offset), as exact as the exponential unit's, for exponents that are clamped to [-127, 125]: 16-bit p
// would do with less, but its sum goes into the log-sum-exp, which is fp32. NaN gives 2^125: more than any p may be, so
// that whoever checks for overflow finds it. The least one comes out as 2^-149, which in 16 bits is zero: the largest
// value times it is to be nothing.
struct PolynomialExp2 {
  static constexpr float kLeast = -127.f, kMost = 125.f;
  static constexpr float kRounding = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits

  float scale, offset;

  __device__ float operator()(float a) const {
    const float exponent = fmaxf(fminf(fmaf(a, scale, -offset), kMost), kLeast);
    const float rounded = exponent + kRounding;
    const float x = exponent - (rounded - kRounding);       // in [-0.5, 0.5], exact
    float power = fmaf(x, 0.00132764725f, 0.00967554096f);  // to a relative 7.5e-8, if not for fp32
    power = fmaf(x, power, 0.0555071309f);
    power = fmaf(x, power, 0.240221202f);
    power = fmaf(x, power, 0.693146944f);
    power = fmaf(x, power, 1.00000012f);
    return __int_as_float(__float_as_int(power) + (__float_as_int(rounded) << 23));
  }
};

}  // namespace mixed_attention::cuda::hopper
