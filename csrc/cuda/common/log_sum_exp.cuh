// The log-sum-exp of a row as it leaves.
#pragma once

#include "cuda/common/row_lse.h"

namespace mixed_attention::cuda {

constexpr float kLn2 = 0.69314718055994530942f;

// Natural; scale: of the row's raw scores, positive.
__device__ inline float log_sum_exp(const RowLse& row, float scale) {
  if (!row.has_sum()) return -INFINITY;
  return fmaf(row.base, scale, kLn2 * (row.offset + row.sum_log2));
}

}  // namespace mixed_attention::cuda
