// dq from dq_accum, the sums of the kernel that computes all gradients: put together where a tile has several, out of
// the order of its accumulators, scaled, rounded.
#pragma once

#include <cstdint>

#include "cuda/hopper/bwd/config.h"
#include "cuda/hopper/bwd/params.h"
#include "cuda/hopper/bwd/query_tiles.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/dependent_grids.cuh"

namespace mixed_attention::cuda::hopper {

// This thread's accumulators of a query tile. A thread reads what one of those who added wrote.
template <int kCount>
__device__ inline void load_accumulators(float4 (&sums)[kCount], const DqAccumKernelParams& params, int64_t batch_head,
                                         int tile) {
  for (int i = 0; i < params.num_accum_runs; ++i) {
    const DqAccumRun& run = params.accum_runs[i];
    const int tile_of_run = tile - run.first_tile;
    if (tile_of_run < 0 || tile_of_run >= run.num_tiles) continue;
    const int64_t place = batch_head * params.dq_accum.num_tiles + run.first_accum + tile_of_run;
    auto* parts = reinterpret_cast<float4*>(params.dq_accum.of_tile(place, 4 * kCount * kWarpgroup)) + threadIdx.x;
#pragma unroll
    for (int chunk = 0; chunk < kCount; ++chunk) {
      const float4 part = parts[chunk * kWarpgroup];
      sums[chunk] =
          make_float4(sums[chunk].x + part.x, sums[chunk].y + part.y, sums[chunk].z + part.z, sums[chunk].w + part.w);
    }
    if (!params.leaves_zeros) continue;
#pragma unroll
    for (int chunk = 0; chunk < kCount; ++chunk) parts[chunk * kWarpgroup] = make_float4(0, 0, 0, 0);
  }
}

// The same of sums that lie in a row, without runs; index: among those.
template <int kCount>
__device__ inline void load_accumulators(float4 (&sums)[kCount], const ListedDqAccumKernelParams& params,
                                         int64_t batch_head, int index) {
  const int64_t place = batch_head * params.dq_accum.num_tiles + index;
  const auto* parts =
      reinterpret_cast<const float4*>(params.dq_accum.of_tile(place, 4 * kCount * kWarpgroup)) + threadIdx.x;
#pragma unroll
  for (int chunk = 0; chunk < kCount; ++chunk) sums[chunk] = parts[chunk * kWarpgroup];
}

__device__ inline QueryTile tile_of_sums(const DqAccumKernelParams& params, int index) {
  return find_tile(params, index).queries;
}
__device__ inline QueryTile tile_of_sums(const ListedDqAccumKernelParams& params, int index) {
  return find_tile(params.queries, params.shared_tiles[index]).queries;
}

// Puts together the rows of dq, (kQueryTileRows, kRowElements), from sums of dqᵀ (kHeadDim, kQueryTileRows).
template <int kHeadDim, int kRowElements, int kCount, typename Element>
__device__ inline void transpose_accumulators(Element* rows, const float4 (&sums)[kCount], float scale) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int block = 0; block < kHeadDim / kWarpgroupRows; ++block) {
#pragma unroll
    for (int chunk = 0; chunk < kQueryTileRows / 8; ++chunk) {
      const float4 sum = sums[block * (kQueryTileRows / 8) + chunk];
      Element* column =
          rows + (8 * chunk + 2 * (lane % 4)) * kRowElements + block * kWarpgroupRows + 16 * warp + lane / 4;
      column[0] = Element(sum.x * scale);
      column[kRowElements] = Element(sum.y * scale);
      column[8] = Element(sum.z * scale);
      column[kRowElements + 8] = Element(sum.w * scale);
    }
  }
}

// Puts the rows together from sums of dq (kQueryTileRows, kHeadDim).
template <int kHeadDim, int kRowElements, int kCount, typename Element>
__device__ inline void order_accumulators(Element* rows, const float4 (&sums)[kCount], float scale) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int chunk = 0; chunk < kHeadDim / 8; ++chunk) {
    const float4 sum = sums[chunk];
    auto* pair = reinterpret_cast<uint32_t*>(rows + (16 * warp + lane / 4) * kRowElements + 8 * chunk + 2 * (lane % 4));
    pair[0] = ptx::pack<Element>(sum.x * scale, sum.y * scale);
    pair[8 * kRowElements / 2] = ptx::pack<Element>(sum.z * scale, sum.w * scale);
  }
}

// One block to a tile of queries of one head. The rows of dq are put together in shared memory, apart from each other
// by as many bytes as keep banks from clashing.
template <typename Element, int kHeadDim, typename Params>
__global__ void __launch_bounds__(kWarpgroup) hopper_dq_accum_kernel(const __grid_constant__ Params params) {
  ptx::allow_next_grid();
  ptx::wait_for_grids_before();
  constexpr int kRowElements = kHeadDim + 8;
  constexpr int kChunksOfRow = kHeadDim / 8;
  __shared__ __align__(16) Element rows[kQueryTileRows * kRowElements];
  const int64_t batch_head = blockIdx.x / params.num_tiles;
  const int index = blockIdx.x % params.num_tiles;
  const QueryTile tile = tile_of_sums(params, index);

  float4 sums[kQueryTileRows * kHeadDim / 4 / kWarpgroup] = {};
  load_accumulators(sums, params, batch_head, index);
  if constexpr (transposes_dq(kHeadDim)) {
    transpose_accumulators<kHeadDim, kRowElements>(rows, sums, params.softmax_scale);
  } else {
    order_accumulators<kHeadDim, kRowElements>(rows, sums, params.softmax_scale);
  }
  __syncthreads();

  Element* target = static_cast<Element*>(params.dq) + batch_head / params.num_heads * params.dq_strides.batch +
                    batch_head % params.num_heads * params.dq_strides.head + tile.row_begin * params.dq_strides.row;
  for (int i = threadIdx.x; i < tile.num_rows * kChunksOfRow; i += kWarpgroup) {
    const int row = i / kChunksOfRow, chunk = i % kChunksOfRow;
    if (chunk * 8 < params.head_dim) {
      *reinterpret_cast<uint4*>(target + row * params.dq_strides.row + chunk * 8) =
          *reinterpret_cast<const uint4*>(rows + row * kRowElements + chunk * 8);
    }
  }
}

}  // namespace mixed_attention::cuda::hopper
