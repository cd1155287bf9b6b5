// Launches the tangents of the forward, of one arithmetic and head_dim.
#pragma once

#include <algorithm>
#include <limits>

#include "cuda/portable/jvp_kernel.cuh"
#include "cuda/portable/launch_common.cuh"
#include "cuda/portable/tangent_kernels.h"

namespace mixed_attention::cuda::portable {

template <Arithmetic kArithmetic, int kHeadDim, Moving kMoving>
void launch_moving(const JvpArguments& args, const GridWork& by_query) {
  constexpr auto kKernel = portable_jvp_kernel<kArithmetic, kHeadDim, kMoving>;
  constexpr int kSharedBytes = sizeof(JvpShared<kArithmetic, kHeadDim, kMoving>);
  static_assert(kSharedBytes <= kMaxSharedBytes, "a block takes more shared memory than the smaller chips give");
  allow_shared_memory<kKernel>(kSharedBytes, args.params.device, "cudaFuncSetAttribute(portable_jvp_kernel)");
  const auto stream = static_cast<cudaStream_t>(args.params.stream);
  kKernel<<<by_query.grid, jvp_tile(kArithmetic, kHeadDim, kMoving).num_threads(), kSharedBytes, stream>>>(
      args, by_query.in_parameters);
  check(cudaGetLastError(), "portable_jvp_kernel");
}

// One of a call's directions; the first one's launch writes what none has written yet.
inline JvpParams direction_of(JvpParams params, int t, int64_t element_size) {
  const auto move = [&](const void*& data, int64_t step) {
    if (data != nullptr) data = static_cast<const char*>(data) + t * step * element_size;
  };
  Tangents& tangents = params.tangents;
  tangents.count = 1;
  params.lse_is_known |= t > 0;
  move(tangents.q, tangents.q_step);
  move(tangents.k, tangents.k_step);
  move(tangents.v, tangents.v_step);
  params.out_dot = static_cast<char*>(params.out_dot) + t * params.out_dot_step * element_size;
  params.lse_dot = static_cast<float*>(params.lse_dot) + t * params.lse_dot_step;
  return params;
}

template <Arithmetic kArithmetic, int kHeadDim>
void launch_jvp(const JvpParams& params, const GridWork& by_query) {
  using Element = typename MmaOf<kArithmetic>::Element;
  if (by_query.grid == 0) return;
  const Tangents& tangents = params.tangents;
  // Tensors that are not there are null and have strides of 0, which are aligned.
  const auto aligned = [](const void* data, const Strides& strides, int64_t step = 0) {
    return is_aligned(data, strides, sizeof(Element)) && step * static_cast<int64_t>(sizeof(Element)) % 16 == 0;
  };
  const double scale_log2 = params.softmax_scale * 1.44269504088896340736;
  JvpArguments args{
      params,
      by_query.table,
      dropout_params(params),
      // Not 0, by which the -inf of blocked keys would become NaN, but next to it even times the largest score.
      std::max(static_cast<float>(scale_log2), std::numeric_limits<float>::denorm_min()),
      static_cast<float>(params.softmax_scale),
      aligned(params.q, params.q_strides) && aligned(params.k, params.k_strides) &&
          aligned(params.v, params.v_strides) && aligned(params.out, params.out_strides) &&
          aligned(params.out_dot, params.out_dot_strides, params.out_dot_step) &&
          aligned(tangents.q, tangents.q_strides, tangents.q_step) &&
          aligned(tangents.k, tangents.k_strides, tangents.k_step) &&
          aligned(tangents.v, tangents.v_strides, tangents.v_step),
  };
  const Moving moving = moving_of(kArithmetic, kHeadDim, tangents);
  if constexpr (has_moving(kArithmetic, kHeadDim, Moving::kQuery)) {
    if (moving == Moving::kQuery) return launch_moving<kArithmetic, kHeadDim, Moving::kQuery>(args, by_query);
  }
  if constexpr (has_moving(kArithmetic, kHeadDim, Moving::kQueries)) {
    if (moving == Moving::kQueries) return launch_moving<kArithmetic, kHeadDim, Moving::kQueries>(args, by_query);
  }
  for (int t = 0; t < tangents.count; ++t) {
    args.params = direction_of(params, t, sizeof(Element));
    launch_moving<kArithmetic, kHeadDim, Moving::kAll>(args, by_query);
  }
}

}  // namespace mixed_attention::cuda::portable
