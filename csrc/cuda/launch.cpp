// Which kernel family serves a call.
#include "cuda/launch.h"

#include "cuda/portable/launch.h"

namespace mixed_attention::cuda {
namespace {

Choice portable_or_none(const Problem& problem, std::string why_not_hopper) {
  std::string refusal = portable::refusal(problem);
  if (!refusal.empty()) return {Choice::Family::kNone, std::move(refusal)};
  return {Choice::Family::kPortable, std::move(why_not_hopper)};
}

}  // namespace

Choice choose_fwd(const Problem& problem) { return portable_or_none(problem, ""); }

Choice choose_bwd(const Problem& problem) { return portable_or_none(problem, ""); }

size_t fwd_workspace_size(const FwdParams& params) { return portable::fwd_workspace_size(params); }

size_t bwd_workspace_size(const BwdParams& params) { return portable::bwd_workspace_size(params); }

void run_fwd(const FwdParams& params) { portable::run_fwd(params); }

void run_bwd(const BwdParams& params) { portable::run_bwd(params); }

}  // namespace mixed_attention::cuda
