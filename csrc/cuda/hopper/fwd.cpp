#include <memory>
#include <string>

#include "cuda/common/device.h"
#include "cuda/hopper/config.h"
#include "cuda/hopper/fwd/launch.h"
#include "cuda/hopper/fwd/list.h"
#include "cuda/hopper/launch.h"
#include "cuda/hopper/layout.h"
#include "cuda/hopper/plan/bring_list.h"
#include "cuda/hopper/refusals.h"
#include "schedule.h"

namespace mixed_attention::cuda::hopper {
namespace {

// A row is copied, and leaves, in pieces of 16 bytes.
constexpr int64_t kHeadDimStep = 8;

Layout layout_fwd(const FwdParams& params, const FwdPlan& plan) {
  const FwdTuning tuning = with_fwd_kernel(params, [&]<typename Element, int kHeadDim, int kLimbs>() {
    return plan.form == FwdForm::kListed ? fwd_tuning_of_list(kHeadDim) : kFwdTuning<Element, kHeadDim, kLimbs>;
  });
  Layout layout = layout_of(params, params.schedule->query_segments, tuning.block_m(), tuning.block_n);
  layout.num_slots *= tuning.blocks * tuning.teams;
  const ItemSplits& splits = plan.table.splits;
  layout.num_splits = splits.num_splits;
  layout.num_tiles += splits.num_items() - splits.num_whole;
  layout.num_split_tiles = splits.num_whole;
  return layout;
}

}  // namespace

std::string refusal_fwd(const Problem& problem) {
  if (compute_capability(problem.device) != 90) return "the device is not of compute capability 9.0";
  if (problem.dtype == DType::kFloat64) return "the dtype is fp64";
  const bool is_fp32 = problem.dtype == DType::kFloat32;
  const int64_t least = is_fp32 ? kMinFp32HeadDim : kHeadDimStep;
  const int64_t most = is_fp32 ? kMaxFp32HeadDim : kMaxFwdHeadDim;
  const auto refusal = [&](const char* name, int64_t head_dim) -> std::string {
    const int64_t least_of_own = head_dim < widest_head_dim(problem) ? kHeadDimStep : least;
    if (head_dim >= least_of_own && head_dim <= most && head_dim % kHeadDimStep == 0) return "";
    return name + (" is " + std::to_string(head_dim)) + ", not a multiple of " + std::to_string(kHeadDimStep) +
           " from " + std::to_string(least_of_own) + " to " + std::to_string(most);
  };
  if (std::string why = refusal("head_dim", problem.head_dim); !why.empty()) return why;
  return refusal("head_dim of v", problem.head_dim_v);
}

const char* refusal_of_fwd(const FwdParams& params) {
  const FwdTensors tensors = fwd_tensors(params);
  const bool is_fp32 = params.dtype == DType::kFloat32;
  // Keys past the end of a range get the score -inf, whose product with zero is NaN.
  if (static_cast<float>(params.softmax_scale) == 0) return kScaleIsZero;
  if (params.dropout_p != 0) return kDropsOut;
  if (is_fp32 && params.key_padding_mask != nullptr) return kMasksFp32;
  if (!can_load(tensors.q) || !can_load(tensors.k) || !can_load(tensors.v) ||
      !can_store(params.out, params.out_strides, is_fp32 ? 4 : 2)) {
    return kIsNotAligned;
  }
  return refusal_of_plan(params);
}

Launch<FwdParams> launch_of_fwd(const FwdParams& params) {
  auto plan = std::make_shared<FwdPlan>(plan_fwd(params));
  const auto list = plan->form == FwdForm::kListed ? list_of(params) : nullptr;
  return {.layout = layout_fwd(params, *plan),
          .workspace_size = plan->workspace_size,
          .run = [plan, list](const FwdParams& params) {
            take_workspace(params, *plan);
            const HeldTable held =
                list == nullptr ? HeldTable{} : bring_list(*list, params, plan->list_room, plan->table);
            with_fwd_kernel(params, [&]<typename Element, int kHeadDim, int kLimbs>() {
              launch_fwd<Element, kHeadDim, kLimbs>(params, *plan);
            });
          }};
}

}  // namespace mixed_attention::cuda::hopper
