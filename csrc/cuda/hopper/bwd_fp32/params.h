// The parameters of the fp32 backward kernels as they travel to the device.
#pragma once

#include <cuda.h>

#include "cuda/hopper/bwd/params.h"
#include "cuda/hopper/bwd_fp32/config.h"
#include "cuda/hopper/plan/key_table.h"
#include "cuda/hopper/plan/query_table.h"
#include "params.h"

namespace mixed_attention::cuda::hopper {

// Two structs for each tile of queries: (batch_size, num_heads, num_tiles).
struct Fp32QueryStats {
  QueryNumbers* q;
  DoutNumbers* dout;
  int num_tiles;
};

// What the limbs of the inputs need beside their maps, which are those of all limbs: (num_limbs * num_sequences,
// seqlen, num_heads, head_dim or head_dim_v).
struct Fp32Inputs {
  const float *q_scales, *dout_scales, *k_scales, *v_scales;  // (num_sequences, num_heads, seqlen)
  LimbSteps limb_steps;
  int64_t seqlen_k;
};

struct Fp32BwdStatsKernelParams {
  static constexpr int kMaxRuns = WorkTable::kMaxSegments;

  const float* out;   // (batch_size, seqlen_q, num_heads, head_dim_v)
  const float* dout;  // likewise
  Strides out_strides, dout_strides;
  const float* lse;   // (batch_size, num_heads, seqlen_q)
  const float* dlse;  // likewise; or null
  int num_heads, head_dim_v;
  int64_t seqlen_q;
  const float *q_scales, *dout_scales;  // (num_sequences, num_heads, seqlen_q)
  int q_batch_step, dout_batch_step;    // 1, or 0 where one sequence serves the whole batch
  Fp32QueryStats stats;
  float* delta_of_rows;  // (batch_size, num_heads, seqlen_q)
  ScoreSource scores;
  int num_runs;
  QueryRun runs[kMaxRuns];
};

struct Fp32DkDvKernelParams : DkDvParamsOf<Fp32QueryStats> {
  Fp32Inputs inputs;
};

struct Fp32DqKernelParams : DqKernelParams {
  Fp32Inputs inputs;
};

// Larger parameters cost the launch time; newer drivers allow 32 KiB.
static_assert(sizeof(Fp32BwdStatsKernelParams) <= 4096 && sizeof(Fp32DkDvKernelParams) <= 4096 &&
                  sizeof(Fp32DqKernelParams) <= 4096,
              "kernel parameters beyond 4096 bytes cost the launch time");

}  // namespace mixed_attention::cuda::hopper
