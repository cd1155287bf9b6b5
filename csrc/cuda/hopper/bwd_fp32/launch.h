// The host's decisions about the fp32 backward, and its launcher.
#pragma once

#include <cstddef>
#include <vector>

#include "cuda/hopper/bwd_fp32/config.h"
#include "cuda/hopper/plan/key_table.h"
#include "cuda/hopper/split_fp16/half_limbs.h"
#include "params.h"

namespace mixed_attention::cuda::hopper {

// What lies where in params.workspace.
struct Fp32BwdWorkspace {
  HalfLimbs q, k, v, dout;
  QueryNumbers* q_numbers;    // (batch_size, num_heads, num_tiles)
  DoutNumbers* dout_numbers;  // likewise
  float* delta;               // (batch_size, num_heads, seqlen_q)
  RowReference* references;   // ScoreSource
  size_t size;
};

// params.workspace is the only pointer that it reads; it is null to learn the size. runs: make_query_runs.
Fp32BwdWorkspace fp32_bwd_workspace(const BwdParams& params, const std::vector<QueryRun>& runs);

// Whether rows of all tensors lie where the kernels can read and write them.
bool is_fp32_bwd_aligned(const BwdParams& params);

void launch_fp32_bwd(const BwdParams& params, const std::vector<QueryRun>& runs);

}  // namespace mixed_attention::cuda::hopper
