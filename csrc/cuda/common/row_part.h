// The softmax of a row over its keys, or a part of them, beside the output.
#pragma once

namespace mixed_attention::cuda {

// The log-sum-exp in base 2 is scale_log2 * base + offset + sum_log2. In one number it would not tell parts of large
// scores apart. base: a raw score, or 0; offset: in units of log 2; sum_log2: of the sum relative to both, -inf where
// no visible key has a score above -inf.
struct RowPart {
  float base, offset, sum_log2;

  constexpr bool has_sum() const { return sum_log2 != -__builtin_inff(); }
};

}  // namespace mixed_attention::cuda
