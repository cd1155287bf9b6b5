// The way of a warpgroup's results out of its registers.
#pragma once

#include <cstdint>

#include "cuda/hopper/config.h"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/lane.cuh"
#include "cuda/ptx/shared_address.cuh"
#include "cuda/ptx/stmatrix.cuh"

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

}  // namespace mixed_attention::cuda::hopper
