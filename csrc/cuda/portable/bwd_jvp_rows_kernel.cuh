// What the backward of tangents knows of each query beside what that of the first order does.
#pragma once

#include "cuda/portable/bwd_jvp_arguments.cuh"

namespace mixed_attention::cuda::portable {

// Gamma, by one warp to a row (batch, head, query).
template <class Element>
__global__ void portable_bwd_jvp_rows_kernel(const __grid_constant__ BwdJvpArguments args) {
  const BwdParams& params = args.bwd.params;
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (index >= params.batch_size * params.num_heads * params.seqlen_q) return;
  const QueryRow query(params, index);
  const auto* out = query.in<Element>(params.out, params.out_strides);
  const auto* out_dot = query.in<Element>(args.out_dot, args.out_dot_strides);
  const auto* dout_dot = query.in<Element>(args.dout_dot, args.dout_dot_strides);
  const auto* dout = params.dout == nullptr ? nullptr : query.in<Element>(params.dout, params.dout_strides);
  float gamma = 0;
  for (int64_t col = threadIdx.x % 32; col < params.head_dim_v; col += 32) {
    gamma = fmaf(static_cast<float>(out_dot[col]), static_cast<float>(dout_dot[col]), gamma);
    if (dout != nullptr) gamma = fmaf(static_cast<float>(out[col]), static_cast<float>(dout[col]), gamma);
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) gamma += __shfl_xor_sync(0xFFFFFFFF, gamma, lanes);
  if (threadIdx.x % 32 != 0) return;
  args.bwd.delta[index] = params.dlse == nullptr ? gamma : gamma - static_cast<const float*>(params.dlse)[index];
}

}  // namespace mixed_attention::cuda::portable
