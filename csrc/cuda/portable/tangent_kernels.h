// What the objects of kernels of tangents offer to the host beside kernels.h.
#pragma once

#include "cuda/portable/kernels.h"
#include "derivatives_params.h"

namespace mixed_attention::cuda::portable {

// Where a backward of tangents has what in its workspace.
struct BwdJvpBuffers {
  BwdBuffers bwd;         // its delta: gamma (bwd_jvp_arguments.cuh); nothing is added to a dq_accum
  float* eps;             // (batch_size, num_heads, seqlen_q)
  float* partial_dq_dot;  // (num_splits, batch_size, num_heads, seqlen_q, head_dim); null without splits
};

// Instantiated by cuda/instantiate_portable_tangents.cu for has_tangents (tangent_config.h) alone. They enqueue on
// params.stream.
template <Arithmetic kArithmetic, int kHeadDim>
void launch_jvp(const JvpParams& params, const GridWork& by_query);

// The numbers of rows that the launches of gradients read.
template <Arithmetic kArithmetic, int kHeadDim>
void launch_bwd_jvp_rows(const BwdJvpParams& params, const BwdJvpBuffers& buffers, const GridWork& by_key);

// dk and dv.
template <Arithmetic kArithmetic, int kHeadDim>
void launch_bwd_jvp_by_key(const BwdJvpParams& params, const BwdJvpBuffers& buffers, const GridWork& by_key);

// dq and the gradient of q's tangent.
template <Arithmetic kArithmetic, int kHeadDim>
void launch_bwd_jvp_by_query(const BwdJvpParams& params, const BwdJvpBuffers& buffers, const GridWork& by_query);

}  // namespace mixed_attention::cuda::portable
