// Builds the forward kernel's parameters and launches it.
#pragma once

#include <numbers>

#include "ceil_div.h"
#include "cuda/common/combine_kernel.cuh"
#include "cuda/hopper/fwd/kernel.cuh"
#include "cuda/hopper/fwd/launch.h"
#include "cuda/hopper/fwd/rows_of_splits.cuh"
#include "cuda/hopper/plan/launch_persistent.cuh"
#include "cuda/hopper/plan/tensor_map.h"
#include "cuda/hopper/tile/launch_kernel.cuh"

namespace mixed_attention::cuda::hopper {

template <typename Config>
FwdKernelParams make_fwd_kernel_params(const FwdParams& params, const FwdPlan& plan) {
  FwdTensors tensors = fwd_tensors(params);
  if constexpr (Config::kIsMasked) {
    tensors.v = masked_view(params, plan.masked_keys, plan.masked_keys.values, params.head_dim_v);
  }
  const int v_batch_step = batch_step(tensors.v.strides);
  if constexpr (Config::kHasRowScales) {
    tensors = {limbs_view(tensors.q, plan.q_limbs), limbs_view(tensors.k, plan.k_limbs),
               limbs_view(tensors.v, plan.v_limbs)};
  }
  return {
      .q = make_tile_map(tensors.q, Config::kBlockM, Config::kSlabColumns),
      .k = make_clipped_tile_map(tensors.k, Config::kBlockN, Config::kSlabColumns),
      .v = make_clipped_tile_map(tensors.v, Config::kBlockN, Config::kSlabColumns),
      .q_batch_step = batch_step(params.q_strides),
      .k_batch_step = batch_step(params.k_strides),
      .v_batch_step = v_batch_step,
      .out = params.out,
      .lse = static_cast<float*>(params.lse),
      .out_strides = params.out_strides,
      .seqlen_q = params.seqlen_q,
      .head_dim_v = static_cast<int>(params.head_dim_v),
      .head_dim = static_cast<int>(params.head_dim),
      .partial_out = plan.partial_out,
      .row_lses = plan.row_lses,
      .key_mask_bits = plan.masked_keys.key_mask_bits,
      .key_mask_step = plan.masked_keys.key_mask_step(),
      .softmax_scale = static_cast<float>(params.softmax_scale),
      .softmax_scale_log2 = static_cast<float>(params.softmax_scale * std::numbers::log2e),
      .row_scales =
          {
              .q = plan.q_limbs.row_scales,
              .k = plan.k_limbs.row_scales,
              .v = plan.v_limbs.row_scales,
              .q_limb_step = plan.q_limbs.num_sequences,
              .k_limb_step = plan.k_limbs.num_sequences,
              .v_limb_step = plan.v_limbs.num_sequences,
              .seqlen_k = params.seqlen_k,
          },
      .table = plan.table,
  };
}

// Adds the scale of a row's scores.
template <int kBlockM>
struct ScaledRowsOfSplits : RowsOfSplits<kBlockM> {
  float softmax_scale, softmax_scale_log2;
  const float* q_scales;  // null of 16-bit inputs
  int q_batch_step;
  int64_t seqlen_q;

  __device__ SplitRow find(int64_t index) const {
    SplitRow row = RowsOfSplits<kBlockM>::find(index);
    float row_scale = 1;
    if (row.exists && q_scales != nullptr) {
      row_scale = row_scales_of_head(q_scales, row, q_batch_step, this->table.num_heads, seqlen_q)[row.row];
    }
    row.scale = q_scales == nullptr ? softmax_scale : scale_of_row(softmax_scale, row_scale);
    row.scale_log2 = q_scales == nullptr ? softmax_scale_log2 : scale_of_row(softmax_scale_log2, row_scale);
    return row;
  }
};

template <typename Element, int kBlockM>
void launch_combine(const FwdParams& params, const FwdPlan& plan) {
  constexpr int kRowsOfBlock = 8;
  static_assert(kBlockM % kRowsOfBlock == 0, "a block combines rows of one split work item");
  static_assert(sizeof(FwdParams) + sizeof(ScaledRowsOfSplits<kBlockM>) <= 4000,
                "kernel parameters beyond 4096 bytes cost the launch time");
  const ScaledRowsOfSplits<kBlockM> rows{{plan.table},
                                         static_cast<float>(params.softmax_scale),
                                         static_cast<float>(params.softmax_scale * std::numbers::log2e),
                                         plan.q_limbs.row_scales,
                                         batch_step(params.q_strides),
                                         params.seqlen_q};
  const LaunchShape shape{plan.table.splits.num_whole * (kBlockM / kRowsOfBlock), 32 * kRowsOfBlock};
  launch_kernel<attention_combine_kernel<Element, ScaledRowsOfSplits<kBlockM>>>(
      "launch of attention_combine_kernel", shape, params.stream, params, plan.partial_out, plan.row_lses,
      plan.table.splits.num_splits, rows);
}

template <typename Config>
void launch_tiles(const FwdParams& params, const FwdPlan& plan) {
  constexpr auto kKernel = hopper_attention_fwd_kernel<Config>;
  constexpr int kSharedBytes = Config::kTeams * sizeof(FwdSharedStorage<Config>);
  const PersistentShape shape{.num_items = ceil_div(plan.table.num_items, Config::kTeams),
                              .threads = Config::kThreads,
                              .blocks = Config::kBlocks};
  launch_persistent<kKernel, kSharedBytes>("launch of hopper_attention_fwd_kernel", shape, params,
                                           make_fwd_kernel_params<Config>(params, plan));
}

template <typename Element, int kHeadDim, int kLimbs>
void launch_fwd(const FwdParams& params, const FwdPlan& plan) {
  using Config = FwdConfig<Element, kHeadDim, kLimbs, FwdForm::kPlain>;
  if (plan.table.num_items == 0) return;
  if constexpr (Config::kHasRowScales) {
    const FwdTensors tensors = fwd_tensors(params);
    const HalfLimbsTask tasks[] = {{tensors.q, plan.q_limbs}, {tensors.k, plan.k_limbs}, {tensors.v, plan.v_limbs}};
    launch_half_limbs(tasks, params.stream);
    launch_tiles<Config>(params, plan);
  } else if (plan.form == FwdForm::kMasked) {
    launch_mask(params, plan.masked_keys);
    launch_tiles<FwdConfig<Element, kHeadDim, kLimbs, FwdForm::kMasked>>(params, plan);
  } else {
    if constexpr (has_list(kHeadDim)) {
      if (plan.form == FwdForm::kListed) {
        return launch_tiles<FwdConfig<Element, kHeadDim, kLimbs, FwdForm::kListed>>(params, plan);
      }
    }
    launch_tiles<Config>(params, plan);
  }
  if (plan.partial_out != nullptr) launch_combine<Element, Config::kBlockM>(params, plan);
}

}  // namespace mixed_attention::cuda::hopper
