// Launches the tangents of the forward, of one arithmetic and head_dim.
#pragma once

#include "cuda/portable/jvp_kernel.cuh"
#include "cuda/portable/launch_common.cuh"
#include "cuda/portable/tangent_kernels.h"

namespace mixed_attention::cuda::portable {

template <Arithmetic kArithmetic, int kHeadDim, Moving kMoving>
void launch_moving(const JvpArguments& args, const GridWork& by_query) {
  launch_tiles<portable_jvp_kernel<kArithmetic, kHeadDim, kMoving>, JvpShared<kArithmetic, kHeadDim, kMoving>>(
      "portable_jvp_kernel", args.params, args, by_query);
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
  const auto step_is_aligned = [](int64_t step) { return step * static_cast<int64_t>(sizeof(Element)) % 16 == 0; };
  JvpArguments args{
      params,
      by_query.table,
      dropout_params(params),
      scale_log2_of_forward(params),
      static_cast<float>(params.softmax_scale),
      are_aligned<Element>({{params.q, params.q_strides},
                            {params.k, params.k_strides},
                            {params.v, params.v_strides},
                            {params.out, params.out_strides},
                            {params.out_dot, params.out_dot_strides},
                            {tangents.q, tangents.q_strides},
                            {tangents.k, tangents.k_strides},
                            {tangents.v, tangents.v_strides}}) &&
          step_is_aligned(params.out_dot_step) && step_is_aligned(tangents.q_step) &&
          step_is_aligned(tangents.k_step) && step_is_aligned(tangents.v_step),
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
