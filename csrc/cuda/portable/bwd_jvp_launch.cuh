// Launches the backward of out and its tangents, of one arithmetic and head_dim.
#pragma once

#include "cuda/portable/bwd_jvp_rows_kernel.cuh"
#include "cuda/portable/bwd_launch.cuh"
#include "cuda/portable/dk_dv_jvp_kernel.cuh"
#include "cuda/portable/dq_jvp_kernel.cuh"
#include "cuda/portable/tangent_kernels.h"

namespace mixed_attention::cuda::portable {

template <Arithmetic kArithmetic>
BwdJvpArguments bwd_jvp_arguments(const BwdJvpParams& params, const BwdJvpBuffers& buffers, const DeviceWork& work) {
  const Tangents& tangents = params.tangents;
  BwdJvpArguments args{
      .bwd = bwd_arguments<kArithmetic>(params, buffers.bwd, work),
      .tangents = tangents,
      .out_dot = params.out_dot,
      .dout_dot = params.dout_dot,
      .dq_dot = params.dq_dot,
      .out_dot_strides = params.out_dot_strides,
      .dout_dot_strides = params.dout_dot_strides,
      .dq_dot_strides = params.dq_dot_strides,
      .mu = static_cast<const float*>(params.lse_dot),
      .eps = buffers.eps,
      .partial_dq_dot = buffers.partial_dq_dot,
  };
  args.bwd.aligned &= are_aligned<typename MmaOf<kArithmetic>::Element>({{params.dout_dot, params.dout_dot_strides},
                                                                         {params.dq_dot, params.dq_dot_strides},
                                                                         {tangents.q, tangents.q_strides},
                                                                         {tangents.k, tangents.k_strides},
                                                                         {tangents.v, tangents.v_strides}});
  return args;
}

// Finds the numbers of each query. Where out' alone has a gradient, eps is what the first order calls delta.
template <class Element>
void launch_rows(const BwdJvpParams& params, const BwdJvpArguments& args, const InlineWork& in_parameters) {
  const int64_t rows = params.batch_size * params.num_heads * params.seqlen_q;
  if (rows == 0) return;
  const auto stream = static_cast<cudaStream_t>(params.stream);
  BwdArguments first_order = args.bwd;
  first_order.params.dout = params.dout_dot;
  first_order.params.dout_strides = params.dout_dot_strides;
  first_order.params.dlse = params.dlse_dot;
  first_order.delta = args.eps;
  const unsigned grid = blocks_for(32 * rows, 256);
  portable_bwd_stats_kernel<Element><<<grid, 256, 0, stream>>>(first_order, in_parameters);
  check(cudaGetLastError(), "portable_bwd_stats_kernel");
  portable_bwd_jvp_rows_kernel<Element><<<grid, 256, 0, stream>>>(args);
  check(cudaGetLastError(), "portable_bwd_jvp_rows_kernel");
}

template <Arithmetic kArithmetic, int kHeadDim>
void launch_bwd_jvp_rows(const BwdJvpParams& params, const BwdJvpBuffers& buffers, const GridWork& by_key) {
  const auto stream = static_cast<cudaStream_t>(params.stream);
  check(cudaMemsetAsync(buffers.bwd.has_references, 0, sizeof(int), stream), "cudaMemsetAsync");
  launch_rows<typename MmaOf<kArithmetic>::Element>(
      params, bwd_jvp_arguments<kArithmetic>(params, buffers, by_key.table), by_key.in_parameters);
}

template <Arithmetic kArithmetic, int kHeadDim>
void launch_bwd_jvp_by_key(const BwdJvpParams& params, const BwdJvpBuffers& buffers, const GridWork& by_key) {
  using Element = typename MmaOf<kArithmetic>::Element;
  const BwdJvpArguments args = bwd_jvp_arguments<kArithmetic>(params, buffers, by_key.table);
  if (by_key.grid == 0) return;
  launch_tiles<portable_dk_dv_jvp_kernel<kArithmetic, kHeadDim>, DkDvJvpShared<kArithmetic, kHeadDim>>(
      "portable_dk_dv_jvp_kernel", params, args, by_key);
  sum_splits_of_keys<Element>(params, buffers.bwd, by_key.table.num_splits);
}

template <Arithmetic kArithmetic, int kHeadDim>
void launch_bwd_jvp_by_query(const BwdJvpParams& params, const BwdJvpBuffers& buffers, const GridWork& by_query) {
  using Element = typename MmaOf<kArithmetic>::Element;
  if (by_query.grid == 0) return;
  launch_tiles<portable_dq_jvp_kernel<kArithmetic, kHeadDim>, DqJvpShared<kArithmetic, kHeadDim>>(
      "portable_dq_jvp_kernel", params, bwd_jvp_arguments<kArithmetic>(params, buffers, by_query.table), by_query);
  const int splits = by_query.table.num_splits;
  sum_splits<Element>(params, buffers.bwd.partial_dq, splits, params.seqlen_q, params.head_dim, params.dq,
                      params.dq_strides);
  sum_splits<Element>(params, buffers.partial_dq_dot, splits, params.seqlen_q, params.head_dim, params.dq_dot,
                      params.dq_dot_strides);
}

}  // namespace mixed_attention::cuda::portable
