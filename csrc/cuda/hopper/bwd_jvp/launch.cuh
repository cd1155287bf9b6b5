// Builds the parameters of the kernels for gradients of tangents and launches them.
#pragma once

#include <numbers>

#include "cuda/common/check.h"
#include "cuda/hopper/bwd/launch.cuh"
#include "cuda/hopper/bwd_jvp/kernel.cuh"
#include "cuda/hopper/bwd_jvp/launch.h"
#include "cuda/hopper/bwd_jvp/tensors.h"
#include "cuda/hopper/plan/launch_persistent.cuh"
#include "cuda/hopper/plan/tensor_map.h"

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

// table: rows that own, and those that stream through them.
template <typename Config, typename Table>
void launch_side(const BwdJvpParams& params, const BwdJvpRows& rows, const Table& table, const DqAccum& dq_accum = {}) {
  constexpr auto kKernel = hopper_attention_bwd_jvp_kernel<Config>;
  constexpr bool kOwnsKeys = Config::kOwnsKeys;
  if (table.num_items == 0) return;
  const BwdJvpTensors tensors = bwd_jvp_tensors(params);
  const auto scale = static_cast<float>(params.softmax_scale);
  const int head_dim = static_cast<int>(params.head_dim);
  BwdJvpKernelParams<Config> of_kernel{
      .owned = {},
      .streamed = {},
      .first = {params.dq, params.dq_strides, head_dim, scale},
      .second = {params.dq_dot, params.dq_dot_strides, head_dim, scale},
      .rows = rows,
      .seqlen_q = params.seqlen_q,
      .softmax_scale = scale,
      .softmax_scale_log2 = static_cast<float>(params.softmax_scale * std::numbers::log2e),
      .dq_accum = dq_accum,
      .table = table,
  };
  if (kOwnsKeys) {
    of_kernel.first = {params.dk, params.dk_strides, head_dim, scale};
    of_kernel.second = {params.dv, params.dv_strides, static_cast<int>(params.head_dim_v), 1};
  }
  make_side(of_kernel.owned, kOwnsKeys ? &tensors.keys[0] : &tensors.queries[0],
            Config::kAddsDq ? &make_clipped_tile_map : &make_tile_map, Config::kBlockM);
  make_side(of_kernel.streamed, kOwnsKeys ? &tensors.queries[0] : &tensors.keys[0], &make_clipped_tile_map,
            Config::kBlockN);
  launch_persistent<kKernel, sizeof(BwdJvpSharedStorage<Config>)>("launch of hopper_attention_bwd_jvp_kernel",
                                                                  {table.num_items, Config::kThreads, Start::kInOrder},
                                                                  params, of_kernel);
}

// Two kernels, of which each owns what it writes.
template <typename Element, bool kMovesKeys>
void launch_sides(const BwdJvpParams& params, const BwdJvpRows& rows, const BwdJvpPlan& plan) {
  const auto launch = [&]<bool kOwnsKeys>(bool is_whole, const WorkTable& table) {
    is_whole ? launch_side<BwdJvpConfig<Element, kOwnsKeys, kMovesKeys, true>>(params, rows, table)
             : launch_side<BwdJvpConfig<Element, kOwnsKeys, kMovesKeys, false>>(params, rows, table);
  };
  launch.template operator()<true>(params.dout != nullptr, plan.by_key);
  launch.template operator()<false>(params.dout != nullptr || params.dq_dot != nullptr, plan.by_query);
}

// One kernel, which adds to dq, between one that writes zeros there and one that rounds the sums.
template <typename Element, bool kMovesKeys>
void launch_adding(const BwdJvpParams& params, const BwdJvpRows& rows, const BwdJvpPlan& plan, void* sums) {
  BwdWorkspace workspace{};
  workspace.plan.dq_form = DqForm::kAtomic;
  workspace.stats.num_tiles = num_query_tiles(plan.runs);
  DqAccum& dq_accum = workspace.dq_accum;
  dq_accum.num_tiles = workspace.stats.num_tiles;
  dq_accum.others = static_cast<float*>(sums);
  dq_accum.num_others = dq_accum.num_tiles * params.batch_size * params.num_heads;
  const size_t num_bytes = bytes_of_dq_sums(params, plan);
  if (num_bytes > 0) {
    check(cudaMemsetAsync(sums, 0, num_bytes, static_cast<cudaStream_t>(params.stream)), "cudaMemsetAsync of dq");
  }
  launch_side<BwdJvpConfig<Element, true, kMovesKeys, false, true>>(
      params, rows, make_key_work_table(params, plan.runs, kBwdJvpBlockM), dq_accum);
  launch_dq_accum<Element, kJvpHeadDim>(params, workspace, plan.runs, false);
}

template <typename Element>
void launch_bwd_jvp(const BwdJvpParams& params, const BwdJvpRows& rows, const BwdJvpPlan& plan, void* sums) {
  const bool moves_keys = params.tangents.k != nullptr || params.tangents.v != nullptr;
  if (plan.adds_dq) {
    moves_keys ? launch_adding<Element, true>(params, rows, plan, sums)
               : launch_adding<Element, false>(params, rows, plan, sums);
  } else {
    moves_keys ? launch_sides<Element, true>(params, rows, plan) : launch_sides<Element, false>(params, rows, plan);
  }
}

}  // namespace mixed_attention::cuda::hopper
