// What the backward knows of each query before it begins: its log-sum-exp, delta, and a reference for large scores.
#pragma once

#include "cuda/common/row_reference.cuh"
#include "cuda/portable/bwd_arguments.cuh"

namespace mixed_attention::cuda::portable {

// By eight lanes. work: key segments, each with the queries that read it.
template <class Element>
__device__ RowReference find_reference(const BwdArguments& args, const WorkView& work, const QueryRow& query) {
  const BwdParams& params = args.params;
  const Element* k = query.in<Element>(params.k, {params.k_strides.batch, 0, params.k_strides.head});
  const bool* mask = params.key_padding_mask;
  if (mask != nullptr) mask += query.batch * params.key_padding_mask_batch_stride;
  const auto for_each_key = [&](const auto& visit) {
    for (int i = 0; i < args.work.num_segments; ++i) {
      const WorkSegment& segment = work.segments[i];
      for (int j = 0; j < segment.num_ranges; ++j) {
        const WorkRange& readers = work.ranges[segment.first_range + j];
        if (query.row < readers.begin || query.row >= readers.end) continue;
        for (int key = segment.row_begin; key < segment.row_end; ++key) {
          if (mask == nullptr || mask[key]) visit(k + key * params.k_strides.row);
        }
      }
    }
  };
  return cuda::find_reference(query.in<Element>(params.q, params.q_strides), static_cast<int>(params.head_dim),
                              args.scale_log2, args.unit, for_each_key);
}

// One warp to a row (batch, head, query) of lse_log2, delta and references.
template <class Element>
__global__ void portable_bwd_stats_kernel(const __grid_constant__ BwdArguments args,
                                          const __grid_constant__ InlineWork in_parameters) {
  const BwdParams& params = args.params;
  const int64_t num_rows = params.batch_size * params.num_heads * params.seqlen_q;
  const auto index_of = [](int lanes) {
    return (static_cast<int64_t>(blockIdx.x) * blockDim.x) / 32 + static_cast<int>(threadIdx.x) / lanes;
  };
  const int64_t index = min(index_of(32), num_rows - 1);
  const QueryRow query(params, index);
  const auto* out = query.in<Element>(params.out, params.out_strides);
  const auto* dout = query.in<Element>(params.dout, params.dout_strides);
  float delta = 0;
  for (int64_t col = threadIdx.x % 32; col < params.head_dim_v; col += 32) {
    delta += static_cast<float>(out[col]) * static_cast<float>(dout[col]);
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) delta += __shfl_xor_sync(0xFFFFFFFF, delta, lanes);
  const float* lse = static_cast<const float*>(params.lse);
  if (threadIdx.x % 32 == 0) {
    // +inf makes p of a row without keys zero.
    args.lse_log2[index] = lse[index] == -INFINITY ? INFINITY : lse[index] * kLog2E;
    args.delta[index] = params.dlse == nullptr ? delta : delta - static_cast<const float*>(params.dlse)[index];
    args.references[index] = {0, -INFINITY, 0};
  }
  if (!__syncthreads_or(needs_reference(lse[index] * kLog2E))) return;
  if (threadIdx.x == 0) *args.has_references = 1;

  constexpr int kLanes = RowProducts<Element>::kLanes;
  const int64_t own = index_of(kLanes);
  if (threadIdx.x >= blockDim.x / 32 * kLanes || own >= num_rows || !needs_reference(lse[own] * kLog2E)) return;
  const RowReference reference = find_reference<Element>(args, view(args.work, in_parameters), QueryRow(params, own));
  if (threadIdx.x % kLanes != 0) return;
  args.references[own] = reference;
  args.lse_log2[own] = reference.sum_log2;
}

}  // namespace mixed_attention::cuda::portable
