#include "cuda/portable/tangent_plan.h"

#include <algorithm>
#include <string>

#include "cuda/portable/launch.h"

namespace mixed_attention::cuda::portable {
namespace {

// What tensor cores multiply by: tangents are as exact as fp32 where TF32 is allowed, too.
Arithmetic arithmetic_of_tangents(const AttentionParams& params) {
  const Arithmetic arithmetic = arithmetic_of(params);
  return arithmetic == Arithmetic::kTf32 ? Arithmetic::kTf32x3 : arithmetic;
}

// The narrowest kernels that an arithmetic has for heads of these columns; 0 where there are none.
int padded_head_dim(Arithmetic arithmetic, int64_t head_dim) {
  const auto* found = std::find_if(std::begin(kHeadDims), std::end(kHeadDims),
                                   [&](int padded) { return padded >= head_dim && has_tangents(arithmetic, padded); });
  return found == std::end(kHeadDims) ? 0 : *found;
}

template <class Plan>
Plan plan_of(const AttentionParams& params) {
  Plan plan{.arithmetic = arithmetic_of_tangents(params)};
  plan.head_dim = padded_head_dim(plan.arithmetic, std::max(params.head_dim, params.head_dim_v));
  return plan;
}

}  // namespace

std::string refusal_of_tangents(const Problem& problem) {
  if (std::string why = refusal(problem); !why.empty()) return why;
  AttentionParams params{};
  params.dtype = problem.dtype;
  const int64_t head_dim = std::max(problem.head_dim, problem.head_dim_v);
  if (padded_head_dim(arithmetic_of_tangents(params), head_dim) != 0) return "";
  return "head_dim: " + std::to_string(head_dim) + " has no kernels of tangents";
}

bool jvp_serves_forward(const JvpParams& params) { return plan_fwd(params).by_query.pass->num_splits == 1; }

JvpPlan plan_jvp(const JvpParams& params) {
  auto plan = plan_of<JvpPlan>(params);
  const Moving moving = moving_of(plan.arithmetic, plan.head_dim, params.tangents);
  plan.tile = jvp_tile(plan.arithmetic, plan.head_dim, moving);
  plan.by_query.pass = pass_of(Side::kQueries, params, plan.tile, false);
  take_workspace(params, plan);
  return plan;
}

void take_workspace(const JvpParams& params, JvpPlan& plan) {
  Scratch scratch(params.workspace);
  plan.by_query.take(scratch);
  plan.workspace_size = scratch.bytes();
}

BwdJvpPlan plan_bwd_jvp(const BwdJvpParams& params) {
  auto plan = plan_of<BwdJvpPlan>(params);
  const Tile tile = bwd_jvp_tile(plan.arithmetic, plan.head_dim);
  plan.by_query.pass = pass_of(Side::kQueries, params, tile);
  plan.by_key.pass = pass_of(Side::kKeys, params, tile);
  take_workspace(params, plan);
  return plan;
}

void take_workspace(const BwdJvpParams& params, BwdJvpPlan& plan) {
  const int64_t rows = params.batch_size * params.num_heads * params.seqlen_q;
  Scratch scratch(params.workspace);
  plan.by_query.take(scratch);
  plan.by_key.take(scratch);
  BwdBuffers& bwd = plan.buffers.bwd;
  take_rows(params, scratch, bwd);
  plan.buffers.eps = scratch.take<float>(rows);
  bwd.partial_dq = plan.by_query.take_splits(scratch, rows * params.head_dim);
  if (params.dq_dot != nullptr) {
    plan.buffers.partial_dq_dot = plan.by_query.take_splits(scratch, rows * params.head_dim);
  }
  take_splits_of_keys(params, plan.by_key, scratch, bwd);
  plan.workspace_size = scratch.bytes();
}

}  // namespace mixed_attention::cuda::portable
