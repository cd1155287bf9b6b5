// The parameters of the fp32 backward kernels as they travel to the device.
#pragma once

#include <cuda.h>

#include "cuda/hopper/bwd/params.h"
#include "cuda/hopper/bwd_fp32/config.h"
#include "cuda/hopper/plan/key_table.h"
#include "cuda/hopper/plan/query_table.h"
#include "params.h"

namespace mixed_attention::cuda::hopper {

// One of the inputs as limbs (half_limbs.h), apart from its map, which is that of all limbs.
struct HalfInput {
  const float* row_scales;  // (num_sequences, num_heads, seqlen)
  int limb_step;            // by so many sequences the low limbs, if any, stand behind the high ones
  int batch_step;           // 1, or 0 where one sequence serves the whole batch
};

struct Fp32BwdStatsKernelParams {
  static constexpr int kMaxRuns = WorkTable::kMaxSegments;

  const float* out;   // (batch_size, seqlen_q, num_heads, head_dim)
  const float* dout;  // likewise
  Strides out_strides, dout_strides;
  const float* lse;   // (batch_size, num_heads, seqlen_q)
  const float* dlse;  // likewise; or null
  int num_heads, head_dim;
  int64_t seqlen_q;
  HalfInput q_limbs, dout_limbs;
  int num_tiles;              // of queries
  QueryNumbers* q_numbers;    // (batch_size, num_heads, num_tiles)
  DoutNumbers* dout_numbers;  // likewise
  float* delta_of_rows;       // (batch_size, num_heads, seqlen_q)
  ScoreSource scores;
  int num_runs;
  QueryRun runs[kMaxRuns];
};

struct Fp32DkDvKernelParams {
  CUtensorMap q_map, dout_map;  // (num_limbs * num_sequences, seqlen_q, num_heads, head_dim)
  CUtensorMap k_map, v_map;     // (num_limbs * num_sequences, seqlen_k, num_heads, head_dim)
  HalfInput q, dout, k, v;
  const QueryNumbers* q_numbers;    // (batch_size, num_heads, num_query_tiles)
  const DoutNumbers* dout_numbers;  // likewise
  int num_query_tiles;
  int64_t seqlen_k;
  float* dk;  // (batch_size, seqlen_k, num_heads, head_dim)
  float* dv;  // likewise
  Strides dk_strides, dv_strides;
  int head_dim;
  float softmax_scale, softmax_scale_log2;
  KeyWorkTable table;
};

struct Fp32DqKernelParams {
  CUtensorMap q_map, dout_map;  // (num_limbs * num_sequences, seqlen_q, num_heads, head_dim)
  CUtensorMap k_map, v_map;     // (num_limbs * num_sequences, seqlen_k, num_heads, head_dim)
  HalfInput q, dout, k, v;
  const float* lse;                // (batch_size, num_heads, seqlen_q)
  const float* delta;              // likewise
  const RowReference* references;  // likewise
  int64_t seqlen_q, seqlen_k;
  float* dq;  // (batch_size, seqlen_q, num_heads, head_dim)
  Strides dq_strides;
  int head_dim;
  float softmax_scale, softmax_scale_log2;
  WorkTable table;
};

// Larger parameters cost the launch time; newer drivers allow 32 KiB.
static_assert(sizeof(Fp32BwdStatsKernelParams) <= 4096 && sizeof(Fp32DkDvKernelParams) <= 4096 &&
                  sizeof(Fp32DqKernelParams) <= 4096,
              "kernel parameters beyond 4096 bytes cost the launch time");

}  // namespace mixed_attention::cuda::hopper
