#include <algorithm>
#include <array>
#include <numbers>
#include <vector>

#include "cuda/hopper/bwd/launch.cuh"
#include "cuda/hopper/bwd_fp32/dk_dv_kernel.cuh"
#include "cuda/hopper/bwd_fp32/dq_kernel.cuh"
#include "cuda/hopper/bwd_fp32/launch.h"
#include "cuda/hopper/bwd_fp32/stats_kernel.cuh"

namespace mixed_attention::cuda::hopper {
namespace {

HalfInput half_input(const HalfLimbs& limbs) {
  return {limbs.row_scales, limbs.num_sequences, limbs.num_sequences == 1 ? 0 : 1};
}

void launch_limbs(const BwdParams& params, const BwdTensors& tensors, const Fp32BwdWorkspace& workspace) {
  const std::array<HalfLimbsTask, 4> tasks{
      {{tensors.q, workspace.q}, {tensors.k, workspace.k}, {tensors.v, workspace.v}, {tensors.dout, workspace.dout}}};
  launch_half_limbs(tasks, params.stream);
}

void launch_stats(const BwdParams& params, const Fp32BwdWorkspace& workspace, const std::vector<QueryRun>& runs) {
  const int num_tiles = num_query_tiles(runs);
  const int64_t num_blocks = num_tiles * params.num_heads * params.batch_size;
  if (num_blocks == 0) return;
  Fp32BwdStatsKernelParams kernel_params{
      .out = static_cast<const float*>(params.out),
      .dout = static_cast<const float*>(params.dout),
      .out_strides = params.out_strides,
      .dout_strides = params.dout_strides,
      .lse = static_cast<const float*>(params.lse),
      .dlse = static_cast<const float*>(params.dlse),
      .num_heads = static_cast<int>(params.num_heads),
      .head_dim = static_cast<int>(params.head_dim),
      .seqlen_q = params.seqlen_q,
      .q_limbs = half_input(workspace.q),
      .dout_limbs = half_input(workspace.dout),
      .num_tiles = num_tiles,
      .q_numbers = workspace.q_numbers,
      .dout_numbers = workspace.dout_numbers,
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
                  const std::vector<QueryRun>& runs) {
  using Config = Fp32DkDvConfig<kLimbs>;
  const Fp32DkDvKernelParams kernel_params{
      .q_map = make_clipped_tile_map(limbs_view(tensors.q, workspace.q), Config::kBlockM),
      .dout_map = make_clipped_tile_map(limbs_view(tensors.dout, workspace.dout), Config::kBlockM),
      .k_map = make_clipped_tile_map(limbs_view(tensors.k, workspace.k), Config::kBlockN),
      .v_map = make_clipped_tile_map(limbs_view(tensors.v, workspace.v), Config::kBlockN),
      .q = half_input(workspace.q),
      .dout = half_input(workspace.dout),
      .k = half_input(workspace.k),
      .v = half_input(workspace.v),
      .q_numbers = workspace.q_numbers,
      .dout_numbers = workspace.dout_numbers,
      .num_query_tiles = num_query_tiles(runs),
      .seqlen_k = params.seqlen_k,
      .dk = static_cast<float*>(params.dk),
      .dv = static_cast<float*>(params.dv),
      .dk_strides = params.dk_strides,
      .dv_strides = params.dv_strides,
      .head_dim = static_cast<int>(params.head_dim),
      .softmax_scale = static_cast<float>(params.softmax_scale),
      .softmax_scale_log2 = static_cast<float>(params.softmax_scale * std::numbers::log2e),
      .table = make_key_work_table(params, runs, Config::kBlockN),
  };
  launch_persistent<Config, Fp32DkDvSharedStorage<Config>, hopper_fp32_dk_dv_kernel<Config>>(
      "launch of hopper_fp32_dk_dv_kernel", kernel_params, params);
}

template <int kLimbs>
void launch_dq(const BwdParams& params, const BwdTensors& tensors, const Fp32BwdWorkspace& workspace) {
  using Config = Fp32DqConfig<kLimbs>;
  const Fp32DqKernelParams kernel_params{
      .q_map = make_tile_map(limbs_view(tensors.q, workspace.q), Config::kBlockM),
      .dout_map = make_tile_map(limbs_view(tensors.dout, workspace.dout), Config::kBlockM),
      .k_map = make_clipped_tile_map(limbs_view(tensors.k, workspace.k), Config::kBlockN),
      .v_map = make_clipped_tile_map(limbs_view(tensors.v, workspace.v), Config::kBlockN),
      .q = half_input(workspace.q),
      .dout = half_input(workspace.dout),
      .k = half_input(workspace.k),
      .v = half_input(workspace.v),
      .lse = static_cast<const float*>(params.lse),
      .delta = workspace.delta,
      .references = workspace.references,
      .seqlen_q = params.seqlen_q,
      .seqlen_k = params.seqlen_k,
      .dq = static_cast<float*>(params.dq),
      .dq_strides = params.dq_strides,
      .head_dim = static_cast<int>(params.head_dim),
      .softmax_scale = static_cast<float>(params.softmax_scale),
      .softmax_scale_log2 = static_cast<float>(params.softmax_scale * std::numbers::log2e),
      .table = make_work_table(params, Config::kBlockM, Config::kBlockN),
  };
  launch_persistent<Config, Fp32DqSharedStorage<Config>, hopper_fp32_dq_kernel<Config>>(
      "launch of hopper_fp32_dq_kernel", kernel_params, params);
}

}  // namespace

void launch_fp32_bwd(const BwdParams& params) {
  const std::vector<QueryRun> runs = make_query_runs(*params.schedule);
  const BwdTensors tensors = bwd_tensors(params);
  const Fp32BwdWorkspace workspace = fp32_bwd_workspace(params);
  launch_limbs(params, tensors, workspace);
  launch_stats(params, workspace, runs);
  with_limbs(params, [&]<int kLimbs>() {
    launch_dk_dv<kLimbs>(params, tensors, workspace, runs);
    launch_dq<kLimbs>(params, tensors, workspace);
  });
}

}  // namespace mixed_attention::cuda::hopper
