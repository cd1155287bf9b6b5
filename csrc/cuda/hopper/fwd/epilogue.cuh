// Stores the fragments of wgmma as rows in global memory.
#pragma once

#include <cstdint>

#include "cuda/common/log_sum_exp.cuh"
#include "cuda/hopper/fwd/overflow.cuh"
#include "cuda/hopper/fwd/params.h"
#include "cuda/hopper/fwd/softmax.cuh"
#include "cuda/hopper/fwd/tile_row_scales.cuh"
#include "cuda/hopper/fwd/walk.cuh"
#include "cuda/hopper/tile/store_rows.cuh"

namespace mixed_attention::cuda::hopper {

template <int kCount>
__device__ inline void clear(float (&o)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) o[i] = 0;
}

// The factor of a finished row: zero without keys, or if all their scores are -inf.
template <typename Config>
__device__ inline float inverse_of(float sum) {
  constexpr float kWhole = Config::kHasRowScales ? 1 / kValueScaleShare : 1;
  return sum == 0 ? 0 : __fdividef(kWhole, sum);
}

// The scale of a row's raw scores; row: among all of its head.
template <typename Config>
__device__ inline float scale_of(const FwdKernelParams& params, const ItemRows& tile, int row) {
  if constexpr (!Config::kHasRowScales) return params.softmax_scale;
  const float* row_scales =
      row_scales_of_head(params.row_scales.q, tile, params.q_batch_step, params.table.num_heads, params.seqlen_q);
  return scale_of_row(params.softmax_scale, row_scales[row]);
}

// Writes this warp's 16 rows of a tile's output and log-sum-exp, those that exist.
template <typename Config>
__device__ inline void store_result(const FwdKernelParams& params, FwdSharedStorage<Config>& shared,
                                    const ItemRows& tile, int first_row, const float (&o)[Config::kHeadDim / 2],
                                    OnlineSoftmax softmax, const RowBases& bases) {
  using Element = typename Config::Element;
  const int lane = threadIdx.x % 32;
  const int row_begin = tile.row_begin + first_row + lane / 4;
  const bool exists[2] = {row_begin < tile.row_end, row_begin + 8 < tile.row_end};
  softmax.finish();
  Element* out = static_cast<Element*>(params.out) + tile.batch * params.out_strides.batch +
                 tile.head * params.out_strides.head + row_begin * params.out_strides.row;
  if constexpr (kMayOverflow<Config>) note_overflow(shared, o, exists);
  float* lse = params.lse + (int64_t{tile.batch} * params.table.num_heads + tile.head) * params.seqlen_q + row_begin;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    store_row(out + 8 * i * params.out_strides.row, params.head_dim_v, o, i, inverse_of<Config>(softmax.row_sum[i]),
              exists[i]);
    if (exists[i] && lane % 4 == 0) {
      const RowLse row_lse = softmax.template lse<Element>(i, bases);
      lse[8 * i] = log_sum_exp(row_lse, row_lse.base != 0 ? scale_of<Config>(params, tile, row_begin + 8 * i) : 0);
    }
  }
}

// Writes this warp's 16 rows of a split of a work item, whether they exist or not.
template <typename Config>
__device__ inline void store_split(const FwdKernelParams& params, FwdSharedStorage<Config>& shared, int split,
                                   int first_row, const float (&o)[Config::kHeadDim / 2], OnlineSoftmax softmax,
                                   const RowBases& bases) {
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t{split} * Config::kBlockM + first_row + lane / 4;
  softmax.finish();
  if constexpr (kMayOverflow<Config>) note_overflow(shared, o, {true, true});
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float* out = params.partial_out + (row + 8 * i) * params.head_dim_v + lane % 4 * 2;
    const float inverse = inverse_of<Config>(softmax.row_sum[i]);
#pragma unroll
    for (int column = 0; column < Config::kHeadDim; column += 8) {
      const float* pair = o + column / 2 + 2 * i;
      if (column < params.head_dim_v) {
        *reinterpret_cast<float2*>(out + column) = make_float2(pair[0] * inverse, pair[1] * inverse);
      }
    }
    if (lane % 4 == 0) params.row_lses[row + 8 * i] = softmax.template lse<typename Config::Element>(i, bases);
  }
}

template <typename Config>
__device__ inline void store_item(const FwdKernelParams& params, FwdSharedStorage<Config>& shared,
                                  const Walk<Config>& item, int first_row, const float (&o)[Config::kHeadDim / 2],
                                  const OnlineSoftmax& softmax, const RowBases& bases) {
  const ItemSplits& splits = params.table.splits;
  if (splits.has(item.item)) {
    store_split<Config>(params, shared, splits.place(item.item), first_row, o, softmax, bases);
  } else {
    store_result<Config>(params, shared, item.rows(), first_row, o, softmax, bases);
  }
}

}  // namespace mixed_attention::cuda::hopper
