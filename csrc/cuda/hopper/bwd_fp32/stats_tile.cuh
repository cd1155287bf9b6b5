// The statistics of a tile of fp32 queries on their way to global memory: bwd/stats_kernel.cuh.
#pragma once

#include <cstdint>

#include "cuda/hopper/bwd/stats_kernel.cuh"
#include "cuda/hopper/split_fp16/row_scales.cuh"

namespace mixed_attention::cuda::hopper {

// The largest of a block's numbers, none of which is negative.
template <int kThreads>
__device__ inline float block_max(float x) {
  __shared__ uint32_t of_warps[kThreads / 32];
  of_warps[threadIdx.x / 32] = __reduce_max_sync(0xffffffff, __float_as_uint(x));
  __syncthreads();
  uint32_t largest = 0;
  for (uint32_t bits : of_warps) largest = max(largest, bits);
  return __uint_as_float(largest);
}

// A thread puts one row at most.
template <>
class StatsTile<Fp32BwdStatsKernelParams> {
  using Params = Fp32BwdStatsKernelParams;
  using Shape = BwdStatsShape<float, kFp32BwdHeadDim>;
  static_assert(Shape::kRowsOfThread == 1, "a thread remembers the scale of a single row");

 public:
  __device__ StatsTile(const Params& params, int64_t tile) : q_(params.stats.q[tile]), dout_(params.stats.dout[tile]) {}

  __device__ void put(const Params& params, const StatsRow& row, float lse_log2, float delta) {
    const auto row_scale_of = [&](const float* scales, int batch_step) {
      if (!row.exists) return 0.f;
      return row_scales_of_head(scales, row, batch_step, params.num_heads, params.seqlen_q)[row.row];
    };
    row_of_tile_ = row.row_of_tile;
    dout_scale_ = row_scale_of(params.dout_scales, params.dout_batch_step);
    put_lse(row_of_tile_, lse_log2);
    q_.row_scales[row_of_tile_] = row_scale_of(params.q_scales, params.q_batch_step);
    dout_.delta[row_of_tile_] = delta;
  }

  __device__ void put_lse(int row_of_tile, float lse_log2) { q_.lse_log2[row_of_tile] = lse_log2; }

  __device__ void finish(RowReference* references, bool has_references, bool is_partial) {
    const float largest_scale = block_max<Shape::kThreads>(dout_scale_);
    if (row_of_tile_ >= 0) dout_.factors[row_of_tile_] = dout_scale_ / largest_scale * 0x1p15f;
    if (threadIdx.x != 0) return;
    dout_.row_scale = largest_scale * 0x1p-15f;
    dout_.has_reference = has_references;
    dout_.references = has_references || is_partial ? references : nullptr;
  }

 private:
  QueryNumbers& q_;
  DoutNumbers& dout_;
  int row_of_tile_ = -1;  // of the row that this thread put
  float dout_scale_ = 0;
};

}  // namespace mixed_attention::cuda::hopper
