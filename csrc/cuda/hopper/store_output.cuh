// From the fragments of wgmma to rows in global memory.
#pragma once

#include <cstdint>

#include "cuda/hopper/fwd_params.h"
#include "cuda/hopper/softmax.cuh"
#include "cuda/hopper/work_items.cuh"
#include "cuda/ptx/convert.cuh"

namespace mixed_attention::cuda::hopper {

template <int kCount>
__device__ inline void clear(float (&o)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) o[i] = 0;
}

// Transposes the 4 x 4 words that the threads of a quad hold, one column each: thread t then has row t.
__device__ inline void transpose_quad(uint32_t (&words)[4]) {
  const int thread = threadIdx.x % 4;
  // Halves of the matrix change places, then halves of the halves: each thread sends what lies off its own.
#pragma unroll
  for (int distance = 2; distance > 0; distance /= 2) {
    const bool upper = thread & distance;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & distance) continue;
      uint32_t& low = words[i];
      uint32_t& high = words[i + distance];
      const uint32_t received = __shfl_xor_sync(0xffffffff, upper ? low : high, distance);
      (upper ? low : high) = received;
    }
  }
}

constexpr float kLn2 = 0.693147180559945f;

// Writes this warp's 16 rows of a tile's output and log-sum-exp, those that exist. The threads of a quad hold pairs of
// the same rows' elements; they trade them for 16 bytes each, 64 in a row.
template <typename Config>
__device__ inline void store_result(const FwdKernelParams& params, const ItemRows& tile, int first_row,
                                    const float (&o)[Config::kHeadDim / 2], OnlineSoftmax softmax) {
  using Element = typename Config::Element;
  const int lane = threadIdx.x % 32;
  const int row_begin = tile.row_begin + first_row + lane / 4;
  const int num_columns = params.head_dim - lane % 4 * 8;  // from this thread's first one on
  softmax.finish();
  Element* out = static_cast<Element*>(params.out) + tile.batch * params.out_strides.batch +
                 tile.head * params.out_strides.head + row_begin * params.out_strides.row + lane % 4 * 8;
  float* lse = params.lse + (int64_t{tile.batch} * params.table.num_heads + tile.head) * params.seqlen_q + row_begin;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float sum = softmax.row_sum[i];
    const float inverse = sum == 0 ? 0 : __fdividef(1.f, sum);
    const bool exists = row_begin + 8 * i < tile.row_end;
#pragma unroll
    for (int column = 0; column < Config::kHeadDim; column += 32) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* pair = o + column / 2 + 4 * j + 2 * i;
        words[j] = ptx::pack<Element>(pair[0] * inverse, pair[1] * inverse);
      }
      transpose_quad(words);
      if (exists && column < num_columns) {
        *reinterpret_cast<uint4*>(out + 8 * i * params.out_strides.row + column) =
            uint4{words[0], words[1], words[2], words[3]};
      }
    }
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
    store_part<Config>(params, item.item - splits.begin, first_row, o, softmax);
  } else {
    store_result<Config>(params, item.rows(), first_row, o, softmax);
  }
}

}  // namespace mixed_attention::cuda::hopper
