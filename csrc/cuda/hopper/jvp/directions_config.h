// The shared memory of a block of the Hopper kernel for three tangents of queries.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/hopper/jvp/config.h"

namespace mixed_attention::cuda::hopper {

template <typename Element>
using DirectionsConfig = JvpConfig<Element, JvpForm::kQueries>;

template <typename Config>
struct DirectionsSharedStorage {
  using Element = typename Config::Element;

  alignas(1024) Element q[Config::kQueryBuffers][1 + Config::kDirections][Config::kBlockM * Config::kHeadDim];
  alignas(1024) Element k[Config::kStages][Config::kBlockN * Config::kHeadDim];
  alignas(1024) Element v[Config::kStages][Config::kBlockN * Config::kHeadDim];

  Pipe<Config::kQueryBuffers> q_pipe;
  Pipe<Config::kStages> k_pipe;
  Pipe<Config::kStages> v_pipe;

  // Means and sums of TangentSums, of each thread's two rows: seldom needed for as long as a register would hold them.
  float4 tangents[Config::kDirections][Config::kConsumers * kWarpgroup];
  float bases[Config::kBlockM];  // RowBases
  uint64_t finished;             // all consumer warps, with all of their items
  int has_overflowed;            // whether a result has: fwd/overflow.cuh
};

}  // namespace mixed_attention::cuda::hopper
