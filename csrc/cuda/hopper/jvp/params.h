// The parameters of the kernels for tangents of the forward as they travel to the device.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/hopper/plan/query_table.h"
#include "derivatives_params.h"
#include "params.h"

namespace mixed_attention::cuda::hopper {

// A tensor and its tangent in one direction, as TMA reads them: tensor_map.h.
struct MovingMaps {
  CUtensorMap still, dot;                // (batch_size, seqlen, num_heads, head_dim or head_dim_v)
  int still_batch_step, dot_batch_step;  // 1, or 0 where one sequence serves the whole batch
  bool moves;                            // else there is no map of a tangent
};

struct JvpKernelParams {
  MovingMaps q, k, v;
  void* out;       // (batch_size, seqlen_q, num_heads, head_dim_v); null where it is known
  float* lse;      // (batch_size, num_heads, seqlen_q), likewise
  void* out_dot;   // (batch_size, seqlen_q, num_heads, head_dim_v)
  float* lse_dot;  // (batch_size, num_heads, seqlen_q)
  Strides out_strides, out_dot_strides;
  int64_t seqlen_q;
  int head_dim_v;  // at most the kernel's head_dim
  float softmax_scale, softmax_scale_log2;
  WorkTable table;
};

// Those of the kernel for three directions in which queries alone move.
struct DirectionsKernelParams {
  CUtensorMap q, k, v, q_dot[kMaxTangents];  // (batch_size, seqlen, num_heads, head_dim or head_dim_v)
  int q_batch_step, k_batch_step, v_batch_step, q_dot_batch_step;
  void* out;       // (batch_size, seqlen_q, num_heads, head_dim_v)
  float* lse;      // (batch_size, num_heads, seqlen_q)
  void* out_dot;   // (directions, batch_size, seqlen_q, num_heads, head_dim_v)
  float* lse_dot;  // (directions, batch_size, num_heads, seqlen_q)
  Strides out_strides, out_dot_strides;
  int64_t out_dot_step, lse_dot_step;  // from one direction to the next
  int64_t seqlen_q;
  int head_dim_v;
  float softmax_scale, softmax_scale_log2;
  WorkTable table;
};

}  // namespace mixed_attention::cuda::hopper
