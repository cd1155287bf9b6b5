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

// Writes one of a thread's two rows, i, times a factor. The threads of a quad hold pairs of the same row's elements;
// they trade them for 16 bytes each, 64 in a row. out: the row in memory, of num_columns.
template <typename Element, int kCount>
__device__ inline void store_row(Element* out, int num_columns, const float (&o)[kCount], int i, float factor,
                                 bool exists) {
  constexpr int kColumnsAtOnce = 64 / sizeof(Element);
  const int thread = threadIdx.x % 4;
#pragma unroll
  for (int column = 0; column < 2 * kCount; column += kColumnsAtOnce) {
    const float* first = o + column / 2 + 2 * i;
    if constexpr (sizeof(Element) == 2) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) words[j] = ptx::pack<Element>(first[4 * j] * factor, first[4 * j + 1] * factor);
      transpose_quad(words);
      const int own_column = column + 8 * thread;
      if (exists && own_column < num_columns) {
        *reinterpret_cast<uint4*>(out + own_column) = uint4{words[0], words[1], words[2], words[3]};
      }
    } else {
      // Of two times 8 columns the even threads get 4 each of the first ones, the odd threads of the second ones.
      const bool is_odd = thread % 2;
      const float2 low{first[0] * factor, first[1] * factor}, high{first[4] * factor, first[5] * factor};
      const float2 sent = is_odd ? low : high;
      const float2 received{__shfl_xor_sync(0xffffffff, sent.x, 1), __shfl_xor_sync(0xffffffff, sent.y, 1)};
      const int own_column = column + (is_odd ? 8 : 0) + thread / 2 * 4;
      if (exists && own_column < num_columns) {
        *reinterpret_cast<float4*>(out + own_column) =
            is_odd ? float4{received.x, received.y, high.x, high.y} : float4{low.x, low.y, received.x, received.y};
      }
    }
  }
}

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
    store_part<Config>(params, item.item - splits.begin, first_row, o, softmax);
  } else {
    store_result<Config>(params, item.rows(), first_row, o, softmax);
  }
}

}  // namespace mixed_attention::cuda::hopper
