// Which kernel family serves a call.
#include "cuda/launch.h"

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

// What a problem allows, the call at hand may still rule out.
bool hopper_serves(const FwdParams& params) {
  return !asks_for_portable_gpu_kernels() && hopper::refusal_fwd(problem_of(params)).empty() && hopper::can_fwd(params);
}

bool hopper_serves(const BwdParams& params) {
  return !asks_for_portable_gpu_kernels() && hopper::refusal_bwd(problem_of(params)).empty() && hopper::can_bwd(params);
}

}  // namespace

bool is_built() { return true; }

Choice choose_fwd(const Problem& problem) { return choose(problem, hopper::refusal_fwd(problem)); }

Choice choose_bwd(const Problem& problem) { return choose(problem, hopper::refusal_bwd(problem)); }

size_t fwd_workspace_size(const FwdParams& params) {
  return hopper_serves(params) ? hopper::fwd_workspace_size(params) : portable::fwd_workspace_size(params);
}

size_t bwd_workspace_size(const BwdParams& params) {
  return hopper_serves(params) ? hopper::bwd_workspace_size(params) : portable::bwd_workspace_size(params);
}

bool can_overwrite_inputs(const BwdParams& params) {
  return hopper_serves(params) && hopper::can_overwrite_inputs(params);
}

void run_fwd(const FwdParams& params) {
  if (is_empty(params)) return;
  hopper_serves(params) ? hopper::run_fwd(params) : portable::run_fwd(params);
}

void run_bwd(const BwdParams& params) {
  if (is_empty(params)) return;
  hopper_serves(params) ? hopper::run_bwd(params) : portable::run_bwd(params);
}

}  // namespace mixed_attention::cuda
