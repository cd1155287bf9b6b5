// The CUDA kernels' entry points, and what they serve.
#pragma once

#include <cstddef>
#include <functional>
#include <string>

#include "params.h"

namespace mixed_attention::cuda {

// Whether the kernels are in this build. Without them csrc/cpu_only stands for all that is declared here.
bool is_built();

// What decides which family of kernels serves a call. Whether fp32 may be rounded to TF32 does not: every family that
// serves fp32 has kernels for either, and chooses by AttentionParams::allow_tf32.
struct Problem {
  DType dtype;
  int64_t head_dim, head_dim_v;
  int device;
};

// The kernel family that serves a problem. The dispatch and the words for people come from this one place.
struct Choice {
  enum class Family { kNone, kPortable, kHopper } family;
  std::string why;  // why not a faster family, or why none at all; empty where nothing was refused

  std::string why_none() const { return family == Family::kNone ? why : ""; }
};

// Both throw std::invalid_argument where MIXED_ATTENTION_GPU asks for what there is not.
Choice choose_fwd(const Problem& problem);
Choice choose_bwd(const Problem& problem);

// Why no family serves the sizes of a call; empty where they can be counted. They read sizes and the schedule alone,
// that of a forward by queries, as a backward may be adding its inverse meanwhile.
std::string refusal_of_sizes(const FwdParams& params);
std::string refusal_of_sizes(const BwdParams& params);

// How the device goes about a pass, for people to read.
struct Layout {
  int tile_rows, block_rows;  // that a thread block owns, and that it takes up at a time of the other side
  int num_splits;             // parts that the walk of a tile is cut into
  int64_t num_tiles;          // of all heads and sequences, those of parts counted singly
  int num_slots;              // tiles that the device works on at a time
  int64_t num_split_tiles;    // whose walk is cut, all or some
};

// How a call is served, decided once and before there is memory for it.
template <class Params>
struct Launch {
  Choice choice;              // which kernels, and why no faster ones, or why none at all
  Layout layout{};            // by query for the forward, by key for the backward
  size_t workspace_size = 0;  // bytes of device memory that it needs beside inputs and outputs; 0 for most
  bool can_overwrite_inputs =
      false;  // whether gradients may be where the inputs are: dq where q lies, dk where k does…

  // Enqueues on params.stream and returns; it never synchronises, and allocates nothing but a stream's store of tables,
  // once (portable/device_tables.h). The params are those of the plan, and params.workspace is there.
  std::function<void(const Params&)> run;
};

// Of the pointers they compare some, and read none. Both throw std::invalid_argument where MIXED_ATTENTION_GPU asks for
// what there is not.
Launch<FwdParams> plan_fwd(const FwdParams& params);
Launch<BwdParams> plan_bwd(const BwdParams& params);

// Rounds fp32 tensors to 16 bits.
struct CastParams {
  static constexpr int kMostTensors = 8;

  // Elements in a row.
  struct Part {
    const void* from;  // fp32
    void* to;
    int64_t count;
  };

  Part tensors[kMostTensors];
  int num_tensors;
  DType dtype;  // of the results, bf16 or fp16
  void* stream;
};

// These enqueue on params.stream and return; they never synchronise and never allocate.
void run_rope(const RopeParams& params);
void run_rms_rope(const RmsRopeParams& params);
void run_cast(const CastParams& params);

}  // namespace mixed_attention::cuda
