// From the fragments of wgmma to rows in global memory.
#pragma once

#include <cstdint>

#include "cuda/hopper/fwd_params.h"
#include "cuda/hopper/softmax.cuh"
#include "cuda/hopper/store_rows.cuh"
#include "cuda/hopper/work_items.cuh"

namespace mixed_attention::cuda::hopper {

template <int kCount>
__device__ inline void clear(float (&o)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) o[i] = 0;
}

constexpr float kLn2 = 0.693147180559945f;

// Writes this warp's 16 rows of a tile's output and log-sum-exp, those that exist.
template <typename Config>
__device__ inline void store_result(const FwdKernelParams& params, const ItemRows& tile, int first_row,
                                    const float (&o)[Config::kHeadDim / 2], OnlineSoftmax softmax) {
  using Element = typename Config::Element;
  const int lane = threadIdx.x % 32;
  const int row_begin = tile.row_begin + first_row + lane / 4;
  softmax.finish();
  Element* out = static_cast<Element*>(params.out) + tile.batch * params.out_strides.batch +
                 tile.head * params.out_strides.head + row_begin * params.out_strides.row;
  float* lse = params.lse + (int64_t{tile.batch} * params.table.num_heads + tile.head) * params.seqlen_q + row_begin;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float sum = softmax.row_sum[i];
    const float inverse = sum == 0 ? 0 : __fdividef(1.f, sum);
    const bool exists = row_begin + 8 * i < tile.row_end;
    store_row(out + 8 * i * params.out_strides.row, params.head_dim, o, i, inverse, exists);
    if (exists && lane % 4 == 0) lse[8 * i] = sum == 0 ? -INFINITY : kLn2 * (softmax.offset[i] + log2f(sum));
  }
}

// Writes this warp's 16 rows of what a part of an item comes to, whether they exist or not.
template <typename Config>
__device__ inline void store_part(const FwdKernelParams& params, int part, int first_row,
                                  const float (&o)[Config::kHeadDim / 2], OnlineSoftmax softmax) {
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t{part} * Config::kBlockM + first_row + lane / 4;
  softmax.finish();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float* out = params.partial_out + (row + 8 * i) * params.head_dim + lane % 4 * 2;
    const float sum = softmax.row_sum[i];
    const float inverse = sum == 0 ? 0 : __fdividef(1.f, sum);
#pragma unroll
    for (int column = 0; column < Config::kHeadDim; column += 8) {
      const float* pair = o + column / 2 + 2 * i;
      if (column < params.head_dim) {
        *reinterpret_cast<float2*>(out + column) = make_float2(pair[0] * inverse, pair[1] * inverse);
      }
    }
    if (lane % 4 == 0) {
      params.partial_lse[row + 8 * i] = sum == 0 ? -INFINITY : kLn2 * (softmax.offset[i] + log2f(sum));
    }
  }
}

template <typename Config>
__device__ inline void store_item(const FwdKernelParams& params, const ItemWalk<Config::kBlockM>& item, int first_row,
                                  const float (&o)[Config::kHeadDim / 2], const OnlineSoftmax& softmax) {
  const ItemSplits& splits = params.table.splits;
  if (splits.has(item.item)) {
    store_part<Config>(params, splits.place(item.item), first_row, o, softmax);
  } else {
    store_result<Config>(params, item.rows(), first_row, o, softmax);
  }
}

}  // namespace mixed_attention::cuda::hopper
