// The way into the CUDA kernels, of one extension or of a library of their own: C functions over plain structs. Neither
// exceptions nor the standard library's classes cross it, so that either side may come from another compiler.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/problem.h"
#include "derivatives_params.h"
#include "params.h"

namespace mixed_attention::cuda {

enum class Status : int32_t {
  kOk,
  kInvalidArgument,  // what was asked for is not, as by the environment
  kFailed,           // of CUDA, say
};

// Words, why a function did not do what it is for above all, in UTF-8 that ends with a zero; what is longer is cut.
struct Message {
  char text[1024];
};

// How a call is served, decided once and before there is memory for it.
struct Served {
  void* launch;               // the library's own, to be run and freed; null where nothing serves the call
  Layout layout;              // by query for the forward, by key for the backward
  size_t workspace_size;      // bytes of device memory that it needs beside inputs and outputs; 0 for most
  bool can_overwrite_inputs;  // whether gradients may be where the inputs are: dq where q lies, dk where k does
};

// What there is for a forward or a backward.
template <class Params>
struct Pass {
  // The family of kernels that serves a problem, by name, and why no faster one or none; empty without a refusal.
  Status (*choose)(const Problem* problem, Message* family, Message* why);
  // Likewise of a call. It compares some of the pointers, and reads none.
  Status (*plan)(const Params* params, Served* served, Message* family, Message* why);
  // Enqueues on params.stream and returns; it never synchronises. The params are those of the plan, and
  // params.workspace is there.
  Status (*run)(const void* launch, const Params* params, Message* why);
  void (*free)(void* launch);
};

// Schedules that params point to are the library's own: it alone knows what they look like.
struct Interface {
  // Tells the headers that the library was compiled from. It stays where it is, whatever else changes here.
  uint64_t id;

  Status (*make_schedule)(const int64_t* flat, size_t length, int64_t seqlen_q, int64_t seqlen_k, Schedule** made,
                          Message* why);  // without the inverse
  Status (*add_inverse)(Schedule* schedule, Message* why);
  void (*free_schedule)(Schedule* schedule);

  Pass<FwdParams> fwd;
  Pass<BwdParams> bwd;
  Pass<JvpParams> jvp;
  Pass<BwdJvpParams> bwd_jvp;  // one direction at a time

  // They enqueue and return as the passes do.
  Status (*run_rope)(const RopeParams* params, Message* why);
  Status (*run_rms_rope)(const RmsRopeParams* params, Message* why);
  Status (*run_rope_jvp)(const RopeJvpParams* params, Message* why);
  Status (*run_rope_backward)(const RopeBwdParams* params, Message* why);
  Status (*run_cast)(const CastParams* params, Message* why);
  Status (*run_column_sums)(const ColumnSumsParams* params, Message* why);
};

// A hash of this header and those that it includes; the build knows it.
#ifndef MIXED_ATTENTION_INTERFACE
#define MIXED_ATTENTION_INTERFACE 0
#endif
inline constexpr uint64_t kInterfaceId = MIXED_ATTENTION_INTERFACE;

}  // namespace mixed_attention::cuda

// The kernels that are linked here; null where there are none.
extern "C" __attribute__((visibility("default"))) const mixed_attention::cuda::Interface* mixed_attention_kernels();
