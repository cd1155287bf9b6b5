#include <algorithm>
#include <array>
#include <vector>

#include "cuda/hopper/bwd/launch.cuh"
#include "cuda/hopper/bwd_fp32/dk_dv_kernel.cuh"
#include "cuda/hopper/bwd_fp32/dq_kernel.cuh"
#include "cuda/hopper/bwd_fp32/launch.h"
#include "cuda/hopper/bwd_fp32/stats_kernel.cuh"

namespace mixed_attention::cuda::hopper {
namespace {

// The inputs' limbs as TMA reads them.
BwdTensors limbs_of(const BwdTensors& tensors, const Fp32BwdWorkspace& workspace) {
  return {limbs_view(tensors.q, workspace.q), limbs_view(tensors.k, workspace.k), limbs_view(tensors.v, workspace.v),
          limbs_view(tensors.dout, workspace.dout)};
}

Fp32Inputs fp32_inputs(const BwdParams& params, const Fp32BwdWorkspace& workspace) {
  return {
      .q_scales = workspace.q.row_scales,
      .dout_scales = workspace.dout.row_scales,
      .k_scales = workspace.k.row_scales,
      .v_scales = workspace.v.row_scales,
      .limb_steps = {.q = workspace.q.num_sequences,
                     .dout = workspace.dout.num_sequences,
                     .k = workspace.k.num_sequences,
                     .v = workspace.v.num_sequences},
      .seqlen_k = params.seqlen_k,
  };
}

void launch_limbs(const BwdParams& params, const BwdTensors& tensors, const Fp32BwdWorkspace& workspace) {
  const std::array<HalfLimbsTask, 4> tasks{
      {{tensors.q, workspace.q}, {tensors.k, workspace.k}, {tensors.v, workspace.v}, {tensors.dout, workspace.dout}}};
  launch_half_limbs(tasks, params.stream);
}

void launch_stats(const BwdParams& params, const Fp32BwdWorkspace& workspace, const Fp32QueryStats& stats,
                  const std::vector<QueryRun>& runs) {
  const int64_t num_blocks = stats.num_tiles * params.num_heads * params.batch_size;
  if (num_blocks == 0) return;
  Fp32BwdStatsKernelParams kernel_params{
      .out = static_cast<const float*>(params.out),
      .dout = static_cast<const float*>(params.dout),
      .out_strides = params.out_strides,
      .dout_strides = params.dout_strides,
      .lse = static_cast<const float*>(params.lse),
      .dlse = static_cast<const float*>(params.dlse),
      .num_heads = static_cast<int>(params.num_heads),
      .head_dim_v = static_cast<int>(params.head_dim_v),
      .seqlen_q = params.seqlen_q,
      .q_scales = workspace.q.row_scales,
      .dout_scales = workspace.dout.row_scales,
      .q_batch_step = batch_step(params.q_strides),
      .dout_batch_step = batch_step(params.dout_strides),
      .stats = stats,
      .delta_of_rows = workspace.delta,
      .scores = score_source(params, workspace.references),
      .num_runs = static_cast<int>(runs.size()),
  };
  std::copy(runs.begin(), runs.end(), kernel_params.runs);
  launch_kernel<hopper_fp32_bwd_stats_kernel>("launch of hopper_fp32_bwd_stats_kernel",
                                              {static_cast<unsigned>(num_blocks), kFp32StatsThreads}, params.stream,
                                              kernel_params);
}

template <int kLimbs>
void launch_dk_dv(const BwdParams& params, const BwdTensors& tensors, const Fp32BwdWorkspace& workspace,
                  const Fp32QueryStats& stats, const std::vector<QueryRun>& runs) {
  using Config = Fp32DkDvConfig<kLimbs>;
  const Fp32DkDvKernelParams kernel_params{
      make_dk_dv_params<Config>(params, tensors, limbs_of(tensors, workspace), stats,
                                make_key_work_table(params, runs, Config::kBlockN)),
      fp32_inputs(params, workspace)};
  launch_persistent<Config, Fp32DkDvSharedStorage<Config>, hopper_fp32_dk_dv_kernel<Config>>(
      "launch of hopper_fp32_dk_dv_kernel", kernel_params, params);
}

template <int kLimbs>
void launch_dq(const BwdParams& params, const BwdTensors& tensors, const Fp32BwdWorkspace& workspace) {
  using Config = Fp32DqConfig<kLimbs>;
  const Fp32DqKernelParams kernel_params{
      make_dq_params<Config>(params, tensors, limbs_of(tensors, workspace), DqTensor{params.dq, params.dq_strides},
                             workspace.delta, workspace.references,
                             make_work_table(params, Config::kBlockM, Config::kBlockN)),
      fp32_inputs(params, workspace)};
  launch_persistent<Config, Fp32DqSharedStorage<Config>, hopper_fp32_dq_kernel<Config>>(
      "launch of hopper_fp32_dq_kernel", kernel_params, params);
}

}  // namespace

void launch_fp32_bwd(const BwdParams& params, const std::vector<QueryRun>& runs) {
  const BwdTensors tensors = bwd_tensors(params);
  const Fp32BwdWorkspace workspace = fp32_bwd_workspace(params, runs);
  launch_limbs(params, tensors, workspace);
  const Fp32QueryStats stats{workspace.q_numbers, workspace.dout_numbers, num_query_tiles(runs)};
  launch_stats(params, workspace, stats, runs);
  with_limbs(params, [&]<int kLimbs>() {
    launch_dk_dv<kLimbs>(params, tensors, workspace, stats, runs);
    launch_dq<kLimbs>(params, tensors, workspace);
  });
}

}  // namespace mixed_attention::cuda::hopper
