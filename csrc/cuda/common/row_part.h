// What a row's keys, or a part of them, come to beside their output.
#pragma once

namespace mixed_attention::cuda {

// The log-sum-exp in base 2 is scale_log2 * base + sum_log2. In one number it would not tell parts of large scores
// apart. Where no visible key has a score above -inf, sum_log2 is -inf.
struct RowPart {
  float base, sum_log2;

  constexpr bool has_sum() const { return sum_log2 != -__builtin_inff(); }
};

}  // namespace mixed_attention::cuda
