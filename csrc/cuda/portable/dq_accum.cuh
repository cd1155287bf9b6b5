// The accumulator of dq: fp32 memory to which all thread blocks of the backward add what they know of dq.
//
// It lies in blocks of 8 rows and 8 columns, each in the order in which a warp's lanes have it in their accumulators:
// what a warp adds to a block is then 256 bytes in a row instead of 32 in each of 8 rows. Caches work by lines of 128.
#pragma once

#include <cstdint>

#include "cuda/ptx/reduce.cuh"

namespace mixed_attention::cuda::portable {

struct DqAccum {
  static constexpr int kBlock = 8 * 8;

  float* data;   // all rows (batch, head, query), up to a multiple of 8
  int num_cols;  // a multiple of 8

  // Where a lane adds the columns 2t and 2t + 1, t = lane % 4, of a row's block that begins at `col`. The next 8
  // columns are kBlock behind, the next 8 rows 8 * num_cols.
  __device__ float* place(uint64_t row, int col, int t) const {
    return data + row / 8 * 8 * num_cols + col / 8 * kBlock + kLaneStep * (static_cast<int>(row % 8) * 4 + t);
  }

  __device__ static void add(float* place, const float* pair) {
#if __CUDA_ARCH__ >= 900
    ptx::add_pair(place, pair[0], pair[1]);
#else
    atomicAdd(place, pair[0]);
    atomicAdd(place + kPairStep, pair[1]);
#endif
  }

  __device__ float at(uint64_t row, int col) const { return place(row, col, col % 8 / 2)[col % 2 * kPairStep]; }

 private:
#if __CUDA_ARCH__ >= 900
  static constexpr int kLaneStep = 2, kPairStep = 1;
#else
  static constexpr int kLaneStep = 1, kPairStep = 32;  // numbers are added one at a time
#endif
};

}  // namespace mixed_attention::cuda::portable
