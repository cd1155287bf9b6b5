#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <memory>
#include <string>
#include <tuple>
#include <utility>

#include "cuda/common/device.h"
#include "cuda/common/kept.h"
#include "cuda/hopper/fwd/split_items.h"
#include "cuda/hopper/jvp/config.h"
#include "cuda/hopper/jvp/launch.h"
#include "cuda/hopper/jvp/tensors.h"
#include "cuda/hopper/launch.h"
#include "cuda/hopper/layout.h"
#include "cuda/hopper/plan/query_table.h"
#include "cuda/hopper/refusals.h"
#include "schedule.h"

namespace mixed_attention::cuda::hopper {
namespace {

// What is decided about a call, made once for all that are alike.
struct Plan {
  const char* refusal = nullptr;
  WorkTable table{};
};

Plan make_plan(const JvpParams& params) {
  if (!fits_work_table(params)) return {kPlanIsTooLarge};
  const JvpTuning tuning = jvp_tuning(jvp_form(params.tangents));
  Plan plan{.table = make_work_table(params, tuning.block_m(), tuning.block_n)};
  if (wants_splits(plan.table, num_multiprocessors(params.device))) plan.refusal = kWantsSplits;
  return plan;
}

std::shared_ptr<const Plan> plan_of(const JvpParams& params) {
  using Key = std::tuple<uint64_t, JvpForm, int64_t, int64_t, int>;
  static auto* kept = new Kept<Key, Plan>(256);  // never freed: threads may outlive static objects
  const Key key{params.schedule->id, jvp_form(params.tangents), params.batch_size, params.num_heads, params.device};
  return kept->of(key, [&] { return make_plan(params); });
}

bool can_map(const MovingView& tensor) {
  return can_map(tensor.still) && (tensor.dot.data == nullptr || can_map(tensor.dot));
}

// Whether rows lie where the kernels can read and write them.
bool is_aligned(const JvpParams& params) {
  for (int direction = 0; direction < params.tangents.count; ++direction) {
    const JvpTensors tensors = jvp_tensors(params, direction);
    if (!can_map(tensors.q) || !can_map(tensors.k) || !can_map(tensors.v)) return false;
    const auto* out_dot = static_cast<const uint16_t*>(params.out_dot) + direction * params.out_dot_step;
    if (!can_store(out_dot, params.out_dot_strides)) return false;
  }
  return params.lse_is_known || can_store(params.out, params.out_strides);
}

}  // namespace

JvpTensors jvp_tensors(const JvpParams& params, int direction) {
  const Tangents& tangents = params.tangents;
  const auto in_direction = [&](const void* data, int64_t step) {
    return data == nullptr ? nullptr : static_cast<const uint16_t*>(data) + direction * step;
  };
  return {{view_of(params, params.q, params.seqlen_q, params.head_dim, params.q_strides),
           view_of(params, in_direction(tangents.q, tangents.q_step), params.seqlen_q, params.head_dim,
                   tangents.q_strides)},
          {view_of(params, params.k, params.seqlen_k, params.head_dim, params.k_strides),
           view_of(params, in_direction(tangents.k, tangents.k_step), params.seqlen_k, params.head_dim,
                   tangents.k_strides)},
          {view_of(params, params.v, params.seqlen_k, params.head_dim_v, params.v_strides),
           view_of(params, in_direction(tangents.v, tangents.v_step), params.seqlen_k, params.head_dim_v,
                   tangents.v_strides)}};
}

std::string refusal_jvp(const Problem& problem) {
  if (problem.dtype == DType::kFloat32) return "the dtype is fp32";
  if (std::string refusal = refusal_fwd(problem); !refusal.empty()) return refusal;
  return refusal_above(problem, kJvpHeadDim);
}

const char* refusal_of_jvp(const JvpParams& params) {
  if (static_cast<float>(params.softmax_scale) == 0) return kScaleIsZero;  // as in the forward
  if (params.dropout_p != 0) return kDropsOut;
  if (params.key_padding_mask != nullptr) return kMasks;
  if (!is_aligned(params)) return kIsNotAligned;
  return plan_of(params)->refusal;
}

Launch<JvpParams> launch_of_jvp(const JvpParams& params) {
  const std::shared_ptr<const Plan> plan = plan_of(params);
  const JvpTuning tuning = jvp_tuning(jvp_form(params.tangents));
  return {.layout = layout_of(params, params.schedule->query_segments, tuning.block_m(), tuning.block_n),
          .run = [plan](const JvpParams& params) {
            params.dtype == DType::kBFloat16 ? launch_jvp<__nv_bfloat16>(params, plan->table)
                                             : launch_jvp<__half>(params, plan->table);
          }};
}

}  // namespace mixed_attention::cuda::hopper
