// The backward of out and its tangents together, in two kernels, one over tiles of queries and one over tiles of keys.
// Both recompute p, behind small kernels that prepare three numbers for each query. Nothing is added
// atomically, and repeats are bitwise equal.
//
// With m dropout's factors, y and y2 the gradients of out' and out, and, of a row,
//
//   mu = lse'     eps = <y, out> - dlse'     gamma = <y, out'> + <y2, out> - dlse
//
// for each pair: z = s' - mu, g = p (m y · v - eps), ds = p (m (y2 · v + y · v') - gamma) + z g, and
//
//   dq = scale (ds k + g k')     dk = scale (dsᵀ q + gᵀ q')     dv = (m p)ᵀ y2 + (m p z)ᵀ y     dq' = scale g k
#pragma once

#include "cuda/portable/block_context.cuh"
#include "cuda/portable/bwd_arguments.cuh"
#include "cuda/portable/dropout_marks.cuh"
#include "cuda/portable/scores.cuh"
#include "cuda/portable/store_grad.cuh"
#include "cuda/portable/tangent_config.h"
#include "cuda/portable/tensor_core.cuh"
#include "derivatives_params.h"

namespace mixed_attention::cuda::portable {

// Of one direction.
struct BwdJvpArguments {
  BwdArguments bwd;  // its delta: gamma
  Tangents tangents;
  const void* out_dot;
  const void* dout_dot;
  void* dq_dot;  // or null
  Strides out_dot_strides, dout_dot_strides, dq_dot_strides;
  const float* mu;        // (batch_size, num_heads, seqlen_q)
  float* eps;             // likewise
  float* partial_dq_dot;  // BwdJvpBuffers
};

// What becomes of the scores of a pair. On entry p bears the marks of dropped ones, and e and x, which are products of
// gradients with values, dropout's factors; z is s' but for the scale.
struct PairGradients {
  float g, ds, pz;

  __device__ PairGradients(float p, float e, float x, float z, float scale, float mu, float eps, float gamma) {
    const float own = fabsf(p), moved = fmaf(z, scale, -mu);
    g = own * (e - eps);
    ds = fmaf(moved, g, own * (x - gamma));
    pz = own * moved;
  }
};

}  // namespace mixed_attention::cuda::portable
