// Which kernel family serves a call.
#include "cuda/launch.h"

#include <utility>

#include "cuda/hopper/launch.h"
#include "cuda/portable/launch.h"
#include "environment.h"

namespace mixed_attention::cuda {
namespace {

using Family = Choice::Family;

Choice choose(const Problem& problem, std::string hopper_refusal) {
  if (asks_for_portable_gpu_kernels()) hopper_refusal = "MIXED_ATTENTION_GPU asks for the portable kernels";
  if (hopper_refusal.empty()) return {Family::kHopper, ""};
  std::string portable_refusal = portable::refusal(problem);
  if (!portable_refusal.empty()) return {Family::kNone, std::move(portable_refusal)};
  return {Family::kPortable, std::move(hopper_refusal)};
}

Problem problem_of(const AttentionParams& params) {
  return {params.dtype, params.head_dim, params.head_dim_v, params.device};
}

// Not an element anywhere: nothing to compute, and nothing that a tensor map could describe.
bool is_empty(const AttentionParams& params) { return params.batch_size == 0 || params.num_heads == 0; }

// Why nothing serves a call of such a problem; empty where something does.
std::string why_none(const Choice& choice, const AttentionParams& params) {
  return choice.family == Family::kNone ? choice.why : refusal_of_sizes(params);
}

}  // namespace

bool is_built() { return true; }

Choice choose_fwd(const Problem& problem) { return choose(problem, hopper::refusal_fwd(problem)); }

Choice choose_bwd(const Problem& problem) { return choose(problem, hopper::refusal_bwd(problem)); }

Launch<FwdParams> plan_fwd(const FwdParams& params) {
  const Choice choice = choose_fwd(problem_of(params));
  if (std::string why = why_none(choice, params); !why.empty()) return {.why_none = std::move(why)};
  if (is_empty(params)) return {.run = [](const FwdParams&) {}};
  return choice.family == Family::kHopper && hopper::can_fwd(params) ? hopper::launch_of_fwd(params)
                                                                     : portable::launch_of_fwd(params);
}

Launch<BwdParams> plan_bwd(const BwdParams& params) {
  const Choice choice = choose_bwd(problem_of(params));
  if (std::string why = why_none(choice, params); !why.empty()) return {.why_none = std::move(why)};
  if (is_empty(params)) return {.run = [](const BwdParams&) {}};
  return choice.family == Family::kHopper && hopper::can_bwd(params) ? hopper::launch_of_bwd(params)
                                                                     : portable::launch_of_bwd(params);
}

}  // namespace mixed_attention::cuda
