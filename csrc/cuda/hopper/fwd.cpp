#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <string>

#include "cuda/device.h"
#include "cuda/hopper/config.h"
#include "cuda/hopper/fwd_launch.h"
#include "cuda/hopper/launch.h"
#include "cuda/hopper/split_items.h"
#include "cuda/hopper/work_table.h"
#include "cuda/scratch.h"

namespace mixed_attention::cuda::hopper {
namespace {

// A row is copied, and leaves, in pieces of 16 bytes.
constexpr int64_t kHeadDimStep = 8;

}  // namespace

FwdTensors fwd_tensors(const FwdParams& params) {
  const auto view = [&](const void* data, int64_t seqlen, const Strides& strides) {
    return TensorView{data, params.dtype, params.batch_size, seqlen, params.num_heads, params.head_dim, strides};
  };
  return {view(params.q, params.seqlen_q, params.q_strides), view(params.k, params.seqlen_k, params.k_strides),
          view(params.v, params.seqlen_k, params.v_strides)};
}

std::string refusal_fwd(const Problem& problem) {
  if (compute_capability(problem.device) != 90) return "the device is not of compute capability 9.0";
  if (problem.dtype != DType::kBFloat16 && problem.dtype != DType::kFloat16) return "the dtype is not 16 bits wide";
  if (problem.head_dim > kMaxFwdHeadDim || problem.head_dim % kHeadDimStep != 0) {
    return "head_dim is " + std::to_string(problem.head_dim) + ", not a multiple of " + std::to_string(kHeadDimStep) +
           " up to " + std::to_string(kMaxFwdHeadDim);
  }
  if (problem.head_dim_v != problem.head_dim) return "v is of another width than q and k";
  return "";
}

bool can_fwd(const FwdParams& params) {
  const FwdTensors tensors = fwd_tensors(params);
  // The maximum of the scores is the maximum of the exponents only under a positive scale.
  return params.softmax_scale > 0 && params.dropout_p == 0 && can_map(tensors.q) && can_map(tensors.k) &&
         can_map(tensors.v) && can_store(params.out, params.out_strides) && fits_work_table(params);
}

FwdPlan plan_fwd(const FwdParams& params) {
  return with_fwd_head_dim(params.head_dim, [&]<int kHeadDim>() {
    using Tuning = FwdTuning<kHeadDim>;
    constexpr int kBlockM = Tuning::kConsumers * kWarpgroupRows;
    Scratch scratch(params.workspace);
    FwdPlan plan{make_work_table(params, kBlockM, Tuning::kBlockN), nullptr, nullptr, {}, 0};
    split_items(plan.table, num_multiprocessors(params.device));
    if (const int64_t num_parts = plan.table.splits.num_items(); num_parts > 0) {
      plan.partial_out = scratch.take<float>(num_parts * kBlockM * params.head_dim);
      plan.partial_lse = scratch.take<float>(num_parts * kBlockM);
    }
    if (params.key_padding_mask != nullptr) plan.masked_keys = plan_masked_keys(params, scratch, false);
    plan.workspace_size = scratch.bytes();
    return plan;
  });
}

size_t fwd_workspace_size(const FwdParams& params) { return plan_fwd(params).workspace_size; }

void run_fwd(const FwdParams& params) {
  const FwdPlan plan = plan_fwd(params);
  with_fwd_head_dim(params.head_dim, [&]<int kHeadDim>() {
    params.dtype == DType::kBFloat16 ? launch_fwd<__nv_bfloat16, kHeadDim>(params, plan)
                                     : launch_fwd<__half, kHeadDim>(params, plan);
  });
}

}  // namespace mixed_attention::cuda::hopper
