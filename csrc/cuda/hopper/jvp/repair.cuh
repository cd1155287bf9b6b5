// The second walk over a block's items of the tangents' kernels, as the forward has one (fwd/repair.cuh): tile by tile,
// with p of 2^-64 at most, for results that overflowed on the way to numbers that do not.
#pragma once

#include "cuda/hopper/fwd/mma.cuh"
#include "cuda/hopper/fwd/repair.cuh"
#include "cuda/hopper/fwd/softmax.cuh"
#include "cuda/hopper/jvp/epilogue.cuh"
#include "cuda/hopper/jvp/mma.cuh"
#include "cuda/hopper/jvp/params.h"
#include "cuda/hopper/jvp/softmax.cuh"
#include "cuda/hopper/plan/work_items.cuh"
#include "cuda/hopper/tile/ring.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace mixed_attention::cuda::hopper {

// Replaces what is not finite in this warp's 16 rows of a tile.
template <typename Config>
__device__ inline void replace_tangents(const JvpKernelParams& params, const ItemRows& tile, int first_row,
                                        JvpMma<Config>& mma, OnlineSoftmax softmax, const TangentSums& tangents) {
  using Element = typename Config::Element;
  const int first = tile.row_begin + first_row + threadIdx.x % 32 / 4;
  softmax.finish();
  const RowNumbers inverse = inverse_of_rows(softmax);
  scale_rows(mma.out, inverse.of_row);
  finish_tangent(mma.out_dot, mma.out, inverse, tangents);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first + 8 * i;
    if (row >= tile.row_end) continue;
    if (params.out != nullptr) {
      replace_row(row_of_output<Element>(params.out, params.out_strides, tile, row), params.head_dim_v, mma.out, i, 1);
    }
    replace_row(row_of_output<Element>(params.out_dot, params.out_dot_strides, tile, row), params.head_dim_v,
                mma.out_dot, i, 1);
  }
}

// The walk of a consumer; the producer brings everything again. q_use and k_use are the next uses of the rings.
template <typename Config>
__device__ inline void repair_tangents(const JvpKernelParams& params, JvpSharedStorage<Config>& shared,
                                       JvpMma<Config>& mma, RingUse<Config::kQueryBuffers> q_use,
                                       RingUse<Config::kStages> k_use, int first_row) {
  using Numbers = WithTangents<typename Config::Element>;
  const float scale_log2[2] = {params.softmax_scale_log2, params.softmax_scale_log2};
  const RowBases bases{shared.bases[0] + first_row + threadIdx.x % 32 / 4, true};
  for (ItemWalk<Config::kBlockM> items(params.table); items.next_with_keys(); ++q_use.count) {
    const TileShare share = items.share();
    OnlineSoftmax softmax;
    TangentSums tangents;
    tangents.start();
    clear(mma.out);
    clear(mma.out_dot);
    wait_full(shared.q_pipe, q_use);
    mma.load_queries(shared, q_use.stage(), first_row);
    for (int tile = share.begin; tile < share.end; ++tile, ++k_use.count) {
      wait_full(shared.k_pipe, k_use);
      mma.issue_scores(q_use.stage(), k_use.stage());
      ptx::wgmma_wait<0>(mma.s, mma.x);
      if (tile < share.num_partial) mask_columns(mma.s, items.ranges()[tile].tail);
      sync_and_release(shared.k_pipe, k_use);
      if (tile == share.begin) {
        softmax.start<Numbers, 0>(mma.s, scale_log2, bases);
      } else {
        float factor[2];
        softmax.raise<Numbers, 0>(mma.s, scale_log2, factor, bases);
        mma.scale_sums(factor);
        tangents.scale(factor);
      }
      tangents.weigh(mma.x, mma.s, params.softmax_scale);
      tangents.add_tile(softmax, [&](const float (&change)[2]) { mma.move_means(change); });
      softmax.add_tile();
      mma.take_factors();
      wait_full(shared.v_pipe, k_use);
      mma.issue_outputs(k_use.stage());
      mma.wait();
      sync_and_release(shared.v_pipe, k_use);
    }
    sync_and_release(shared.q_pipe, q_use);
    replace_tangents(params, items.rows(), first_row, mma, softmax, tangents);
  }
}

}  // namespace mixed_attention::cuda::hopper
