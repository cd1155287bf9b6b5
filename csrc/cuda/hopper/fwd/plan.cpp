#include "cuda/common/device.h"
#include "cuda/common/scratch.h"
#include "cuda/hopper/config.h"
#include "cuda/hopper/fwd/launch.h"
#include "cuda/hopper/fwd/split_items.h"
#include "cuda/hopper/plan/query_table.h"

namespace mixed_attention::cuda::hopper {

FwdTensors fwd_tensors(const FwdParams& params) {
  const auto view = [&](const void* data, int64_t seqlen, const Strides& strides) {
    return TensorView{data, params.dtype, params.batch_size, seqlen, params.num_heads, params.head_dim, strides};
  };
  return {view(params.q, params.seqlen_q, params.q_strides), view(params.k, params.seqlen_k, params.k_strides),
          view(params.v, params.seqlen_k, params.v_strides)};
}

FwdPlan plan_fwd(const FwdParams& params) {
  FwdPlan plan = with_fwd_kernel(params, [&]<typename Element, int kHeadDim, int kLimbs>() {
    constexpr FwdTuning kTuning = kFwdTuning<Element, kHeadDim, kLimbs>;
    return FwdPlan{make_work_table(params, kTuning.block_m(), kTuning.block_n)};
  });
  split_items(plan.table, num_multiprocessors(params.device));
  take_workspace(params, plan);
  return plan;
}

void take_workspace(const FwdParams& params, FwdPlan& plan) {
  with_fwd_kernel(params, [&]<typename Element, int kHeadDim, int kLimbs>() {
    constexpr int kBlockM = kFwdTuning<Element, kHeadDim, kLimbs>.block_m();
    Scratch scratch(params.workspace);
    if (const int64_t num_splits = plan.table.splits.num_items(); num_splits > 0) {
      plan.partial_out = scratch.take<float>(num_splits * kBlockM * params.head_dim);
      plan.row_parts = scratch.take<RowPart>(num_splits * kBlockM);
    }
    if (params.key_padding_mask != nullptr) plan.masked_keys = plan_masked_keys(params, scratch, false);
    if (kHasRowScales<Element>) {
      const FwdTensors tensors = fwd_tensors(params);
      plan.q_limbs = take_half_limbs(tensors.q, kLimbs, scratch);
      plan.k_limbs = take_half_limbs(tensors.k, kLimbs, scratch);
      plan.v_limbs = take_half_limbs(tensors.v, kLimbs, scratch);
    }
    plan.workspace_size = scratch.bytes();
  });
}

}  // namespace mixed_attention::cuda::hopper
