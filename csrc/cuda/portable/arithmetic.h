// How the tensor cores multiply.
#pragma once

namespace mixed_attention::cuda::portable {

// kTf32x3 sums three MMAs of the limbs of the operands: as accurate as fp32.
enum class Arithmetic { kFloat16, kBFloat16, kTf32, kTf32x3 };

constexpr bool is_16_bit(Arithmetic arithmetic) {
  return arithmetic == Arithmetic::kFloat16 || arithmetic == Arithmetic::kBFloat16;
}

}  // namespace mixed_attention::cuda::portable
