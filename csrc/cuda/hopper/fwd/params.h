// The parameters of the forward kernel as they travel to the device.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/common/row_lse.h"
#include "cuda/hopper/plan/query_table.h"
#include "params.h"

namespace mixed_attention::cuda::hopper {

// The row_scales of fp32 inputs, and by how many sequences their limbs stand behind one another: half_limbs.h.
struct FwdRowScales {
  const float *q, *k, *v;  // (num_sequences, num_heads, seqlen)
  int q_limb_step, k_limb_step, v_limb_step;
  int64_t seqlen_k;
};

struct FwdKernelParams {
  // Maps of (batch_size, seqlen_q, num_heads, head_dim) and (batch_size, seqlen_k, num_heads, head_dim or head_dim_v),
  // limbs of fp32 one behind the other as sequences: tensor_map.h.
  CUtensorMap q, k, v;
  // 1, or 0 where one sequence serves the whole batch.
  int q_batch_step, k_batch_step, v_batch_step;
  void* out;   // (batch_size, seqlen_q, num_heads, head_dim_v)
  float* lse;  // (batch_size, num_heads, seqlen_q)
  Strides out_strides;
  int64_t seqlen_q;
  int head_dim_v, head_dim;       // at most the kernel's head_dim
  float* partial_out;             // (splits, kBlockM, head_dim_v): FwdPlan; null without splits
  RowLse* row_lses;               // (splits, kBlockM), likewise
  const uint32_t* key_mask_bits;  // (num_sequences, num_words): mask.h; null without a mask
  int key_mask_step;              // words from one sequence to the next
  float softmax_scale, softmax_scale_log2;
  FwdRowScales row_scales;  // none of 16-bit inputs
  WorkTable table;
};

// Larger parameters cost the launch time; newer drivers allow 32 KiB.
static_assert(sizeof(FwdKernelParams) <= 4096, "kernel parameters beyond 4096 bytes cost the launch time");

}  // namespace mixed_attention::cuda::hopper
