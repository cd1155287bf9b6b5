// The Hopper kernels for gradients of tangents: their tiles, and the shared memory of a block.
#pragma once

#include <cstdint>

#include "cuda/hopper/config.h"
#include "cuda/hopper/jvp/config.h"
#include "cuda/hopper/tile/pipe.h"

namespace mixed_attention::cuda::hopper {

inline constexpr int kBwdJvpBlockM = 2 * kWarpgroupRows, kBwdJvpBlockN = 64;

// Four tensors have rows that a block owns and four have rows that stream through it: of the one kernel q, q', y and y2
// own and k, k', v and v' stream, of the other it is the other way round.
inline constexpr int kSideTensors = 4;

// kMovesKeys: whether k or v move, or queries alone. kHasDout: whether there is a gradient of the output itself, y2.
template <typename Element_, bool kOwnsKeys_, bool kMovesKeys, bool kHasDout>
struct BwdJvpConfig {
  using Element = Element_;
  static constexpr bool kOwnsKeys = kOwnsKeys_;
  // Which of a side's tensors there may be beside the first and the third.
  static constexpr bool kOwnsSecond = kOwnsKeys ? kMovesKeys : true, kOwnsFourth = kOwnsKeys ? kMovesKeys : kHasDout;
  static constexpr bool kStreamsSecond = kOwnsKeys ? true : kMovesKeys;
  static constexpr bool kStreamsFourth = kOwnsKeys ? kHasDout : kMovesKeys;
  static constexpr int kHeadDim = kJvpHeadDim;
  static constexpr int kConsumers = 2, kBlockM = kBwdJvpBlockM, kBlockN = kBwdJvpBlockN;
  static constexpr int kStages = 4;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;

  static constexpr int kTileBytesM = kBlockM * kRowBytes;
  static constexpr int kTileBytesN = kBlockN * kRowBytes;
};

// Numbers of the queries of a tile, as columns: of BwdJvpRows.
struct ColumnNumbersOfTile {
  float lse_log2[kBwdJvpBlockN], mu[kBwdJvpBlockN], eps[kBwdJvpBlockN], gamma[kBwdJvpBlockN];
};

template <typename Config>
struct BwdJvpSharedStorage {
  using Element = typename Config::Element;

  alignas(1024) Element owned[kSideTensors][Config::kBlockM * Config::kHeadDim];
  alignas(1024) Element streamed[Config::kStages][kSideTensors][Config::kBlockN * Config::kHeadDim];

  SingleBufferPipe owned_pipe;
  Pipe<Config::kStages> streamed_pipe;
  ColumnNumbersOfTile columns[Config::kConsumers][2];  // two tiles' by turns, where keys own
};

}  // namespace mixed_attention::cuda::hopper
