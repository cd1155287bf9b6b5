// Rounds dq_accum to dq.
#pragma once

#include "cuda/portable/bwd_arguments.cuh"

namespace mixed_attention::cuda::portable {

// One warp to a row.
template <class Element>
__global__ void portable_dq_accum_kernel(const __grid_constant__ BwdArguments args) {
  const BwdParams& params = args.params;
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (index >= params.batch_size * params.num_heads * params.seqlen_q) return;
  const int64_t row = index % params.seqlen_q, batch_head = index / params.seqlen_q;
  Element* dq = static_cast<Element*>(params.dq) + batch_head / params.num_heads * params.dq_strides.batch +
                row * params.dq_strides.row + batch_head % params.num_heads * params.dq_strides.head;
  for (int col = threadIdx.x % 32; col < params.head_dim; col += 32) {
    dq[col] = Element(args.dq_accum.at(index, col) * args.softmax_scale);
  }
}

}  // namespace mixed_attention::cuda::portable
