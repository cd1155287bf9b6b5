// Tiles of the Hopper kernel for three tangents of queries, and the shared memory of a block.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/hopper/jvp/config.h"

namespace mixed_attention::cuda::hopper {

template <typename Element_>
struct DirectionsConfig {
  using Element = Element_;
  static constexpr int kDirections = directions_of(JvpForm::kQueries);
  static constexpr int kHeadDim = kJvpHeadDim;
  static constexpr JvpTuning kTuning = jvp_tuning(JvpForm::kQueries);
  static constexpr int kConsumers = kTuning.kConsumers, kBlockM = kTuning.block_m(), kBlockN = kTuning.block_n;
  static constexpr int kStages = kTuning.stages, kQueryBuffers = 2;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr int kBlocks = 1;

  static constexpr int kTileBytesM = kBlockM * kRowBytes;
  static constexpr int kTileBytesN = kBlockN * kRowBytes;
  static constexpr int kQueryBytes = (1 + kDirections) * kTileBytesM;  // q, then its tangents

  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= 65536 / kThreads / 8 * 8 * (1 + kConsumers),
                "the warpgroups ask for more registers than the launch gives, and would wait for ever");
};

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
