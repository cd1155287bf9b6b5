// Builds the backward kernels' parameters and launches them.
#pragma once

#include <algorithm>
#include <numbers>
#include <type_traits>
#include <vector>

#include "cuda/hopper/bwd/dk_dv_kernel.cuh"
#include "cuda/hopper/bwd/dq_accum_kernel.cuh"
#include "cuda/hopper/bwd/dq_kernel.cuh"
#include "cuda/hopper/bwd/launch.h"
#include "cuda/hopper/bwd/stats_kernel.cuh"
#include "cuda/hopper/bwd/wide_dk_dv_kernel.cuh"
#include "cuda/hopper/plan/launch_persistent.cuh"
#include "cuda/hopper/plan/tensor_map.h"
#include "cuda/hopper/tile/launch_kernel.cuh"

namespace mixed_attention::cuda::hopper {

// The blocks of a cluster share an item.
template <typename Config, auto kKernel, typename KernelParams>
void launch_of_config(const char* name, const KernelParams& kernel_params, const BwdParams& params,
                      Start start = Start::kInOrder) {
  const PersistentShape shape{.num_items = kernel_params.table.num_items,
                              .threads = Config::kThreads,
                              .start = start,
                              .cluster = Config::kSplits};
  launch_persistent<kKernel, sizeof(typename Config::SharedStorage)>(name, shape, params, kernel_params);
}

// The kernels of gradients that no block adds up for others. Those of fp32: bwd_fp32/launch.cuh.
template <typename Element, int kHeadDim, int kLimbs, bool kIsMasked>
struct SeparateKernels {
  using Dq = DqConfig<Element, kHeadDim, kIsMasked>;
  using DkDv = std::conditional_t<is_wide(kHeadDim), WideDkDvConfig<Element, kHeadDim, kIsMasked>,
                                  DkDvConfig<Element, kHeadDim, kIsMasked, DqForm::kSeparate>>;
};

template <typename Config>
inline constexpr auto kDqKernel = hopper_dq_kernel<Config>;
template <typename Config>
inline constexpr auto kDkDvKernel = hopper_dk_dv_kernel<Config>;
template <typename Element, int kHeadDim, bool kIsMasked>
inline constexpr auto kDkDvKernel<WideDkDvConfig<Element, kHeadDim, kIsMasked>> =
    hopper_wide_dk_dv_kernel<WideDkDvConfig<Element, kHeadDim, kIsMasked>>;

template <bool kHasRowScales>
const auto& stats_of(const BwdWorkspace& workspace) {
  if constexpr (kHasRowScales) {
    return workspace.fp32_stats;
  } else {
    return workspace.stats;
  }
}

// The inputs; under a mask, with the copies of keys and values in the workspace.
inline BwdTensors bwd_tensors(const BwdParams& params, const BwdWorkspace& workspace) {
  BwdTensors tensors = bwd_tensors(params);
  if (params.key_padding_mask != nullptr) {
    tensors.k = masked_view(params, workspace.masked_keys, workspace.masked_keys.keys, params.head_dim);
    tensors.v = masked_view(params, workspace.masked_keys, workspace.masked_keys.values, params.head_dim_v);
  }
  return tensors;
}

// The same as TMA reads them: of fp32, their limbs in the workspace.
inline BwdTensors mapped_tensors(const BwdTensors& tensors, const BwdWorkspace& workspace) {
  if (tensors.q.dtype != DType::kFloat32) return tensors;
  const BwdLimbs& limbs = workspace.limbs;
  return {limbs_view(tensors.q, limbs.q), limbs_view(tensors.k, limbs.k), limbs_view(tensors.v, limbs.v),
          limbs_view(tensors.dout, limbs.dout)};
}

inline Fp32Inputs fp32_inputs(const BwdParams& params, const BwdLimbs& limbs) {
  return {
      .q_scales = limbs.q.row_scales,
      .dout_scales = limbs.dout.row_scales,
      .k_scales = limbs.k.row_scales,
      .v_scales = limbs.v.row_scales,
      .limb_steps = {.q = limbs.q.num_sequences,
                     .dout = limbs.dout.num_sequences,
                     .k = limbs.k.num_sequences,
                     .v = limbs.v.num_sequences},
      .seqlen_k = params.seqlen_k,
  };
}

inline void launch_limbs(const BwdParams& params, const BwdLimbs& limbs) {
  const BwdTensors tensors = bwd_tensors(params);
  const HalfLimbsTask tasks[] = {
      {tensors.q, limbs.q}, {tensors.k, limbs.k}, {tensors.v, limbs.v}, {tensors.dout, limbs.dout}};
  launch_half_limbs(tasks, params.stream);
}

template <typename Stats, typename Scores>
BwdStatsParamsOf<Scores, Stats> make_stats_params(const BwdParams& params, const Stats& stats,
                                                  const BwdWorkspace& workspace, const Scores& scores) {
  return {
      .out = params.out,
      .dout = params.dout,
      .out_strides = params.out_strides,
      .dout_strides = params.dout_strides,
      .lse = static_cast<const float*>(params.lse),
      .dlse = static_cast<const float*>(params.dlse),
      .num_heads = static_cast<int>(params.num_heads),
      .head_dim_v = static_cast<int>(params.head_dim_v),
      .seqlen_q = params.seqlen_q,
      .stats = stats,
      .delta_of_rows = workspace.delta_of_rows,
      .scores = scores,
      .dq_accum = workspace.dq_accum,
  };
}

template <typename Element, int kHeadDim, typename KernelParams>
void launch_stats_kernel(const BwdParams& params, int64_t num_blocks, const KernelParams& kernel_params) {
  const LaunchShape shape{static_cast<unsigned>(num_blocks), BwdStatsShape<Element, kHeadDim>::kThreads};
  launch_kernel<hopper_bwd_stats_kernel<Element, kHeadDim, KernelParams>>("launch of hopper_bwd_stats_kernel", shape,
                                                                          params.stream, kernel_params);
}

template <typename Element, int kHeadDim>
void launch_stats(const BwdParams& params, const BwdWorkspace& workspace, const std::vector<QueryRun>& runs) {
  using KernelParams = std::conditional_t<kHasRowScales<Element>, Fp32BwdStatsKernelParams, BwdStatsKernelParams>;
  const auto& stats = stats_of<kHasRowScales<Element>>(workspace);
  const int64_t num_batch_heads = params.num_heads * params.batch_size;
  const int64_t num_blocks = stats.num_tiles * num_batch_heads;
  if (num_blocks == 0) return;
  const bool is_ordered = workspace.dq_accum.turns != nullptr;
  KernelParams kernel_params{make_stats_params(params, stats, workspace, score_source(params, workspace.references))};
  kernel_params.dq_accum = is_ordered ? DqAccum{} : workspace.dq_accum;
  kernel_params.dq_turns = workspace.dq_accum.turns;
  kernel_params.num_dq_turns = is_ordered ? int64_t{workspace.dq_accum.num_tiles} * num_batch_heads : 0;
  kernel_params.num_runs = static_cast<int>(runs.size());
  std::copy(runs.begin(), runs.end(), kernel_params.runs);
  if constexpr (kHasRowScales<Element>) {
    kernel_params.q_scales = workspace.limbs.q.row_scales;
    kernel_params.dout_scales = workspace.limbs.dout.row_scales;
    kernel_params.q_batch_step = batch_step(params.q_strides);
    kernel_params.dout_batch_step = batch_step(params.dout_strides);
  }
  launch_stats_kernel<Element, kHeadDim>(params, num_blocks, kernel_params);
}

template <typename Config, typename Stats, typename Table>
DkDvParamsOf<Stats, Table> make_dk_dv_params(const BwdParams& params, const Stats& stats, const BwdWorkspace& workspace,
                                             const Table& table) {
  const BwdTensors tensors = bwd_tensors(params, workspace), mapped = mapped_tensors(tensors, workspace);
  return {
      .q = make_clipped_tile_map(mapped.q, Config::kBlockM, Config::kSlabColumns),
      .dout = make_clipped_tile_map(mapped.dout, Config::kBlockM, Config::kSlabColumns),
      .k = make_clipped_tile_map(mapped.k, Config::kBlockN, Config::kSlabColumns),
      .v = make_clipped_tile_map(mapped.v, Config::kBlockN, Config::kSlabColumns),
      .q_batch_step = batch_step(tensors.q.strides),
      .dout_batch_step = batch_step(tensors.dout.strides),
      .k_batch_step = batch_step(tensors.k.strides),
      .v_batch_step = batch_step(tensors.v.strides),
      .dk = params.dk,
      .dv = params.dv,
      .dk_strides = params.dk_strides,
      .dv_strides = params.dv_strides,
      .stats = stats,
      .dq_accum = workspace.dq_accum,
      .head_dim = static_cast<int>(params.head_dim),
      .head_dim_v = static_cast<int>(params.head_dim_v),
      .key_mask_bits = workspace.masked_keys.key_mask_bits,
      .key_mask_step = workspace.masked_keys.key_mask_step(),
      .softmax_scale = static_cast<float>(params.softmax_scale),
      .softmax_scale_log2 = static_cast<float>(params.softmax_scale * std::numbers::log2e),
      .table = table,
  };
}

template <typename Config>
void launch_dk_dv(const BwdParams& params, const BwdWorkspace& workspace, const std::vector<QueryRun>& runs) {
  const auto kernel_params = [&] {
    const auto shared = make_dk_dv_params<Config>(params, stats_of<Config::kHasRowScales>(workspace), workspace,
                                                  make_key_work_table(params, runs, Config::kBlockN));
    if constexpr (Config::kHasRowScales) {
      return Fp32DkDvKernelParams{shared, fp32_inputs(params, workspace.limbs)};
    } else {
      return shared;
    }
  }();
  launch_of_config<Config, kDkDvKernel<Config>>("launch of hopper_dk_dv_kernel", kernel_params, params,
                                                Config::kIsOrdered ? Start::kTogether : Start::kInOrder);
}

template <typename Config>
DqKernelParams make_dq_params(const BwdParams& params, const BwdWorkspace& workspace, const WorkTable& table) {
  const BwdTensors tensors = bwd_tensors(params, workspace), mapped = mapped_tensors(tensors, workspace);
  return {
      .q = make_tile_map(mapped.q, Config::kBlockM, Config::kSlabColumns),
      .dout = make_tile_map(mapped.dout, Config::kBlockM, Config::kSlabColumns),
      .k = make_clipped_tile_map(mapped.k, Config::kBlockN, Config::kSlabColumns),
      .v = make_clipped_tile_map(mapped.v, Config::kBlockN, Config::kSlabColumns),
      .q_batch_step = batch_step(tensors.q.strides),
      .dout_batch_step = batch_step(tensors.dout.strides),
      .k_batch_step = batch_step(tensors.k.strides),
      .v_batch_step = batch_step(tensors.v.strides),
      .dq = workspace.dq.data,
      .dq_strides = workspace.dq.strides,
      .lse = static_cast<const float*>(params.lse),
      .delta = workspace.delta_of_rows,
      .references = workspace.references,
      .seqlen_q = params.seqlen_q,
      .head_dim = static_cast<int>(params.head_dim),
      .head_dim_v = static_cast<int>(params.head_dim_v),
      .key_mask_bits = workspace.masked_keys.key_mask_bits,
      .key_mask_step = workspace.masked_keys.key_mask_step(),
      .softmax_scale = static_cast<float>(params.softmax_scale),
      .softmax_scale_log2 = static_cast<float>(params.softmax_scale * std::numbers::log2e),
      .table = {table},
  };
}

template <typename Config>
void launch_dq(const BwdParams& params, const BwdWorkspace& workspace, const WorkTable& table) {
  const auto kernel_params = [&] {
    const DqKernelParams shared = make_dq_params<Config>(params, workspace, table);
    if constexpr (Config::kHasRowScales) {
      return Fp32DqKernelParams{shared, fp32_inputs(params, workspace.limbs)};
    } else {
      return shared;
    }
  }();
  launch_of_config<Config, kDqKernel<Config>>("launch of hopper_dq_kernel", kernel_params, params);
}

template <typename Element, int kHeadDim, typename KernelParams>
void launch_dq_accum_kernel(const BwdParams& params, int64_t num_blocks, const KernelParams& kernel_params) {
  launch_kernel<hopper_dq_accum_kernel<Element, kHeadDim, KernelParams>>(
      "launch of hopper_dq_accum_kernel", {static_cast<unsigned>(num_blocks), kWarpgroup}, params.stream,
      kernel_params);
}

inline DqAccumParams make_dq_accum_params(const BwdParams& params, const BwdWorkspace& workspace, int num_tiles) {
  return {
      .dq_accum = workspace.dq_accum,
      .leaves_zeros = false,
      .dq = params.dq,
      .dq_strides = params.dq_strides,
      .softmax_scale = static_cast<float>(params.softmax_scale),
      .num_heads = static_cast<int>(params.num_heads),
      .head_dim = static_cast<int>(params.head_dim),
      .num_tiles = num_tiles,
  };
}

// leaves_zeros: for the next share's sums.
template <typename Element, int kHeadDim>
void launch_dq_accum(const BwdParams& params, const BwdWorkspace& workspace, const std::vector<QueryRun>& runs,
                     bool leaves_zeros) {
  const int num_tiles = workspace.stats.num_tiles;
  const int64_t num_blocks = num_tiles * params.num_heads * params.batch_size;
  if (num_blocks == 0) return;
  DqAccumKernelParams kernel_params{make_dq_accum_params(params, workspace, num_tiles)};
  kernel_params.leaves_zeros = leaves_zeros;
  kernel_params.num_runs = static_cast<int>(runs.size());
  std::copy(runs.begin(), runs.end(), kernel_params.runs);
  const std::vector<DqAccumRun> accum_runs = make_dq_accum_runs(*params.schedule, runs, workspace.plan.dq_form);
  std::copy(accum_runs.begin(), accum_runs.end(), kernel_params.accum_runs);
  kernel_params.num_accum_runs = static_cast<int>(accum_runs.size());
  launch_dq_accum_kernel<Element, kHeadDim>(params, num_blocks, kernel_params);
}

// All gradients of the shares.
template <typename Element, int kHeadDim, bool kIsMasked, DqForm kDqForm>
void launch_shares(const BwdParams& params, const BwdWorkspace& workspace, const std::vector<QueryRun>& runs) {
  for (const BwdShare& share : workspace.plan.shares) {
    const bool is_last = &share == &workspace.plan.shares.back();
    const BwdParams part = params_of(share, params);
    BwdWorkspace part_workspace = workspace;
    part_workspace.stats = stats_of(share, params, workspace.stats);
    part_workspace.dq_accum = accum_of(share, params, workspace.dq_accum);
    if (!kIsMasked && share.splits > 1) {
      launch_dk_dv<DkDvConfig<Element, kHeadDim, false, kDqForm, 2>>(part, part_workspace, runs);
    } else {
      launch_dk_dv<DkDvConfig<Element, kHeadDim, kIsMasked, kDqForm>>(part, part_workspace, runs);
    }
    launch_dq_accum<Element, kHeadDim>(part, part_workspace, runs, kDqForm == DqForm::kAtomic && !is_last);
  }
}

// All kernels behind the statistics.
template <typename Element, int kHeadDim, int kLimbs, bool kIsMasked>
void launch_tiles(const BwdParams& params, const BwdWorkspace& workspace, const std::vector<QueryRun>& runs) {
  if constexpr (can_add_dq(kHeadDim) && !kHasRowScales<Element>) {
    switch (workspace.plan.dq_form) {
      case DqForm::kAtomic:
        return launch_shares<Element, kHeadDim, kIsMasked, DqForm::kAtomic>(params, workspace, runs);
      case DqForm::kOrdered:
        return launch_shares<Element, kHeadDim, kIsMasked, DqForm::kOrdered>(params, workspace, runs);
      case DqForm::kSeparate: break;
    }
  }
  // In this order, as the second one may write where the first one reads keys and values.
  using Kernels = SeparateKernels<Element, kHeadDim, kLimbs, kIsMasked>;
  using Dq = typename Kernels::Dq;
  launch_dq<Dq>(params, workspace, make_work_table(params, Dq::kBlockM, Dq::kBlockN));
  launch_dk_dv<typename Kernels::DkDv>(params, workspace, runs);
  move_dq(params, workspace);
}

// The kernel over a list of keys.
template <typename Config>
void launch_listed_dk_dv(const BwdParams& params, const BwdWorkspace& workspace, const char* list) {
  const BwdList& host = *workspace.plan.list;
  ListedDkDvKernelParams kernel_params{
      make_dk_dv_params<Config>(params, workspace.stats, workspace, host.key_list(params, list, workspace.next_item))};
  kernel_params.dq = params.dq;
  kernel_params.dq_strides = params.dq_strides;
  kernel_params.own_sums = workspace.own_sums;
  kernel_params.num_slots = host.num_slots;
  launch_of_config<Config, kDkDvKernel<Config>>("launch of hopper_dk_dv_kernel", kernel_params, params);
}

// All kernels of a plan that has a list.
template <typename Element, int kHeadDim>
void launch_listed(const BwdParams& params, const BwdWorkspace& workspace, const char* list) {
  const BwdList& host = *workspace.plan.list;
  const auto* const queries = host.part<ListedQueries>(list, host.queries);
  const int64_t num_batch_heads = params.batch_size * params.num_heads;

  ListedBwdStatsKernelParams stats_params{make_stats_params(
      params, workspace.stats, workspace,
      ListedScoreSource{score_inputs(params, workspace.references), host.part<int>(list, host.first_ranges),
                        host.part<ListedRange>(list, host.ranges)})};
  stats_params.queries = queries;
  stats_params.next_item = workspace.next_item;
  stats_params.dq = params.dq;
  stats_params.dq_strides = params.dq_strides;
  stats_params.head_dim = static_cast<int>(params.head_dim);
  launch_stats_kernel<Element, kHeadDim>(params, workspace.stats.num_tiles * num_batch_heads, stats_params);

  if (workspace.plan.dq_form == DqForm::kSeparate) {
    launch_dq<DqConfig<Element, kHeadDim, false, true>>(params, workspace, host.dq_table(params, list));
    launch_listed_dk_dv<DkDvConfig<Element, kHeadDim, false, DqForm::kSeparate, 1, true>>(params, workspace, list);
    return move_dq(params, workspace);
  }
  if constexpr (can_add_dq(kHeadDim)) {
    launch_listed_dk_dv<DkDvConfig<Element, kHeadDim, false, DqForm::kAtomic, 1, true>>(params, workspace, list);
    if (host.num_shared_tiles == 0) return;
    ListedDqAccumKernelParams accum_params{make_dq_accum_params(params, workspace, host.num_shared_tiles)};
    accum_params.queries = queries;
    accum_params.shared_tiles = host.part<int>(list, host.shared_tiles);
    launch_dq_accum_kernel<Element, kHeadDim>(params, host.num_shared_tiles * num_batch_heads, accum_params);
  }
}

template <typename Element, int kHeadDim, int kLimbs>
void launch_bwd(const BwdParams& params, const std::vector<QueryRun>& runs, const BwdPlan& plan,
                [[maybe_unused]] const char* list) {
  const BwdWorkspace workspace = bwd_workspace(params, runs, plan);
  if constexpr (kHasRowScales<Element>) {
    launch_limbs(params, workspace.limbs);
  } else if constexpr (has_list(kHeadDim)) {
    if (plan.list != nullptr) return launch_listed<Element, kHeadDim>(params, workspace, list);
  }
  launch_stats<Element, kHeadDim>(params, workspace, runs);
  if constexpr (!kHasRowScales<Element>) {
    if (params.key_padding_mask != nullptr) {
      launch_mask(params, workspace.masked_keys);
      return launch_tiles<Element, kHeadDim, kLimbs, true>(params, workspace, runs);
    }
  }
  launch_tiles<Element, kHeadDim, kLimbs, false>(params, workspace, runs);
}

}  // namespace mixed_attention::cuda::hopper
