// Tile sizes of the Hopper backward for fp32, whose numbers are multiplied in kLimbs limbs (half_limbs.h), and the
// shared memory of its blocks. Heads have kMinFp32HeadDim to 64 columns and are filled up to 64 with zeros by TMA.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/hopper/bwd/config.h"
#include "cuda/hopper/config.h"
#include "cuda/hopper/tile/pipe.h"

namespace mixed_attention::cuda::hopper {

template <typename Config>
struct Fp32DkDvSharedStorage;
template <typename Config>
struct Fp32DqSharedStorage;

// Two warpgroups of 64 key rows. Every input is there once for each limb, of which two leave room for four tiles of
// queries and of output gradients each.
template <int kLimbs>
struct Fp32DkDvConfig : BwdTiles<__half, kFp32BwdHeadDim, kQueryTileRows, 2 * kWarpgroupRows, kLimbs> {
  using SharedStorage = Fp32DkDvSharedStorage<Fp32DkDvConfig>;
  static constexpr bool kHasRowScales = true, kIsOrdered = false;
  static constexpr int kSplits = 1;
  static constexpr int kConsumers = 2, kStages = 4, kStagesQ = kStages, kStagesDout = kStages;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
};

template <typename Config>
struct Fp32DkDvSharedStorage {
  alignas(1024) __half k[Config::kLimbs * Config::kBlockN * Config::kHeadDim];
  alignas(1024) __half v[Config::kLimbs * Config::kBlockN * Config::kHeadDim];
  alignas(1024) __half q[Config::kStages][Config::kLimbs * Config::kBlockM * Config::kHeadDim];
  alignas(1024) __half dout[Config::kStages][Config::kLimbs * Config::kBlockM * Config::kHeadDim];
  alignas(128) QueryNumbers q_stats[Config::kStages];
  alignas(128) DoutNumbers dout_stats[Config::kStages];

  SingleBufferPipe kv_pipe;
  Pipe<Config::kStages> q_pipe, dout_pipe;
};

// Two warpgroups of 64 query rows.
template <int kLimbs>
struct Fp32DqConfig : BwdTiles<__half, kFp32BwdHeadDim, kDqTileRows, 64, kLimbs> {
  using SharedStorage = Fp32DqSharedStorage<Fp32DqConfig>;
  static constexpr bool kHasRowScales = true;
  static constexpr int kSplits = 1;
  static constexpr int kConsumers = 2, kStages = 4, kStagesK = kStages, kStagesV = kStages;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
};

template <typename Config>
struct Fp32DqSharedStorage {
  alignas(1024) __half q[Config::kLimbs * Config::kBlockM * Config::kHeadDim];
  alignas(1024) __half dout[Config::kLimbs * Config::kBlockM * Config::kHeadDim];
  alignas(1024) __half k[Config::kStages][Config::kLimbs * Config::kBlockN * Config::kHeadDim];
  alignas(1024) __half v[Config::kStages][Config::kLimbs * Config::kBlockN * Config::kHeadDim];
  alignas(128) float k_scales[Config::kStages][Config::kBlockN];
  alignas(128) float v_scales[Config::kStages][Config::kBlockN];

  SingleBufferPipe q_pipe;               // and of dout
  Pipe<Config::kStages> k_pipe, v_pipe;  // k_pipe also of the row_scales of both
};

}  // namespace mixed_attention::cuda::hopper
