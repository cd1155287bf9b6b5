// Launches the backward of one arithmetic and head_dim.
#pragma once

#include "cuda/portable/bwd_kernel.cuh"
#include "cuda/portable/combine_kernel.cuh"
#include "cuda/portable/launch_common.cuh"

namespace mixed_attention::cuda::portable {

template <Arithmetic kArithmetic, int kHeadDim, Grads kGrads>
void launch_dk_dv(const BwdArguments& args, const InlineWork& in_parameters, unsigned grid) {
  constexpr auto kKernel = portable_dk_dv_kernel<kArithmetic, kHeadDim, kGrads>;
  constexpr int kSharedBytes = sizeof(DkDvShared<kArithmetic, kHeadDim>);
  static_assert(kSharedBytes <= 99 * 1024);
  allow_shared_memory<kKernel>(kSharedBytes);
  const auto stream = static_cast<cudaStream_t>(args.params.stream);
  kKernel<<<grid, bwd_tile(kArithmetic, kHeadDim).num_threads(), kSharedBytes, stream>>>(args, in_parameters);
  check(cudaGetLastError(), "portable_dk_dv_kernel");
}

template <class Element>
void sum_parts(const BwdParams& params, const float* partial, int num_splits, int64_t seqlen, int64_t num_cols,
               void* grad, const Strides& strides) {
  if (partial == nullptr) return;
  const SumArguments args{partial, num_splits, params.batch_size, params.num_heads, seqlen, num_cols, grad, strides};
  const int64_t size = params.batch_size * params.num_heads * seqlen * num_cols;
  portable_sum_kernel<Element><<<blocks_for(size, 256), 256, 0, static_cast<cudaStream_t>(params.stream)>>>(args);
  check(cudaGetLastError(), "portable_sum_kernel");
}

template <Arithmetic kArithmetic, int kHeadDim>
void launch_bwd(const BwdParams& params, const BwdPlan& plan) {
  using Element = typename ProductsOf<kArithmetic>::Element;
  constexpr int kSize = sizeof(Element);
  const int64_t copies = params.batch_size * params.num_heads;
  const auto stream = static_cast<cudaStream_t>(params.stream);
  const auto aligned = [](const void* data, const Strides& strides) { return is_aligned(data, strides, kSize); };
  BwdArguments args{
      params,
      {},
      dropout_params(params),
      static_cast<float>(params.softmax_scale),
      static_cast<float>(params.softmax_scale * 1.44269504088896340736),
      aligned(params.q, params.q_strides) && aligned(params.k, params.k_strides) &&
          aligned(params.v, params.v_strides) && aligned(params.dout, params.dout_strides) &&
          aligned(params.dq, params.dq_strides) && aligned(params.dk, params.dk_strides) &&
          aligned(params.dv, params.dv_strides),
      plan.lse_log2,
      plan.delta,
      plan.partial_dq,
      plan.partial_dk,
      plan.partial_dv,
  };
  if (const int64_t rows = copies * params.seqlen_q; rows > 0) {
    portable_bwd_stats_kernel<Element><<<blocks_for(32 * rows, 256), 256, 0, stream>>>(args);
    check(cudaGetLastError(), "portable_bwd_stats_kernel");
  }
  if (const unsigned grid = plan.by_key.grid(copies); grid > 0) {
    args.work = plan.by_key.table;
    const InlineWork in_parameters = bring(plan.by_key, params.stream);
    if constexpr (fuses_dk_dv(kHeadDim)) {
      launch_dk_dv<kArithmetic, kHeadDim, Grads::kKeyAndValue>(args, in_parameters, grid);
    } else {
      launch_dk_dv<kArithmetic, kHeadDim, Grads::kKey>(args, in_parameters, grid);
      launch_dk_dv<kArithmetic, kHeadDim, Grads::kValue>(args, in_parameters, grid);
    }
    const int splits = plan.by_key.table.num_splits;
    sum_parts<Element>(params, plan.partial_dk, splits, params.seqlen_k, params.head_dim, params.dk, params.dk_strides);
    sum_parts<Element>(params, plan.partial_dv, splits, params.seqlen_k, params.head_dim_v, params.dv,
                       params.dv_strides);
  }
  if (const unsigned grid = plan.by_query.grid(copies); grid > 0) {
    constexpr auto kKernel = portable_dq_kernel<kArithmetic, kHeadDim>;
    constexpr int kSharedBytes = sizeof(DqShared<kArithmetic, kHeadDim>);
    static_assert(kSharedBytes <= 99 * 1024);
    allow_shared_memory<kKernel>(kSharedBytes);
    args.work = plan.by_query.table;
    const InlineWork in_parameters = bring(plan.by_query, params.stream);
    kKernel<<<grid, bwd_tile(kArithmetic, kHeadDim).num_threads(), kSharedBytes, stream>>>(args, in_parameters);
    check(cudaGetLastError(), "portable_dq_kernel");
    sum_parts<Element>(params, plan.partial_dq, plan.by_query.table.num_splits, params.seqlen_q, params.head_dim,
                       params.dq, params.dq_strides);
  }
}

}  // namespace mixed_attention::cuda::portable
