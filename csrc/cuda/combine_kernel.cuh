// What is left of a forward whose walks over the keys were split: parts of the output, by their log-sum-exps.
#pragma once

#include <cstdint>

#include "cuda/ptx/dependent_grids.cuh"
#include "cuda/split_row.h"
#include "params.h"

namespace mixed_attention::cuda {

// One warp to a row. Rows::find gives the row of an index, if it exists; partial_out: (rows of all parts, head_dim_v),
// normalised; partial_lse: (rows of all parts), natural.
template <class Element, class Rows>
__global__ void attention_combine_kernel(const FwdParams params, const float* partial_out, const float* partial_lse,
                                         int num_splits, const __grid_constant__ Rows rows) {
  ptx::allow_next_grid();
  ptx::wait_for_grids_before();
  const SplitRow row = rows.find((static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32);
  if (!row.exists) return;
  const auto part = [&](int i) { return row.first_part + i * row.part_step; };
  const int lane = threadIdx.x % 32;
  float max = -INFINITY;
  for (int i = 0; i < num_splits; ++i) max = fmaxf(max, partial_lse[part(i)]);
  const float offset = max == -INFINITY ? 0.0f : max;
  float sum = 0;
  for (int i = 0; i < num_splits; ++i) sum += expf(partial_lse[part(i)] - offset);
  const float inverse = sum == 0 ? 0.0f : 1 / sum;

  const Strides& strides = params.out_strides;
  Element* out =
      static_cast<Element*>(params.out) + row.batch * strides.batch + row.head * strides.head + row.row * strides.row;
  for (int64_t col = lane; col < params.head_dim_v; col += 32) {
    float value = 0;
    for (int i = 0; i < num_splits; ++i) {
      const float weight = expf(partial_lse[part(i)] - offset) * inverse;
      value += weight * partial_out[part(i) * params.head_dim_v + col];
    }
    out[col] = Element(value);
  }
  float* lse = static_cast<float*>(params.lse) + (row.batch * params.num_heads + row.head) * params.seqlen_q + row.row;
  if (lane == 0) *lse = sum == 0 ? -INFINITY : offset + logf(sum);
}

}  // namespace mixed_attention::cuda
