// What p of a row of large scores is taken relative to in the backward.
#pragma once

namespace mixed_attention::cuda {

// A log-sum-exp in fp32 tells p up to a factor of about 1 + |lse| 2^-23. Rows of larger ones are given a
// reference instead: the largest score of their own, raw, and the logarithm of the sum of p relative to it. By as
// much as tensor cores may be off, `slack`, a score counts as the largest one, so that no p is above 1. Other rows
// have the score 0 and no slack at all, -inf.
struct RowReference {
  float score, slack, sum_log2;
};

}  // namespace mixed_attention::cuda
