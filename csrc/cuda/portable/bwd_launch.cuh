// Launches the backward of one arithmetic and head_dim.
#pragma once

#include "cuda/portable/bwd_stats_kernel.cuh"
#include "cuda/portable/dk_dv_kernel.cuh"
#include "cuda/portable/dq_kernel.cuh"
#include "cuda/portable/dq_sum_kernel.cuh"
#include "cuda/portable/launch_common.cuh"
#include "cuda/portable/sum_kernel.cuh"

namespace mixed_attention::cuda::portable {

template <Arithmetic kArithmetic, int kHeadDim, Grads kGrads>
void launch_dk_dv(const BwdArguments& args, const InlineWork& in_parameters, unsigned grid) {
  constexpr auto kKernel = portable_dk_dv_kernel<kArithmetic, kHeadDim, kGrads>;
  constexpr int kSharedBytes = sizeof(DkDvShared<kArithmetic, kHeadDim, kGrads>);
  static_assert(kSharedBytes <= kMaxSharedBytes, "a block takes more shared memory than the smaller chips give");
  allow_shared_memory<kKernel>(kSharedBytes, args.params.device, "cudaFuncSetAttribute(portable_dk_dv_kernel)");
  const auto stream = static_cast<cudaStream_t>(args.params.stream);
  kKernel<<<grid, dk_dv_tile(kArithmetic, kHeadDim).num_threads(), kSharedBytes, stream>>>(args, in_parameters);
  check(cudaGetLastError(), "portable_dk_dv_kernel");
}

// Sums parts of a gradient and rounds them to its place, if there are parts.
template <class Element>
void sum_parts(const BwdParams& params, const float* partial, int num_splits, int64_t seqlen, int64_t num_cols,
               void* grad, const Strides& strides) {
  if (partial == nullptr) return;
  const SumArguments args{partial, num_splits, params.batch_size, params.num_heads, seqlen, num_cols, grad, strides};
  const int64_t rows = params.batch_size * params.num_heads * seqlen;
  portable_sum_kernel<Element><<<blocks_for(32 * rows, 256), 256, 0, static_cast<cudaStream_t>(params.stream)>>>(args);
  check(cudaGetLastError(), "portable_sum_kernel");
}

template <Arithmetic kArithmetic, int kHeadDim>
void launch_by_key(const BwdArguments& args, const InlineWork& in_parameters, const BwdPlan& plan, unsigned grid) {
  using Element = typename ProductsOf<kArithmetic>::Element;
  const BwdParams& params = args.params;
  if constexpr (!fuses_dk_dv(kHeadDim)) {
    launch_dk_dv<kArithmetic, kHeadDim, Grads::kKey>(args, in_parameters, grid);
    launch_dk_dv<kArithmetic, kHeadDim, Grads::kValue>(args, in_parameters, grid);
  } else if (plan.adds_dq) {
    launch_dk_dv<kArithmetic, kHeadDim, Grads::kAll>(args, in_parameters, grid);
  } else {
    launch_dk_dv<kArithmetic, kHeadDim, Grads::kKeyAndValue>(args, in_parameters, grid);
  }
  const int splits = plan.by_key.pass->num_splits;
  sum_parts<Element>(params, plan.partial_dk, splits, params.seqlen_k, params.head_dim, params.dk, params.dk_strides);
  sum_parts<Element>(params, plan.partial_dv, splits, params.seqlen_k, params.head_dim_v, params.dv, params.dv_strides);
}

template <Arithmetic kArithmetic, int kHeadDim>
void launch_by_query(BwdArguments& args, const BwdPlan& plan, unsigned grid) {
  constexpr auto kKernel = portable_dq_kernel<kArithmetic, kHeadDim>;
  constexpr int kSharedBytes = sizeof(DqShared<kArithmetic, kHeadDim>);
  static_assert(kSharedBytes <= kMaxSharedBytes, "a block takes more shared memory than the smaller chips give");
  const BwdParams& params = args.params;
  allow_shared_memory<kKernel>(kSharedBytes, params.device, "cudaFuncSetAttribute(portable_dq_kernel)");
  const Brought brought = bring(plan.by_query, params);
  args.work = brought.table;
  kKernel<<<grid, dq_tile(kArithmetic, kHeadDim).num_threads(), kSharedBytes,
            static_cast<cudaStream_t>(params.stream)>>>(args, brought.in_parameters);
  check(cudaGetLastError(), "portable_dq_kernel");
  sum_parts<typename ProductsOf<kArithmetic>::Element>(params, plan.partial_dq, brought.table.num_splits,
                                                       params.seqlen_q, params.head_dim, params.dq, params.dq_strides);
}

template <Arithmetic kArithmetic, int kHeadDim>
void launch_bwd(const BwdParams& params, const BwdPlan& plan) {
  using Element = typename ProductsOf<kArithmetic>::Element;
  const int64_t num_batch_heads = params.batch_size * params.num_heads, rows = num_batch_heads * params.seqlen_q;
  const auto stream = static_cast<cudaStream_t>(params.stream);
  const auto aligned = [](const void* data, const Strides& strides) {
    return is_aligned(data, strides, sizeof(Element));
  };
  const Brought brought = bring(plan.by_key, params);
  BwdArguments args{
      .params = params,
      .work = brought.table,
      .dropout = dropout_params(params),
      .softmax_scale = static_cast<float>(params.softmax_scale),
      .scale_log2 = static_cast<float>(params.softmax_scale * 1.44269504088896340736),
      .aligned = aligned(params.q, params.q_strides) && aligned(params.k, params.k_strides) &&
                 aligned(params.v, params.v_strides) && aligned(params.dout, params.dout_strides) &&
                 aligned(params.dq, params.dq_strides) && aligned(params.dk, params.dk_strides) &&
                 aligned(params.dv, params.dv_strides),
      .unit = is_16_bit(kArithmetic)             ? 0x1p-21f
              : kArithmetic == Arithmetic::kTf32 ? 0x1p-10f
                                                 : 0x1p-20f,
      .lse_log2 = plan.lse_log2,
      .delta = plan.delta,
      .references = plan.references,
      .has_references = plan.has_references,
      .partial_dq = plan.partial_dq,
      .partial_dk = plan.partial_dk,
      .partial_dv = plan.partial_dv,
      .dq_sum = {plan.dq_sum, plan.dq_sum_cols},
  };
  const auto* first_zero = reinterpret_cast<const char*>(plan.has_references);
  const auto* last_zero = reinterpret_cast<const char*>(plan.adds_dq ? plan.dq_sum + plan.dq_sum_size : nullptr);
  const size_t num_zeros = plan.adds_dq ? static_cast<size_t>(last_zero - first_zero) : sizeof(int);
  check(cudaMemsetAsync(plan.has_references, 0, num_zeros, stream), "cudaMemsetAsync");
  if (rows > 0) {
    portable_bwd_stats_kernel<Element><<<blocks_for(32 * rows, 256), 256, 0, stream>>>(args, brought.in_parameters);
    check(cudaGetLastError(), "portable_bwd_stats_kernel");
  }
  if (const unsigned grid = plan.by_key.pass->grid(num_batch_heads)) {
    launch_by_key<kArithmetic, kHeadDim>(args, brought.in_parameters, plan, grid);
  }
  if (plan.adds_dq) {
    if (rows == 0) return;
    portable_dq_sum_kernel<Element><<<blocks_for(32 * rows, 256), 256, 0, stream>>>(args);
    check(cudaGetLastError(), "portable_dq_sum_kernel");
  } else if (const unsigned grid = plan.by_query.pass->grid(num_batch_heads)) {
    launch_by_query<kArithmetic, kHeadDim>(args, plan, grid);
  }
}

}  // namespace mixed_attention::cuda::portable
