// Which kernel family serves a call.
#include "cuda/launch.h"

#include <algorithm>
#include <utility>

#include "cuda/hopper/launch.h"
#include "cuda/portable/launch.h"
#include "environment.h"

namespace mixed_attention::cuda {
namespace {

using Family = Choice::Family;

Choice choose(const Problem& problem, std::string hopper_refusal,
              std::string (*refusal_of_portable)(const Problem&) = portable::refusal) {
  if (asks_for_portable_gpu_kernels()) hopper_refusal = "MIXED_ATTENTION_GPU asks for the portable kernels";
  if (hopper_refusal.empty()) return {Family::kHopper, ""};
  std::string portable_refusal = refusal_of_portable(problem);
  if (!portable_refusal.empty()) return {Family::kNone, std::move(portable_refusal)};
  return {Family::kPortable, std::move(hopper_refusal)};
}

Problem problem_of(const AttentionParams& params) {
  return {params.dtype, params.head_dim, params.head_dim_v, params.device};
}

// Not an element anywhere: nothing to compute, and nothing that a tensor map could describe.
bool is_empty(const AttentionParams& params) { return params.batch_size == 0 || params.num_heads == 0; }

// The family that serves a call: that of its problem, or the portable one where the call itself is not for Hopper's
// kernels.
template <class Params>
Choice choice_of(Choice of_problem, const Params& params, const char* (*hopper_refusal)(const Params&)) {
  if (of_problem.family == Family::kHopper) {
    if (const char* why = hopper_refusal(params)) return {Family::kPortable, why};
  }
  return of_problem;
}

// The launch of the family that serves a call.
template <class Params>
Launch<Params> plan(Choice choice, const Params& params, const char* (*hopper_refusal)(const Params&),
                    Launch<Params> (*hopper_launch)(const Params&), Launch<Params> (*portable_launch)(const Params&)) {
  if (choice.family == Family::kNone) return {.choice = std::move(choice)};
  if (std::string why = refusal_of_sizes(params); !why.empty()) return {.choice = {Family::kNone, std::move(why)}};
  choice = choice_of(std::move(choice), params, hopper_refusal);
  Launch<Params> launch = choice.family == Family::kHopper ? hopper_launch(params) : portable_launch(params);
  launch.choice = std::move(choice);
  if (is_empty(params)) {
    launch.workspace_size = 0;
    launch.run = [](const Params&) {};
  }
  return launch;
}

// Hopper's large kernels behind the small ones of the portable family.
Launch<BwdJvpParams> hopper_launch_of_bwd_jvp(const BwdJvpParams& params) {
  Launch<BwdJvpParams> launch = portable::launch_of_bwd_jvp(params, hopper::products_of_bwd_jvp(params));
  launch.layout = hopper::layout_of_bwd_jvp(params);
  return launch;
}

// The tangents' launch behind that of the forward, which is faster alone. Both have the workspace in turn.
Launch<JvpParams> behind(Launch<FwdParams> forward, Launch<JvpParams> tangents) {
  tangents.workspace_size = std::max(tangents.workspace_size, forward.workspace_size);
  tangents.run = [forward = std::move(forward.run), tangents = std::move(tangents.run)](const JvpParams& params) {
    forward(params);
    JvpParams known = params;
    known.lse_is_known = true;
    tangents(known);
  };
  return tangents;
}

}  // namespace

Choice choose_fwd(const Problem& problem) { return choose(problem, hopper::refusal_fwd(problem)); }

Choice choose_bwd(const Problem& problem) { return choose(problem, hopper::refusal_bwd(problem)); }

Choice choose_jvp(const Problem& problem) {
  return choose(problem, hopper::refusal_jvp(problem), portable::refusal_of_tangents);
}

Choice choose_bwd_jvp(const Problem& problem) { return choose_jvp(problem); }

Launch<FwdParams> plan_fwd(const FwdParams& params) {
  return plan(choose_fwd(problem_of(params)), params, hopper::refusal_of_fwd, hopper::launch_of_fwd,
              portable::launch_of_fwd);
}

Launch<BwdParams> plan_bwd(const BwdParams& params) {
  return plan(choose_bwd(problem_of(params)), params, hopper::refusal_of_bwd, hopper::launch_of_bwd,
              portable::launch_of_bwd);
}

Launch<JvpParams> plan_jvp(const JvpParams& params) {
  Launch<JvpParams> tangents = plan(choose_jvp(problem_of(params)), params, hopper::refusal_of_jvp,
                                    hopper::launch_of_jvp, portable::launch_of_jvp);
  const Family family = tangents.choice.family;
  if (params.lse_is_known || family == Family::kNone || family == Family::kHopper) return tangents;
  const Choice forward = choice_of<FwdParams>(choose_fwd(problem_of(params)), params, hopper::refusal_of_fwd);
  if (forward.family == Family::kPortable && portable::jvp_serves_forward(params)) return tangents;
  return behind(plan_fwd(params), std::move(tangents));
}

Launch<BwdJvpParams> plan_bwd_jvp(const BwdJvpParams& params) {
  return plan<BwdJvpParams>(choose_bwd_jvp(problem_of(params)), params, hopper::refusal_of_bwd_jvp,
                            hopper_launch_of_bwd_jvp, portable::launch_of_bwd_jvp);
}

}  // namespace mixed_attention::cuda
