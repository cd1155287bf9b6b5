// How the tensor cores multiply.
#pragma once

namespace mixed_attention::cuda::portable {

// kTf32x3 sums three MMAs of the limbs of the operands: as accurate as fp32.
enum class Arithmetic { kFloat16, kBFloat16, kTf32, kTf32x3 };

constexpr bool is_16_bit(Arithmetic arithmetic) {
  return arithmetic == Arithmetic::kFloat16 || arithmetic == Arithmetic::kBFloat16;
}

// As instantiations.txt calls them.
namespace arithmetic {

inline constexpr Arithmetic bf16 = Arithmetic::kBFloat16, fp16 = Arithmetic::kFloat16, fp32 = Arithmetic::kTf32x3,
                            tf32 = Arithmetic::kTf32;

}  // namespace arithmetic

}  // namespace mixed_attention::cuda::portable
