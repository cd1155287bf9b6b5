#include <memory>
#include <tuple>

#include "cuda/common/device.h"
#include "cuda/common/kept.h"
#include "cuda/common/scratch.h"
#include "cuda/hopper/config.h"
#include "cuda/hopper/fwd/launch.h"
#include "cuda/hopper/fwd/split_items.h"
#include "cuda/hopper/plan/query_table.h"
#include "schedule.h"

namespace mixed_attention::cuda::hopper {

FwdTensors fwd_tensors(const FwdParams& params) {
  const auto view = [&](const void* data, int64_t seqlen, const Strides& strides) {
    return TensorView{data, params.dtype, params.batch_size, seqlen, params.num_heads, params.head_dim, strides};
  };
  return {view(params.q, params.seqlen_q, params.q_strides), view(params.k, params.seqlen_k, params.k_strides),
          view(params.v, params.seqlen_k, params.v_strides)};
}

namespace {

// The table of a call, made once for all that are alike: to weigh ways to cut many items takes the host a while.
std::shared_ptr<const WorkTable> table_of(const FwdParams& params) {
  using Key = std::tuple<uint64_t, DType, bool, int64_t, int64_t, int64_t, int>;
  static auto* kept = new Kept<Key, WorkTable>(256);  // never freed: threads may outlive static objects
  const Key key{params.schedule->id, params.dtype,     params.allow_tf32, params.head_dim,
                params.batch_size,   params.num_heads, params.device};
  return kept->of(key, [&] {
    WorkTable table = with_fwd_kernel(params, [&]<typename Element, int kHeadDim, int kLimbs>() {
      constexpr FwdTuning kTuning = kFwdTuning<Element, kHeadDim, kLimbs>;
      return make_work_table(params, kTuning.block_m(), kTuning.block_n);
    });
    split_items(table, num_multiprocessors(params.device));
    return table;
  });
}

}  // namespace

FwdPlan plan_fwd(const FwdParams& params) {
  FwdPlan plan{*table_of(params)};
  take_workspace(params, plan);
  return plan;
}

void take_workspace(const FwdParams& params, FwdPlan& plan) {
  with_fwd_kernel(params, [&]<typename Element, int kHeadDim, int kLimbs>() {
    constexpr int kBlockM = kFwdTuning<Element, kHeadDim, kLimbs>.block_m();
    Scratch scratch(params.workspace);
    if (const int64_t num_splits = plan.table.splits.num_items(); num_splits > 0) {
      plan.partial_out = scratch.take<float>(num_splits * kBlockM * params.head_dim);
      plan.row_lses = scratch.take<RowLse>(num_splits * kBlockM);
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
