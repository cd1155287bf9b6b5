// The log-sum-exp of a row over its keys, or over those of a split, before it is rounded to one number.
#pragma once

namespace mixed_attention::cuda {

// In base 2 it is scale_log2 * base + offset + sum_log2. One number would not tell splits of large scores apart. base:
// a raw score, or 0; offset: in units of log 2; sum_log2: of the sum relative to both, -inf where no visible key has a
// score above -inf.
struct RowLse {
  float base, offset, sum_log2;

  constexpr bool has_sum() const { return sum_log2 != -__builtin_inff(); }
};

}  // namespace mixed_attention::cuda
