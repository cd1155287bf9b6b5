// dq from the sums of the kernel that computes all gradients: out of the order of its accumulators, scaled, rounded.
#pragma once

#include <cstdint>

#include "cuda/hopper/bwd_config.h"
#include "cuda/hopper/bwd_params.h"
#include "cuda/hopper/query_tiles.cuh"
#include "cuda/ptx/convert.cuh"

namespace mixed_attention::cuda::hopper {

// One block to a tile of queries of one head. A thread reads what one of add_dq wrote, dqᵀ (kHeadDim, kQueryTileRows);
// the rows of dq are put together in shared memory, apart from each other by as many bytes as keep banks from clashing.
template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kWarpgroup) hopper_dq_sums_kernel(const __grid_constant__ DqSumsKernelParams params) {
  constexpr int kRowElements = kHeadDim + 8;
  constexpr int kChunksOfRow = kHeadDim / 8;
  constexpr int kRowsAtOnce = kWarpgroup / kChunksOfRow;
  __shared__ __align__(16) Element rows[kQueryTileRows * kRowElements];
  const int64_t sequence = blockIdx.x / params.num_tiles;
  const QueryTile tile = query_tile(params.runs, params.num_runs, blockIdx.x % params.num_tiles);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  const auto* sums = reinterpret_cast<const float4*>(params.dq_sums) +
                     int64_t{blockIdx.x} * (kQueryTileRows * kHeadDim / 4) + threadIdx.x;
#pragma unroll
  for (int block = 0; block < kHeadDim / kWarpgroupRows; ++block) {
#pragma unroll
    for (int chunk = 0; chunk < kQueryTileRows / 8; ++chunk) {
      const float4 sum = sums[(block * (kQueryTileRows / 8) + chunk) * kWarpgroup];
      Element* column =
          rows + (8 * chunk + 2 * (lane % 4)) * kRowElements + block * kWarpgroupRows + 16 * warp + lane / 4;
      column[0] = Element(sum.x * params.softmax_scale);
      column[kRowElements] = Element(sum.y * params.softmax_scale);
      column[8] = Element(sum.z * params.softmax_scale);
      column[kRowElements + 8] = Element(sum.w * params.softmax_scale);
    }
  }
  __syncthreads();

  const int chunk = threadIdx.x % kChunksOfRow;
  if (chunk * 8 >= params.head_dim) return;
  Element* target = static_cast<Element*>(params.dq) + sequence / params.num_heads * params.dq_strides.batch +
                    sequence % params.num_heads * params.dq_strides.head + tile.row_begin * params.dq_strides.row;
  for (int row = threadIdx.x / kChunksOfRow; row < tile.num_rows; row += kRowsAtOnce) {
    *reinterpret_cast<uint4*>(target + row * params.dq_strides.row + chunk * 8) =
        *reinterpret_cast<const uint4*>(rows + row * kRowElements + chunk * 8);
  }
}

}  // namespace mixed_attention::cuda::hopper
