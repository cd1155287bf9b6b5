// Statistics of every query for the backward: its log-sum-exp in base 2, and delta. dq_accum, or the turns to add to
// it, begin with zero here; where it lies in the memory of the output, each thread leaves zeros where it has read.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <numbers>
#include <type_traits>

#include "cuda/hopper/bwd/config.h"
#include "cuda/hopper/bwd/params.h"
#include "cuda/hopper/bwd/query_tiles.cuh"
#include "cuda/hopper/bwd/row_references.cuh"
#include "cuda/ptx/dependent_grids.cuh"

namespace mixed_attention::cuda::hopper {

__device__ inline float2 widen(__nv_bfloat162 pair) { return __bfloat1622float2(pair); }
__device__ inline float2 widen(__half2 pair) { return __half22float2(pair); }

template <typename Element>
struct PairOf;
template <>
struct PairOf<__nv_bfloat16> {
  using Type = __nv_bfloat162;
};
template <>
struct PairOf<__half> {
  using Type = __half2;
};

// Σ a b over eight elements.
template <typename Element>
__device__ inline float dot(const uint4& a, const uint4& b) {
  using Pair = typename PairOf<Element>::Type;
  const Pair* pairs_a = reinterpret_cast<const Pair*>(&a);
  const Pair* pairs_b = reinterpret_cast<const Pair*>(&b);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 x = widen(pairs_a[i]), y = widen(pairs_b[i]);
    sum += x.x * y.x + x.y * y.y;
  }
  return sum;
}

// One block to a tile of queries of one head; a row is read by as many threads as it has chunks of 16 bytes, or by the
// next power of two.
template <typename Element, int kHeadDim>
struct BwdStatsShape {
  static constexpr int kThreadsPerRow = std::bit_ceil(kHeadDim / 8u);
  static constexpr int kThreads = kQueryTileRows * kThreadsPerRow / 2;
};

__device__ inline TileOfSegment tile_of_stats(const BwdStatsKernelParams& params, int tile) {
  return find_tile(params, tile);
}
__device__ inline TileOfSegment tile_of_stats(const ListedBwdStatsKernelParams& params, int tile) {
  return find_tile(params.queries, tile);
}

template <typename Element, int kHeadDim, typename Params>
__global__ void __launch_bounds__(BwdStatsShape<Element, kHeadDim>::kThreads)
    hopper_bwd_stats_kernel(const __grid_constant__ Params params) {
  ptx::allow_next_grid();
  ptx::wait_for_grids_before();
  using Shape = BwdStatsShape<Element, kHeadDim>;
  const int tile = blockIdx.x % params.stats.num_tiles;
  const int64_t batch_head = blockIdx.x / params.stats.num_tiles;
  const int64_t head = batch_head % params.num_heads, batch = batch_head / params.num_heads;
  constexpr bool kIsListed = std::is_same_v<Params, ListedBwdStatsKernelParams>;
  const TileOfSegment own = tile_of_stats(params, tile);
  const int run = own.segment;
  const QueryTile queries = own.queries;
  const int chunk = threadIdx.x % Shape::kThreadsPerRow;

  [[maybe_unused]] bool clears_dq = false;
  if constexpr (kIsListed) {
    if (blockIdx.x == 0 && threadIdx.x == 0) *params.next_item = 0;
    clears_dq = params.queries[tile].is_unread != 0;
  }

  const int64_t first_other = params.dq_accum.num_spare;
  if (blockIdx.x >= first_other && blockIdx.x < first_other + params.dq_accum.num_others) {
    constexpr int kFloat4s = kQueryTileRows * kHeadDim / 4;
    auto* sums = reinterpret_cast<float4*>(params.dq_accum.of_tile(blockIdx.x, 4 * kFloat4s));
#pragma unroll
    for (int i = 0; i < kFloat4s; i += Shape::kThreads) sums[i + threadIdx.x] = make_float4(0, 0, 0, 0);
  }

  for (int64_t i = int64_t{blockIdx.x} * Shape::kThreads + threadIdx.x; i < params.num_dq_turns;
       i += int64_t{gridDim.x} * Shape::kThreads) {
    params.dq_turns[i] = 0;
  }

  float* const lse_of_tile = params.stats.lse_log2 + int64_t{blockIdx.x} * kStatsTileFloats;
  float* const delta_of_tile = params.stats.delta + int64_t{blockIdx.x} * kStatsTileFloats;
  bool has_references = false;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row_of_tile = threadIdx.x / Shape::kThreadsPerRow + half * (kQueryTileRows / 2);
    const int row = queries.row_begin + row_of_tile;
    const bool exists = row_of_tile < queries.num_rows;
    const auto bytes_before = [&](const Strides& strides) {
      return (batch * strides.batch + row * strides.row + head * strides.head + chunk * 8) * sizeof(Element);
    };
    const auto chunk_of = [&](const void* tensor, const Strides& strides) {
      return *reinterpret_cast<const uint4*>(static_cast<const char*>(tensor) + bytes_before(strides));
    };
    float delta = 0;
    if (exists && chunk * 8 < params.head_dim_v) {
      delta = dot<Element>(chunk_of(params.out, params.out_strides), chunk_of(params.dout, params.dout_strides));
      if (params.dq_accum.num_spare > 0) {
        auto* spare = reinterpret_cast<char*>(params.dq_accum.spare) + bytes_before(params.out_strides);
        *reinterpret_cast<uint4*>(spare) = uint4{};
      }
    }
    if constexpr (kIsListed) {
      if (clears_dq && exists && chunk * 8 < params.head_dim) {
        *reinterpret_cast<uint4*>(static_cast<char*>(params.dq) + bytes_before(params.dq_strides)) = uint4{};
      }
    }
#pragma unroll
    for (int lanes = Shape::kThreadsPerRow / 2; lanes > 0; lanes /= 2) {
      delta += __shfl_xor_sync(0xffffffff, delta, lanes);
    }
    if (chunk != 0) continue;
    float lse_log2 = INFINITY;
    if (exists) {
      const int64_t index = batch_head * params.seqlen_q + row;
      if (params.dlse != nullptr) delta -= params.dlse[index];
      if (params.lse[index] != -INFINITY) lse_log2 = params.lse[index] * std::numbers::log2e_v<float>;
      has_references |= params.lse[index] != -INFINITY && needs_reference(lse_log2);
      if (params.delta_of_rows != nullptr) params.delta_of_rows[index] = delta;
    }
    lse_of_tile[place_of_stats(row_of_tile)] = lse_log2;
    delta_of_tile[place_of_stats(row_of_tile)] = delta;
  }

  has_references = __syncthreads_or(has_references);
  const bool is_partial = queries.num_rows < kQueryTileRows;
  const int64_t first_row = batch_head * params.seqlen_q + queries.row_begin;
  RowReference* const references = params.scores.references + first_row;
  if (threadIdx.x == 0) {
    *reinterpret_cast<RowReference**>(lse_of_tile + kQueryTileRows) = references;
    lse_of_tile[kMarkPlace] = has_references ? kHasReferences : is_partial ? kIsPartial : 0;
  }
  if (!has_references && !is_partial) return;
  find_references<Element>(params.scores, run, queries, batch, head, params.lse + first_row, references,
                           [&](int row, float lse_log2) { lse_of_tile[place_of_stats(row)] = lse_log2; });
}

}  // namespace mixed_attention::cuda::hopper
