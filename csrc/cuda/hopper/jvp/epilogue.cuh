// Results of a finished item: what sums come to, and how that leaves.
#pragma once

#include <cstdint>

#include "cuda/common/log_sum_exp.cuh"
#include "cuda/hopper/fwd/mma.cuh"
#include "cuda/hopper/fwd/overflow.cuh"
#include "cuda/hopper/fwd/softmax.cuh"
#include "cuda/hopper/jvp/config.h"
#include "cuda/hopper/jvp/params.h"
#include "cuda/hopper/jvp/softmax.cuh"
#include "cuda/hopper/plan/work_items.cuh"
#include "cuda/hopper/tile/fragment_values.cuh"
#include "cuda/hopper/tile/store_rows.cuh"

namespace mixed_attention::cuda::hopper {

// The factors of a thread's finished rows, 0 of rows without a weight.
__device__ inline RowNumbers inverse_of_rows(const OnlineSoftmax& softmax) {
  RowNumbers inverse;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    inverse.of_row[row] = softmax.row_sum[row] == 0 ? 0 : __fdividef(1, softmax.row_sum[row]);
  }
  return inverse;
}

// Makes the tangent of the output of its sums, beside the finished output; zeros in rows without a weight. Returns the
// tangents of log-sum-exps.
template <int kCount>
__device__ inline RowNumbers finish_tangent(float (&out_dot)[kCount], const float (&out)[kCount],
                                            const RowNumbers& inverse, const TangentSums& tangents) {
  float shift[2];
  RowNumbers lse_dot;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const float sum = quad_sum(tangents.sum[row]), factor = inverse.of_row[row];
    shift[row] = factor == 0 ? 0 : sum * factor;
    lse_dot.of_row[row] = factor == 0 ? 0 : shift[row] + tangents.mean[row];
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int row = row_of(i);
    out_dot[i] = inverse[i] == 0 ? 0 : fmaf(out_dot[i], inverse[i], -shift[row] * out[i]);
  }
  return lse_dot;
}

// The first of a thread's two rows of a tile, in a tensor of outputs; row: among all of its head.
template <typename Element>
__device__ inline Element* row_of_output(void* data, const Strides& strides, const ItemRows& tile, int row) {
  return static_cast<Element*>(data) + tile.batch * strides.batch + tile.head * strides.head + row * strides.row;
}

// Writes this warp's 16 rows of a tile, those that exist. Sums become results.
template <typename Config>
__device__ inline void store_tangents(const JvpKernelParams& params, JvpSharedStorage<Config>& shared,
                                      const ItemRows& tile, int first_row, float (&out)[Config::kHeadDim / 2],
                                      float (&out_dot)[Config::kHeadDim / 2], OnlineSoftmax softmax,
                                      const TangentSums& tangents, const RowBases& bases) {
  using Element = typename Config::Element;
  const int lane = threadIdx.x % 32;
  const int row = tile.row_begin + first_row + lane / 4;
  const bool exists[2] = {row < tile.row_end, row + 8 < tile.row_end};
  softmax.finish();
  const RowNumbers inverse = inverse_of_rows(softmax);
  scale_rows(out, inverse.of_row);
  const RowNumbers lse_dot = finish_tangent(out_dot, out, inverse, tangents);
  // An output that overflowed makes its tangent NaN.
  if constexpr (kMayOverflow<Config>) note_overflow(shared, out_dot, exists);
  const int64_t first_number = (int64_t{tile.batch} * params.table.num_heads + tile.head) * params.seqlen_q + row;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const auto store = [&](void* data, const Strides& strides, const float (&result)[Config::kHeadDim / 2]) {
      store_row(row_of_output<Element>(data, strides, tile, row) + 8 * i * strides.row, params.head_dim_v, result, i, 1,
                exists[i]);
    };
    if (params.out != nullptr) store(params.out, params.out_strides, out);
    store(params.out_dot, params.out_dot_strides, out_dot);
    if (!exists[i] || lane % 4 != 0) continue;
    if (params.lse != nullptr) {
      params.lse[first_number + 8 * i] =
          log_sum_exp(softmax.template lse<WithTangents<Element>>(i, bases), params.softmax_scale);
    }
    params.lse_dot[first_number + 8 * i] = lse_dot.of_row[i];
  }
}

}  // namespace mixed_attention::cuda::hopper
