// Stores of a warpgroup's results from its registers to global memory.
#pragma once

#include <cstdint>

#include "cuda/hopper/config.h"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/lane.cuh"
#include "cuda/ptx/shared_address.cuh"
#include "cuda/ptx/stmatrix.cuh"
#include "cuda/ptx/store_global.cuh"

namespace mixed_attention::cuda::hopper {

// Writes this warp's 16 rows of a result, the first num_rows and num_columns of them. They pass through shared memory,
// (16, kHeadDim) with the 16-byte chunks of a row swizzled against bank conflicts, so that whole rows leave at once.
template <typename Element, int kHeadDim>
__device__ inline void store_rows(Element* staging, const float (&result)[kHeadDim / 2], Element* target,
                                  int64_t row_stride, int num_rows, int num_columns) {
  constexpr int kChunks = kHeadDim / 8;
  const int lane = ptx::lane_anew();
  const auto chunk_at = [&](int row, int chunk) {
    const int swizzle = kChunks % 8 == 0 ? row % 8 : row / 2 % 4;
    return staging + row * kHeadDim + (chunk ^ swizzle) * 8;
  };

  __syncwarp();  // the rows stored before have been read
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    const float* pair = result + 8 * step;
    ptx::stmatrix_x4(ptx::shared_address(chunk_at(lane % 16, 2 * step + lane / 16)),
                     ptx::pack<Element>(pair[0], pair[1]), ptx::pack<Element>(pair[2], pair[3]),
                     ptx::pack<Element>(pair[4], pair[5]), ptx::pack<Element>(pair[6], pair[7]));
  }
  __syncwarp();
#pragma unroll
  for (int first = 0; first < kWarpRows * kChunks; first += 32) {
    const int row = (first + lane) / kChunks;
    const int chunk = (first + lane) % kChunks;
    if (row < num_rows && chunk * 8 < num_columns) {
      *reinterpret_cast<uint4*>(target + row * row_stride + chunk * 8) =
          *reinterpret_cast<const uint4*>(chunk_at(row, chunk));
    }
  }
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
      if (exists && own_column < num_columns) ptx::store_four(out + own_column, words);
    } else {
      // There are two times 8 columns. Even threads get 4 each of the first ones, odd threads of the second ones.
      const bool is_odd = thread % 2;
      const float2 low{first[0] * factor, first[1] * factor}, high{first[4] * factor, first[5] * factor};
      const float2 sent = is_odd ? low : high;
      const float2 received{__shfl_xor_sync(0xffffffff, sent.x, 1), __shfl_xor_sync(0xffffffff, sent.y, 1)};
      const int own_column = column + (is_odd ? 8 : 0) + thread / 2 * 4;
      const float2 left = is_odd ? received : low, right = is_odd ? high : received;
      const uint32_t words[4] = {__float_as_uint(left.x), __float_as_uint(left.y), __float_as_uint(right.x),
                                 __float_as_uint(right.y)};
      if (exists && own_column < num_columns) ptx::store_four(out + own_column, words);
    }
  }
}

// Writes this warp's 16 rows of a result as store_rows does, in pieces of 64 bytes, without shared memory.
template <typename Element, int kCount>
__device__ inline void store_rows_directly(const float (&result)[kCount], Element* target, int64_t row_stride,
                                           int num_rows, int num_columns) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = threadIdx.x % 32 / 4 + 8 * i;
    store_row(target + row * row_stride, num_columns, result, i, 1, row < num_rows);
  }
}

}  // namespace mixed_attention::cuda::hopper
