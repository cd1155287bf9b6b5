// How the device goes about a pass, by the family that serves it.
#include "cuda/hopper/launch.h"
#include "cuda/portable/launch.h"

namespace mixed_attention::cuda {
namespace {

Problem problem_of(const AttentionParams& params) {
  return {params.dtype, params.head_dim, params.head_dim_v, params.device};
}

}  // namespace

Layout layout_fwd(const FwdParams& params) {
  const bool is_hopper = choose_fwd(problem_of(params)).family == Choice::Family::kHopper;
  return is_hopper ? hopper::layout_fwd(params) : portable::layout_fwd(params);
}

Layout layout_bwd(const BwdParams& params) {
  const bool is_hopper = choose_bwd(problem_of(params)).family == Choice::Family::kHopper;
  return is_hopper ? hopper::layout_bwd(params) : portable::layout_bwd(params);
}

}  // namespace mixed_attention::cuda
