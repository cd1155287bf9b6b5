// Statistics of every query for the fp32 backward, tile by tile: log-sum-exp, delta, and the row_scales of the limbs.
#pragma once

#include <cstdint>
#include <numbers>

#include "cuda/hopper/bwd/query_tiles.cuh"
#include "cuda/hopper/bwd/row_references.cuh"
#include "cuda/hopper/bwd_fp32/params.h"
#include "cuda/ptx/dependent_grids.cuh"

namespace mixed_attention::cuda::hopper {

inline constexpr int kFp32StatsThreadsPerRow = 4;
inline constexpr int kFp32StatsThreads = kQueryTileRows * kFp32StatsThreadsPerRow;

// The largest of a block's numbers, none of which is negative.
__device__ inline float block_max(float x) {
  __shared__ uint32_t of_warps[kFp32StatsThreads / 32];
  of_warps[threadIdx.x / 32] = __reduce_max_sync(0xffffffff, __float_as_uint(x));
  __syncthreads();
  uint32_t largest = 0;
  for (uint32_t bits : of_warps) largest = max(largest, bits);
  return __uint_as_float(largest);
}

// One block to a tile of queries of one head, four threads to a row.
__global__ void __launch_bounds__(kFp32StatsThreads)
    hopper_fp32_bwd_stats_kernel(const __grid_constant__ Fp32BwdStatsKernelParams params) {
  ptx::allow_next_grid();
  ptx::wait_for_grids_before();
  const int tile = blockIdx.x % params.stats.num_tiles;
  const int64_t batch_head = blockIdx.x / params.stats.num_tiles;
  const int64_t head = batch_head % params.num_heads, batch = batch_head / params.num_heads;
  const int run = run_of_tile(params.runs, params.num_runs, tile);
  const QueryTile queries = query_tile(params.runs, run, tile);
  const int row_of_tile = threadIdx.x / kFp32StatsThreadsPerRow, thread_of_row = threadIdx.x % kFp32StatsThreadsPerRow;
  const int row = queries.row_begin + row_of_tile;
  const bool exists = row_of_tile < queries.num_rows;

  float delta = 0;
  if (exists) {
    const auto row_of = [&](const float* tensor, const Strides& strides) {
      return tensor + batch * strides.batch + row * strides.row + head * strides.head;
    };
    const float* out = row_of(params.out, params.out_strides);
    const float* dout = row_of(params.dout, params.dout_strides);
#pragma unroll
    for (int i = 0; i < kFp32BwdHeadDim; i += 4 * kFp32StatsThreadsPerRow) {
      const int column = i + 4 * thread_of_row;
      if (column < params.head_dim_v) {
        const float4 a = *reinterpret_cast<const float4*>(out + column);
        const float4 b = *reinterpret_cast<const float4*>(dout + column);
        delta += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
      }
    }
  }
#pragma unroll
  for (int lanes = kFp32StatsThreadsPerRow / 2; lanes > 0; lanes /= 2) {
    delta += __shfl_xor_sync(0xffffffff, delta, lanes);
  }

  float lse_log2 = INFINITY, q_scale = 0, dout_scale = 0;
  if (exists) {
    const auto row_scale_of = [&](const float* scales, int batch_step) {
      return scales[(batch * batch_step * params.num_heads + head) * params.seqlen_q + row];
    };
    q_scale = row_scale_of(params.q_scales, params.q_batch_step);
    dout_scale = row_scale_of(params.dout_scales, params.dout_batch_step);
    const int64_t index = batch_head * params.seqlen_q + row;
    if (params.dlse != nullptr) delta -= params.dlse[index];
    if (params.lse[index] != -INFINITY) lse_log2 = params.lse[index] * std::numbers::log2e_v<float>;
    if (thread_of_row == 0) params.delta_of_rows[index] = delta;
  }
  const float largest_scale = block_max(dout_scale);

  QueryNumbers& q_numbers = params.stats.q[blockIdx.x];
  DoutNumbers& dout_numbers = params.stats.dout[blockIdx.x];
  if (thread_of_row == 0) {
    q_numbers.lse_log2[row_of_tile] = lse_log2;
    q_numbers.row_scales[row_of_tile] = q_scale;
    dout_numbers.delta[row_of_tile] = delta;
    dout_numbers.factors[row_of_tile] = dout_scale / largest_scale * 0x1p15f;
  }
  const bool has_references = __syncthreads_or(lse_log2 != INFINITY && needs_reference(lse_log2));
  const bool is_partial = queries.num_rows < kQueryTileRows;
  const int64_t first_row = batch_head * params.seqlen_q + queries.row_begin;
  RowReference* const references = params.scores.references + first_row;
  if (threadIdx.x == 0) {
    dout_numbers.row_scale = largest_scale * 0x1p-15f;
    dout_numbers.has_reference = has_references;
    dout_numbers.references = has_references || is_partial ? references : nullptr;
  }
  if (!has_references && !is_partial) return;
  find_references<float>(params.scores, run, queries, batch, head, params.lse + first_row, references,
                         [&](int row, float lse_log2) { q_numbers.lse_log2[row] = lse_log2; });
}

}  // namespace mixed_attention::cuda::hopper
