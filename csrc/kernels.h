// The CUDA kernels for those who call them, wherever they are: linked here, or in a library that was opened. Failures
// are exceptions again: std::invalid_argument, or std::runtime_error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "cuda/problem.h"
#include "derivatives_params.h"
#include "params.h"

namespace mixed_attention::kernels {

// Whether there are any. Where not, nothing below but open may be called.
bool are_there();

// Why there are none, in words that follow on those of a sentence. Whoever has looked for a library may say more.
const std::string& why_none();
void set_why_none(std::string why);

// Opens a library of kernels for the whole process. Any other call comes later than this one.
// Throws std::runtime_error, with one sentence, where it cannot be opened or was not built from the same interface.
void open(const std::string& path);

// A plan as the kernels want it, see parse_schedule in schedule.h; with the inverse once that was added.
std::shared_ptr<Schedule> make_schedule(const int64_t* flat, size_t length, int64_t seqlen_q, int64_t seqlen_k);
void add_inverse(Schedule& schedule);

// Which family of kernels serves a problem, or "none".
struct Choice {
  std::string family;
  std::string why;  // why not a faster family, or why none at all; empty where nothing was refused

  std::string why_none() const { return family == "none" ? why : ""; }
};

// How a call is served; cuda/interface.h says what its parts mean.
template <class Params>
struct Launch {
  Choice choice;
  cuda::Layout layout{};
  size_t workspace_size = 0;
  bool can_overwrite_inputs = false;
  std::unique_ptr<void, void (*)(void*)> launch{nullptr, nullptr};

  void run(const Params& params) const;
};

// These are there for FwdParams, BwdParams, JvpParams and BwdJvpParams.
template <class Params>
Choice choose(const cuda::Problem& problem);
template <class Params>
Launch<Params> plan(const Params& params);

void run_rope(const RopeParams& params);
void run_rms_rope(const RmsRopeParams& params);
void run_rope_jvp(const RopeJvpParams& params);
void run_rope_backward(const RopeBwdParams& params);
void run_cast(const cuda::CastParams& params);
void run_column_sums(const cuda::ColumnSumsParams& params);

}  // namespace mixed_attention::kernels
