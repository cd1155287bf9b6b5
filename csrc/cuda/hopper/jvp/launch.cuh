// Builds the parameters of the kernels for tangents of the forward and launches them.
#pragma once

#include <numbers>

#include "cuda/common/allow_shared_memory.cuh"
#include "cuda/hopper/jvp/kernel.cuh"
#include "cuda/hopper/jvp/launch.h"
#include "cuda/hopper/jvp/tensors.h"
#include "cuda/hopper/plan/persistent_blocks.h"
#include "cuda/hopper/plan/tensor_map.h"
#include "cuda/hopper/tile/launch_kernel.cuh"

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

template <typename Element, bool kMovesKeys>
void launch_jvp(const JvpParams& params, const WorkTable& table) {
  using Config = JvpConfig<Element, kMovesKeys>;
  constexpr auto kKernel = hopper_attention_jvp_kernel<Config>;
  constexpr int kSharedBytes = sizeof(JvpSharedStorage<Config>);
  if (table.num_items == 0) return;
  allow_shared_memory<kKernel>(kSharedBytes, params.device, "cudaFuncSetAttribute(hopper_attention_jvp_kernel)");
  const LaunchShape shape{num_persistent_blocks(table.num_items, params.device), Config::kThreads};
  for (int direction = 0; direction < params.tangents.count; ++direction) {
    launch_kernel<kKernel, kSharedBytes>("launch of hopper_attention_jvp_kernel", shape, params.stream,
                                         make_jvp_kernel_params<Config>(params, direction, table));
  }
}

}  // namespace mixed_attention::cuda::hopper
