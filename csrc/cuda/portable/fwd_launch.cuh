// Launches the forward of one arithmetic and head_dim.
#pragma once

#include "cuda/common/combine_kernel.cuh"
#include "cuda/portable/fwd_kernel.cuh"
#include "cuda/portable/launch_common.cuh"

namespace mixed_attention::cuda::portable {

// All rows of the output; their splits (num_splits, batch_size, num_heads, seqlen_q).
struct AllRows {
  int64_t num_heads, seqlen_q, num_rows;
  float scale, scale_log2;

  __device__ SplitRow find(int64_t index) const {
    const int64_t batch_head = index / seqlen_q;
    return {index < num_rows, batch_head / num_heads, batch_head % num_heads, index % seqlen_q, index, num_rows, scale,
            scale_log2};
  }
};

template <Arithmetic kArithmetic, int kHeadDim>
void launch_fwd(const FwdParams& params, const FwdBuffers& buffers, const GridWork& by_query) {
  using Element = typename MmaOf<kArithmetic>::Element;
  constexpr auto kKernel = portable_fwd_kernel<kArithmetic, kHeadDim>;
  constexpr int kSharedBytes = sizeof(FwdShared<kArithmetic, kHeadDim>), kSize = sizeof(Element);
  static_assert(kSharedBytes <= kMaxSharedBytes, "a block takes more shared memory than the smaller chips give");
  const int64_t num_batch_heads = params.batch_size * params.num_heads;
  if (by_query.grid == 0) return;
  const auto stream = static_cast<cudaStream_t>(params.stream);
  const double scale_log2 = params.softmax_scale * 1.44269504088896340736;
  const FwdArguments args{
      params,
      by_query.table,
      dropout_params(params),
      static_cast<float>(params.softmax_scale),
      // Not 0, by which the -inf of blocked keys would become NaN, but next to it even times the largest score.
      std::max(static_cast<float>(scale_log2), std::numeric_limits<float>::denorm_min()),
      is_aligned(params.q, params.q_strides, kSize) && is_aligned(params.k, params.k_strides, kSize) &&
          is_aligned(params.v, params.v_strides, kSize) && is_aligned(params.out, params.out_strides, kSize),
      buffers.partial_out,
      buffers.row_lses,
  };
  allow_shared_memory<kKernel>(kSharedBytes, params.device, "cudaFuncSetAttribute(portable_fwd_kernel)");
  kKernel<<<by_query.grid, fwd_tile(kArithmetic, kHeadDim).num_threads(), kSharedBytes, stream>>>(
      args, by_query.in_parameters);
  check(cudaGetLastError(), "portable_fwd_kernel");
  if (buffers.partial_out == nullptr) return;
  const int64_t rows = num_batch_heads * params.seqlen_q;
  attention_combine_kernel<Element><<<blocks_for(32 * rows, 256), 256, 0, stream>>>(
      params, buffers.partial_out, buffers.row_lses, by_query.table.num_splits,
      AllRows{params.num_heads, params.seqlen_q, rows, args.scale, args.scale_log2});
  check(cudaGetLastError(), "attention_combine_kernel");
}

}  // namespace mixed_attention::cuda::portable
