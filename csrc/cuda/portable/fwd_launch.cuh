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
  if (by_query.grid == 0) return;
  const FwdArguments args{
      params,
      by_query.table,
      dropout_params(params),
      static_cast<float>(params.softmax_scale),
      scale_log2_of_forward(params),
      are_aligned<Element>({{params.q, params.q_strides},
                            {params.k, params.k_strides},
                            {params.v, params.v_strides},
                            {params.out, params.out_strides}}),
      buffers.partial_out,
      buffers.row_lses,
  };
  launch_tiles<portable_fwd_kernel<kArithmetic, kHeadDim>, FwdShared<kArithmetic, kHeadDim>>("portable_fwd_kernel",
                                                                                             params, args, by_query);
  if (buffers.partial_out == nullptr) return;
  const auto stream = static_cast<cudaStream_t>(params.stream);
  const int64_t rows = params.batch_size * params.num_heads * params.seqlen_q;
  attention_combine_kernel<Element><<<blocks_for(32 * rows, 256), 256, 0, stream>>>(
      params, buffers.partial_out, buffers.row_lses, by_query.table.num_splits,
      AllRows{params.num_heads, params.seqlen_q, rows, args.scale, args.scale_log2});
  check(cudaGetLastError(), "attention_combine_kernel");
}

}  // namespace mixed_attention::cuda::portable
