// Builds the parameters of the kernels for gradients of tangents and launches them.
#pragma once

#include <numbers>

#include "cuda/common/allow_shared_memory.cuh"
#include "cuda/hopper/bwd_jvp/kernel.cuh"
#include "cuda/hopper/bwd_jvp/launch.h"
#include "cuda/hopper/bwd_jvp/tensors.h"
#include "cuda/hopper/plan/persistent_blocks.h"
#include "cuda/hopper/plan/tensor_map.h"
#include "cuda/hopper/tile/launch_kernel.cuh"

namespace mixed_attention::cuda::hopper {

// make_map: of tiles of so many rows.
inline void make_side(SideMap* side, const TensorView* tensors, CUtensorMap (*make_map)(const TensorView&, int, int),
                      int tile_rows) {
  for (int i = 0; i < kSideTensors; ++i) {
    side[i].exists = tensors[i].data != nullptr;
    side[i].batch_step = batch_step(tensors[i].strides);
    if (side[i].exists) side[i].map = make_map(tensors[i], tile_rows, kSlabColumns);
  }
}

template <typename Element, bool kOwnsKeys, bool kMovesKeys, bool kIsWhole>
void launch_side(const BwdJvpParams& params, const BwdJvpRows& rows, const WorkTable& table) {
  using Config = BwdJvpConfig<Element, kOwnsKeys, kMovesKeys, kIsWhole>;
  constexpr auto kKernel = hopper_attention_bwd_jvp_kernel<Config>;
  constexpr int kSharedBytes = sizeof(BwdJvpSharedStorage<Config>);
  if (table.num_items == 0) return;
  const BwdJvpTensors tensors = bwd_jvp_tensors(params);
  const auto scale = static_cast<float>(params.softmax_scale);
  const int head_dim = static_cast<int>(params.head_dim), head_dim_v = static_cast<int>(params.head_dim_v);
  BwdJvpKernelParams of_kernel{
      .owned = {},
      .streamed = {},
      .first = {params.dq, params.dq_strides, head_dim, scale},
      .second = {params.dq_dot, params.dq_dot_strides, head_dim, scale},
      .rows = rows,
      .seqlen_q = params.seqlen_q,
      .softmax_scale = scale,
      .softmax_scale_log2 = static_cast<float>(params.softmax_scale * std::numbers::log2e),
      .table = table,
  };
  if (kOwnsKeys) {
    of_kernel.first = {params.dk, params.dk_strides, head_dim, scale};
    of_kernel.second = {params.dv, params.dv_strides, head_dim_v, 1};
  }
  make_side(of_kernel.owned, kOwnsKeys ? &tensors.keys[0] : &tensors.queries[0], &make_tile_map, Config::kBlockM);
  make_side(of_kernel.streamed, kOwnsKeys ? &tensors.queries[0] : &tensors.keys[0], &make_clipped_tile_map,
            Config::kBlockN);
  allow_shared_memory<kKernel>(kSharedBytes, params.device, "cudaFuncSetAttribute(hopper_attention_bwd_jvp_kernel)");
  const LaunchShape shape{num_persistent_blocks(table.num_items, params.device), Config::kThreads, Start::kInOrder};
  launch_kernel<kKernel, kSharedBytes>("launch of hopper_attention_bwd_jvp_kernel", shape, params.stream, of_kernel);
}

template <typename Element, bool kMovesKeys>
void launch_sides(const BwdJvpParams& params, const BwdJvpRows& rows, const WorkTable& by_query,
                  const WorkTable& by_key) {
  params.dout != nullptr ? launch_side<Element, true, kMovesKeys, true>(params, rows, by_key)
                         : launch_side<Element, true, kMovesKeys, false>(params, rows, by_key);
  params.dout != nullptr || params.dq_dot != nullptr
      ? launch_side<Element, false, kMovesKeys, true>(params, rows, by_query)
      : launch_side<Element, false, kMovesKeys, false>(params, rows, by_query);
}

template <typename Element>
void launch_bwd_jvp(const BwdJvpParams& params, const BwdJvpRows& rows, const WorkTable& by_query,
                    const WorkTable& by_key) {
  params.tangents.k != nullptr || params.tangents.v != nullptr
      ? launch_sides<Element, true>(params, rows, by_query, by_key)
      : launch_sides<Element, false>(params, rows, by_query, by_key);
}

}  // namespace mixed_attention::cuda::hopper
