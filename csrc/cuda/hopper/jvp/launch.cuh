// Builds the parameters of the kernels for tangents of the forward and launches them.
#pragma once

#include <numbers>

#include "cuda/hopper/jvp/directions_kernel.cuh"
#include "cuda/hopper/jvp/kernel.cuh"
#include "cuda/hopper/jvp/launch.h"
#include "cuda/hopper/jvp/tensors.h"
#include "cuda/hopper/plan/launch_persistent.cuh"
#include "cuda/hopper/plan/tensor_map.h"

namespace mixed_attention::cuda::hopper {

// The maps of a tensor and its tangent; encode makes one of them.
template <typename Encode>
MovingMaps make_moving_maps(const MovingView& tensor, const Encode& encode) {
  MovingMaps maps{.still = encode(tensor.still),
                  .dot = {},
                  .still_batch_step = batch_step(tensor.still.strides),
                  .dot_batch_step = batch_step(tensor.dot.strides),
                  .moves = tensor.dot.data != nullptr};
  if (maps.moves) maps.dot = encode(tensor.dot);
  return maps;
}

template <typename Config>
JvpKernelParams make_jvp_kernel_params(const JvpParams& params, int direction, const WorkTable& table) {
  using Element = typename Config::Element;
  const JvpTensors tensors = jvp_tensors(params, direction);
  const auto by_query = [](const TensorView& tensor) { return make_tile_map(tensor, Config::kBlockM); };
  const auto by_key = [](const TensorView& tensor) { return make_clipped_tile_map(tensor, Config::kBlockN); };
  const bool writes_out = !params.lse_is_known && direction == 0;
  return {
      .q = make_moving_maps(tensors.q, by_query),
      .k = make_moving_maps(tensors.k, by_key),
      .v = make_moving_maps(tensors.v, by_key),
      .out = writes_out ? params.out : nullptr,
      .lse = writes_out ? static_cast<float*>(params.lse) : nullptr,
      .out_dot = static_cast<Element*>(params.out_dot) + direction * params.out_dot_step,
      .lse_dot = static_cast<float*>(params.lse_dot) + direction * params.lse_dot_step,
      .out_strides = params.out_strides,
      .out_dot_strides = params.out_dot_strides,
      .seqlen_q = params.seqlen_q,
      .head_dim_v = static_cast<int>(params.head_dim_v),
      .softmax_scale = static_cast<float>(params.softmax_scale),
      .softmax_scale_log2 = static_cast<float>(params.softmax_scale * std::numbers::log2e),
      .table = table,
  };
}

template <typename Config>
DirectionsKernelParams make_directions_kernel_params(const JvpParams& params, const WorkTable& table) {
  const JvpTensors tensors = jvp_tensors(params, 0);
  DirectionsKernelParams made{
      .q = make_tile_map(tensors.q.still, Config::kBlockM),
      .k = make_clipped_tile_map(tensors.k.still, Config::kBlockN),
      .v = make_clipped_tile_map(tensors.v.still, Config::kBlockN),
      .q_dot = {},
      .q_batch_step = batch_step(tensors.q.still.strides),
      .k_batch_step = batch_step(tensors.k.still.strides),
      .v_batch_step = batch_step(tensors.v.still.strides),
      .q_dot_batch_step = batch_step(tensors.q.dot.strides),
      .out = params.lse_is_known ? nullptr : params.out,
      .lse = params.lse_is_known ? nullptr : static_cast<float*>(params.lse),
      .out_dot = params.out_dot,
      .lse_dot = static_cast<float*>(params.lse_dot),
      .out_strides = params.out_strides,
      .out_dot_strides = params.out_dot_strides,
      .out_dot_step = params.out_dot_step,
      .lse_dot_step = params.lse_dot_step,
      .seqlen_q = params.seqlen_q,
      .head_dim_v = static_cast<int>(params.head_dim_v),
      .softmax_scale = static_cast<float>(params.softmax_scale),
      .softmax_scale_log2 = static_cast<float>(params.softmax_scale * std::numbers::log2e),
      .table = table,
  };
  for (int t = 0; t < Config::kDirections; ++t) {
    made.q_dot[t] = make_tile_map(jvp_tensors(params, t).q.dot, Config::kBlockM);
  }
  return made;
}

template <typename Config>
void launch_each_direction(const JvpParams& params, const WorkTable& table) {
  for (int direction = 0; direction < params.tangents.count; ++direction) {
    launch_persistent<hopper_attention_jvp_kernel<Config>, sizeof(JvpSharedStorage<Config>)>(
        "launch of hopper_attention_jvp_kernel", {table.num_items, Config::kThreads}, params,
        make_jvp_kernel_params<Config>(params, direction, table));
  }
}

template <typename Element>
void launch_jvp(const JvpParams& params, const WorkTable& table) {
  if (table.num_items == 0) return;
  switch (jvp_form(params.tangents)) {
    case JvpForm::kQuery: return launch_each_direction<JvpConfig<Element, JvpForm::kQuery>>(params, table);
    case JvpForm::kAll: return launch_each_direction<JvpConfig<Element, JvpForm::kAll>>(params, table);
    case JvpForm::kQueries: {
      using Config = DirectionsConfig<Element>;
      launch_persistent<hopper_attention_jvp_directions_kernel<Config>, sizeof(DirectionsSharedStorage<Config>)>(
          "launch of hopper_attention_jvp_directions_kernel", {table.num_items, Config::kThreads}, params,
          make_directions_kernel_params<Config>(params, table));
    }
  }
}

}  // namespace mixed_attention::cuda::hopper
