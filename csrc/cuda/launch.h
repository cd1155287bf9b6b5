// The CUDA kernels' entry points, and what they serve. Others than the kernels come in by interface.h.
#pragma once

#include <cstddef>
#include <functional>
#include <string>

#include "cuda/problem.h"
#include "derivatives_params.h"
#include "params.h"

namespace mixed_attention::cuda {

// The kernel family that serves a problem. The dispatch and the words for people come from this one place.
struct Choice {
  enum class Family { kNone, kPortable, kHopper } family;
  std::string why;  // why not a faster family, or why none at all; empty where nothing was refused

  std::string why_none() const { return family == Family::kNone ? why : ""; }
};

// They throw std::invalid_argument where MIXED_ATTENTION_GPU asks for what there is not.
Choice choose_fwd(const Problem& problem);
Choice choose_bwd(const Problem& problem);
Choice choose_jvp(const Problem& problem);
Choice choose_bwd_jvp(const Problem& problem);

// Why no family serves the sizes of a call; empty where they can be counted. They read sizes and the schedule alone,
// that of a forward by queries, as a backward may be adding its inverse meanwhile.
std::string refusal_of_sizes(const FwdParams& params);
std::string refusal_of_sizes(const BwdParams& params);

// How a call is served, decided once and before there is memory for it.
template <class Params>
struct Launch {
  Choice choice;              // which kernels, and why no faster ones, or why none at all
  Layout layout{};            // by query for the forward, by key for the backward
  size_t workspace_size = 0;  // bytes of device memory that it needs beside inputs and outputs; 0 for most
  bool can_overwrite_inputs =
      false;  // whether gradients may be where the inputs are: dq where q lies, dk where k does…

  // Enqueues on params.stream and returns; it never synchronises, and allocates nothing but a stream's store of tables,
  // once (common/device_tables.h). The params are those of the plan, and params.workspace is there.
  std::function<void(const Params&)> run;
};

// They compare some of the pointers, and read none. All throw std::invalid_argument where MIXED_ATTENTION_GPU asks for
// what there is not.
Launch<FwdParams> plan_fwd(const FwdParams& params);
Launch<BwdParams> plan_bwd(const BwdParams& params);
Launch<JvpParams> plan_jvp(const JvpParams& params);
Launch<BwdJvpParams> plan_bwd_jvp(const BwdJvpParams& params);

// These enqueue on params.stream and return; they never synchronise and never allocate.
void run_rope(const RopeParams& params);
void run_rms_rope(const RmsRopeParams& params);
void run_rope_jvp(const RopeJvpParams& params);
void run_rope_backward(const RopeBwdParams& params);
void run_cast(const CastParams& params);
void run_column_sums(const ColumnSumsParams& params);

}  // namespace mixed_attention::cuda
