// The Hopper kernels for gradients of tangents: their tiles, and the shared memory of a block.
#pragma once

#include <cstdint>

#include "cuda/hopper/config.h"
#include "cuda/hopper/jvp/config.h"
#include "cuda/hopper/tile/pipe.h"

namespace mixed_attention::cuda::hopper {

inline constexpr int kBwdJvpBlockM = 2 * kWarpgroupRows, kBwdJvpBlockN = 64;
inline constexpr int kColumnWarps = kBwdJvpBlockN / 32;  // who read the numbers of the queries of a tile

// Four tensors have rows that a block owns and four have rows that stream through it: of the one kernel q, q', y and y2
// own and k, k', v and v' stream, of the other it is the other way round.
inline constexpr int kSideTensors = 4;

// kMovesKeys: whether k or v move, or queries alone. kIsWhole: whether there is a gradient of the output itself, y2, or
// whether, where queries own, dq' is wanted; else it is the form of double backward, which has neither.
template <typename Element_, bool kOwnsKeys_, bool kMovesKeys, bool kIsWhole>
struct BwdJvpConfig {
  using Element = Element_;
  static constexpr bool kOwnsKeys = kOwnsKeys_;
  // Which of a side's tensors there may be beside the first and the third.
  static constexpr bool kOwnsSecond = kOwnsKeys ? kMovesKeys : true, kOwnsFourth = kOwnsKeys ? kMovesKeys : kIsWhole;
  static constexpr bool kStreamsSecond = kOwnsKeys ? true : kMovesKeys;
  static constexpr bool kStreamsFourth = kOwnsKeys ? kIsWhole : kMovesKeys;
  static constexpr bool kHasFourth = kOwnsFourth || kStreamsFourth;
  static constexpr bool kHasSecondGradient = kOwnsKeys || kIsWhole;
  // Which of a consumer's own rows stay in registers, so far as these reach.
  static constexpr bool kKeeps[kSideTensors] = {true, !kOwnsKeys && !kHasFourth, !kHasFourth || !kHasSecondGradient,
                                                false};
  static constexpr int kHeadDim = kJvpHeadDim;
  static constexpr int kConsumers = 2, kBlockM = kBwdJvpBlockM, kBlockN = kBwdJvpBlockN;
  static constexpr int kStages = 4;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;

  static constexpr int kTileBytesM = kBlockM * kRowBytes;
  static constexpr int kTileBytesN = kBlockN * kRowBytes;
};

// Numbers of the queries of a tile, as columns: of BwdJvpRows, where place_of_stats says.
struct ColumnNumbersOfTile {
  float lse_log2[kBwdJvpBlockN], mu[kBwdJvpBlockN], eps[kBwdJvpBlockN], gamma[kBwdJvpBlockN];
};

template <typename Config>
struct BwdJvpSharedStorage {
  using Element = typename Config::Element;

  alignas(1024) Element owned[kSideTensors][Config::kBlockM * Config::kHeadDim];
  alignas(1024) Element streamed[Config::kStages][kSideTensors][Config::kBlockN * Config::kHeadDim];
  alignas(16) ColumnNumbersOfTile columns[Config::kStages];  // where keys own

  SingleBufferPipe owned_pipe;
  Pipe<Config::kStages> streamed_pipe;
};

}  // namespace mixed_attention::cuda::hopper
