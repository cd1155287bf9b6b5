// Statistics of every query for the backward: its log-sum-exp in base 2, and delta. dq_accum, or the turns to add to
// it, begin with zero here; where it lies in the memory of the output, each thread leaves zeros where it has read.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <numbers>
#include <type_traits>

#include "ceil_div.h"
#include "cuda/hopper/bwd/config.h"
#include "cuda/hopper/bwd/params.h"
#include "cuda/hopper/bwd/query_tiles.cuh"
#include "cuda/hopper/bwd/row_references.cuh"
#include "cuda/ptx/dependent_grids.cuh"

namespace mixed_attention::cuda::hopper {

__device__ inline float2 widen(__nv_bfloat162 pair) { return __bfloat1622float2(pair); }
__device__ inline float2 widen(__half2 pair) { return __half22float2(pair); }
__device__ inline float2 widen(float2 pair) { return pair; }

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
template <>
struct PairOf<float> {
  using Type = float2;
};

// Adds a b of the elements of 16 bytes.
template <typename Element>
__device__ inline void add_dot(float& sum, const uint4& a, const uint4& b) {
  using Pair = typename PairOf<Element>::Type;
  const Pair* pairs_a = reinterpret_cast<const Pair*>(&a);
  const Pair* pairs_b = reinterpret_cast<const Pair*>(&b);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(uint4) / sizeof(Pair)); ++i) {
    const float2 x = widen(pairs_a[i]), y = widen(pairs_b[i]);
    sum += x.x * y.x + x.y * y.y;
  }
}

// One block to a tile of queries of one head, two rows to a thread. A row is read by as many threads as it has chunks
// of 16 bytes, or by the next power of two; in fp32 by four, each of which reads several chunks, and has one row.
template <typename Element, int kHeadDim>
struct BwdStatsShape {
  static constexpr bool kIsFp32 = kHasRowScales<Element>;
  static constexpr int kChunkColumns = sizeof(uint4) / sizeof(Element);
  static constexpr int kThreadsPerRow = kIsFp32 ? 4 : std::bit_ceil(unsigned{kHeadDim / kChunkColumns});
  static constexpr int kChunks = ceil_div(kHeadDim, kChunkColumns* kThreadsPerRow);  // of a row, a thread's
  static constexpr int kRowsOfThread = kIsFp32 ? 1 : 2;
  static constexpr int kThreads = kQueryTileRows * kThreadsPerRow / kRowsOfThread;
};

// A row of a tile of queries, of one head.
struct StatsRow {
  int64_t batch, head;
  int row, row_of_tile;
  bool exists;
};

// Where the statistics of a tile lie in global memory: those for fp32 are in bwd_fp32/stats_tile.cuh. One thread of
// each row puts its numbers there, then all of a block finish the tile.
template <typename Params>
class StatsTile {
 public:
  __device__ StatsTile(const Params& params, int64_t tile)
      : lse_log2_(params.stats.lse_log2 + tile * kStatsTileFloats),
        delta_(params.stats.delta + tile * kStatsTileFloats) {}

  __device__ void put(const Params&, const StatsRow& row, float lse_log2, float delta) {
    put_lse(row.row_of_tile, lse_log2);
    delta_[place_of_stats(row.row_of_tile)] = delta;
  }

  __device__ void put_lse(int row_of_tile, float lse_log2) { lse_log2_[place_of_stats(row_of_tile)] = lse_log2; }

  __device__ void finish(RowReference* references, bool has_references, bool is_partial) {
    if (threadIdx.x != 0) return;
    *reinterpret_cast<RowReference**>(lse_log2_ + kQueryTileRows) = references;
    lse_log2_[kMarkPlace] = has_references ? kHasReferences : is_partial ? kIsPartial : 0;
  }

 private:
  float *lse_log2_, *delta_;
};

template <typename Params>
__device__ inline TileOfSegment tile_of_stats(const Params& params, int tile) {
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

  StatsTile<Params> stats(params, blockIdx.x);
  bool has_references = false;
#pragma unroll
  for (int i = 0; i < Shape::kRowsOfThread; ++i) {
    const int row_of_tile = threadIdx.x / Shape::kThreadsPerRow + i * (kQueryTileRows / Shape::kRowsOfThread);
    const int row = queries.row_begin + row_of_tile;
    const bool exists = row_of_tile < queries.num_rows;
    float delta = 0;
#pragma unroll
    for (int j = 0; j < Shape::kChunks; ++j) {
      const int column = (j * Shape::kThreadsPerRow + chunk) * Shape::kChunkColumns;
      const auto bytes_before = [&](const Strides& strides) {
        return (batch * strides.batch + row * strides.row + head * strides.head + column) * sizeof(Element);
      };
      const auto chunk_of = [&](const void* tensor, const Strides& strides) {
        return *reinterpret_cast<const uint4*>(static_cast<const char*>(tensor) + bytes_before(strides));
      };
      if (exists && column < params.head_dim_v) {
        add_dot<Element>(delta, chunk_of(params.out, params.out_strides), chunk_of(params.dout, params.dout_strides));
        if (params.dq_accum.num_spare > 0) {
          auto* spare = reinterpret_cast<char*>(params.dq_accum.spare) + bytes_before(params.out_strides);
          *reinterpret_cast<uint4*>(spare) = uint4{};
        }
      }
      if constexpr (kIsListed) {
        if (clears_dq && exists && column < params.head_dim) {
          *reinterpret_cast<uint4*>(static_cast<char*>(params.dq) + bytes_before(params.dq_strides)) = uint4{};
        }
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
    stats.put(params, {batch, head, row, row_of_tile, exists}, lse_log2, delta);
  }

  has_references = __syncthreads_or(has_references);
  const bool is_partial = queries.num_rows < kQueryTileRows;
  const int64_t first_row = batch_head * params.seqlen_q + queries.row_begin;
  RowReference* const references = params.scores.references + first_row;
  stats.finish(references, has_references, is_partial);
  if (!has_references && !is_partial) return;
  find_references<Element>(params.scores, run, queries, batch, head, params.lse + first_row, references,
                           [&](int row_of_tile, float lse_log2) { stats.put_lse(row_of_tile, lse_log2); });
}

}  // namespace mixed_attention::cuda::hopper
