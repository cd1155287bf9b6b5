// The host's decisions about the fp32 backward, and its launcher.
#pragma once

#include <cstddef>

#include "cuda/hopper/bwd_fp32/config.h"
#include "cuda/hopper/split_fp16/half_limbs.h"
#include "params.h"

namespace mixed_attention::cuda::hopper {

// The partS of params.workspace.
struct Fp32BwdWorkspace {
  HalfLimbs q, k, v, dout;
  QueryNumbers* q_numbers;    // (batch_size, num_heads, num_tiles)
  DoutNumbers* dout_numbers;  // likewise
  float* delta;               // (batch_size, num_heads, seqlen_q)
  RowReference* references;   // ScoreSource
  size_t size;
};

// params.workspace is the only pointer that it reads; it is null to learn the size.
Fp32BwdWorkspace fp32_bwd_workspace(const BwdParams& params);

// True if a call can be served whose problem can.
bool can_fp32_bwd(const BwdParams& params);

void launch_fp32_bwd(const BwdParams& params);

}  // namespace mixed_attention::cuda::hopper
