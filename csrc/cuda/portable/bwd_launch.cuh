// Launches the backward of one arithmetic and head_dim.
#pragma once

#include "cuda/portable/bwd_stats_kernel.cuh"
#include "cuda/portable/dk_dv_kernel.cuh"
#include "cuda/portable/dq_accum_kernel.cuh"
#include "cuda/portable/dq_kernel.cuh"
#include "cuda/portable/launch_common.cuh"
#include "cuda/portable/sum_kernel.cuh"

namespace mixed_attention::cuda::portable {

template <Arithmetic kArithmetic, int kHeadDim, Grads kGrads>
void launch_dk_dv(const BwdArguments& args, const GridWork& by_key) {
  launch_tiles<portable_dk_dv_kernel<kArithmetic, kHeadDim, kGrads>, DkDvShared<kArithmetic, kHeadDim, kGrads>>(
      "portable_dk_dv_kernel", args.params, args, by_key);
}

// Sums the splits of a gradient and rounds them to its place, if there are splits.
template <class Element>
void sum_splits(const BwdParams& params, const float* partial, int num_splits, int64_t seqlen, int64_t num_cols,
                void* grad, const Strides& strides) {
  if (partial == nullptr) return;
  const SumArguments args{partial, num_splits, params.batch_size, params.num_heads, seqlen, num_cols, grad, strides};
  const int64_t rows = params.batch_size * params.num_heads * seqlen;
  portable_sum_kernel<Element><<<blocks_for(32 * rows, 256), 256, 0, static_cast<cudaStream_t>(params.stream)>>>(args);
  check(cudaGetLastError(), "portable_sum_kernel");
}

// Those of the gradients of keys and values.
template <class Element>
void sum_splits_of_keys(const BwdParams& params, const BwdBuffers& buffers, int num_splits) {
  sum_splits<Element>(params, buffers.partial_dk, num_splits, params.seqlen_k, params.head_dim, params.dk,
                      params.dk_strides);
  sum_splits<Element>(params, buffers.partial_dv, num_splits, params.seqlen_k, params.head_dim_v, params.dv,
                      params.dv_strides);
}

template <Arithmetic kArithmetic>
BwdArguments bwd_arguments(const BwdParams& params, const BwdBuffers& buffers, const DeviceWork& work) {
  return {
      .params = params,
      .work = work,
      .dropout = dropout_params(params),
      .softmax_scale = static_cast<float>(params.softmax_scale),
      .scale_log2 = static_cast<float>(params.softmax_scale * std::numbers::log2e),
      .aligned = are_aligned<typename MmaOf<kArithmetic>::Element>({{params.q, params.q_strides},
                                                                    {params.k, params.k_strides},
                                                                    {params.v, params.v_strides},
                                                                    {params.dout, params.dout_strides},
                                                                    {params.dq, params.dq_strides},
                                                                    {params.dk, params.dk_strides},
                                                                    {params.dv, params.dv_strides}}),
      .unit = is_16_bit(kArithmetic)             ? 0x1p-21f
              : kArithmetic == Arithmetic::kTf32 ? 0x1p-10f
                                                 : 0x1p-20f,
      .lse_log2 = buffers.lse_log2,
      .delta = buffers.delta,
      .references = buffers.references,
      .has_references = buffers.has_references,
      .partial_dq = buffers.partial_dq,
      .partial_dk = buffers.partial_dk,
      .partial_dv = buffers.partial_dv,
      .dq_accum = {buffers.dq_accum, buffers.dq_accum_cols},
  };
}

template <Arithmetic kArithmetic, int kHeadDim>
void launch_bwd_by_key(const BwdParams& params, const BwdBuffers& buffers, const GridWork& by_key) {
  using Element = typename MmaOf<kArithmetic>::Element;
  const int64_t rows = params.batch_size * params.num_heads * params.seqlen_q;
  const auto stream = static_cast<cudaStream_t>(params.stream);
  const BwdArguments args = bwd_arguments<kArithmetic>(params, buffers, by_key.table);
  const bool adds_dq = buffers.dq_accum != nullptr;
  const auto* first_zero = reinterpret_cast<const char*>(buffers.has_references);
  const auto* last_zero = reinterpret_cast<const char*>(adds_dq ? buffers.dq_accum + buffers.dq_accum_size : nullptr);
  const size_t num_zeros = adds_dq ? static_cast<size_t>(last_zero - first_zero) : sizeof(int);
  check(cudaMemsetAsync(buffers.has_references, 0, num_zeros, stream), "cudaMemsetAsync");
  if (rows > 0) {
    portable_bwd_stats_kernel<Element><<<blocks_for(32 * rows, 256), 256, 0, stream>>>(args, by_key.in_parameters);
    check(cudaGetLastError(), "portable_bwd_stats_kernel");
  }
  if (by_key.grid > 0) {
    if constexpr (!fuses_dk_dv(kHeadDim)) {
      launch_dk_dv<kArithmetic, kHeadDim, Grads::kKey>(args, by_key);
      launch_dk_dv<kArithmetic, kHeadDim, Grads::kValue>(args, by_key);
    } else if (adds_dq) {
      launch_dk_dv<kArithmetic, kHeadDim, Grads::kAll>(args, by_key);
    } else {
      launch_dk_dv<kArithmetic, kHeadDim, Grads::kKeyAndValue>(args, by_key);
    }
    sum_splits_of_keys<Element>(params, buffers, by_key.table.num_splits);
  }
  if (adds_dq && rows > 0) {
    portable_dq_accum_kernel<Element><<<blocks_for(32 * rows, 256), 256, 0, stream>>>(args);
    check(cudaGetLastError(), "portable_dq_accum_kernel");
  }
}

template <Arithmetic kArithmetic, int kHeadDim>
void launch_bwd_by_query(const BwdParams& params, const BwdBuffers& buffers, const GridWork& by_query) {
  if (by_query.grid == 0) return;
  const BwdArguments args = bwd_arguments<kArithmetic>(params, buffers, by_query.table);
  launch_tiles<portable_dq_kernel<kArithmetic, kHeadDim>, DqShared<kArithmetic, kHeadDim>>("portable_dq_kernel", params,
                                                                                           args, by_query);
  sum_splits<typename MmaOf<kArithmetic>::Element>(params, args.partial_dq, by_query.table.num_splits, params.seqlen_q,
                                                   params.head_dim, params.dq, params.dq_strides);
}

}  // namespace mixed_attention::cuda::portable
