// Combines the splits of the output of a forward whose walks over the keys were split, by their log-sum-exps.
#pragma once

#include <cstdint>

#include "cuda/common/log_sum_exp.cuh"
#include "cuda/common/row_lse.h"
#include "cuda/common/split_row.h"
#include "cuda/ptx/dependent_grids.cuh"
#include "params.h"

namespace mixed_attention::cuda {

// One warp to a row. Rows::find gives the row of an index, if it exists; partial_out: (rows of all splits, head_dim_v),
// normalised; row_lses: (rows of all splits).
template <class Element, class Rows>
__global__ void attention_combine_kernel(const FwdParams params, const float* partial_out, const RowLse* row_lses,
                                         int num_splits, const __grid_constant__ Rows rows) {
  ptx::allow_next_grid();
  ptx::wait_for_grids_before();
  const SplitRow row = rows.find((static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32);
  if (!row.exists) return;
  const auto place = [&](int i) { return row.first_split + i * row.split_step; };
  const int lane = threadIdx.x % 32;

  // The logarithm of a split's sum relative to another's.
  const auto log2_ratio = [&](const RowLse& a, const RowLse& b) {
    return fmaf(a.base - b.base, row.scale_log2, (a.offset - b.offset) + (a.sum_log2 - b.sum_log2));
  };
  RowLse largest{0, 0, -INFINITY};
  for (int i = 0; i < num_splits; ++i) {
    const RowLse split = row_lses[place(i)];
    if (split.has_sum() && !(largest.has_sum() && log2_ratio(split, largest) <= 0)) largest = split;
  }
  const auto weight = [&](int i) {
    const RowLse split = row_lses[place(i)];
    return split.has_sum() ? exp2f(log2_ratio(split, largest)) : 0.0f;
  };
  float sum = 0;
  for (int i = 0; i < num_splits; ++i) sum += weight(i);
  const float inverse = largest.has_sum() ? 1 / sum : 0;  // else there are no keys, or all scores are -inf

  const Strides& strides = params.out_strides;
  Element* out =
      static_cast<Element*>(params.out) + row.batch * strides.batch + row.head * strides.head + row.row * strides.row;
  for (int64_t col = lane; col < params.head_dim_v; col += 32) {
    float value = 0;
    for (int i = 0; i < num_splits; ++i) {
      value += weight(i) * inverse * partial_out[place(i) * params.head_dim_v + col];
    }
    out[col] = Element(value);
  }
  float* lse = static_cast<float*>(params.lse) + (row.batch * params.num_heads + row.head) * params.seqlen_q + row.row;
  if (largest.has_sum()) largest.sum_log2 += log2f(sum);
  if (lane == 0) *lse = log_sum_exp(largest, row.scale);
}

}  // namespace mixed_attention::cuda
