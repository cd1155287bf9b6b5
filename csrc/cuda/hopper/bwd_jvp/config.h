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
// whether, where queries own, dq' is wanted; else it is the form of double backward, which has neither. kAddsDq:
// whether a third warpgroup adds to dq what the keys of a block that owns them contribute; in double backward alone.
template <typename Element_, bool kOwnsKeys_, bool kMovesKeys_, bool kIsWhole, bool kAddsDq_ = false>
struct BwdJvpConfig {
  using Element = Element_;
  static constexpr bool kOwnsKeys = kOwnsKeys_, kMovesKeys = kMovesKeys_, kAddsDq = kAddsDq_;
  // Which of a side's tensors there may be beside the first and the third.
  static constexpr bool kOwnsSecond = kOwnsKeys ? kMovesKeys : true, kOwnsFourth = kOwnsKeys ? kMovesKeys : kIsWhole;
  static constexpr bool kStreamsSecond = kOwnsKeys ? true : kMovesKeys;
  static constexpr bool kStreamsFourth = kOwnsKeys ? kIsWhole : kMovesKeys;
  static constexpr bool kHasFourth = kOwnsFourth || kStreamsFourth;
  static constexpr bool kHasSecondGradient = kOwnsKeys || kIsWhole;
  // Whether s and z are one product, of k with q and q' one behind the other, which reads k once.
  static constexpr bool kJoinsScores = kAddsDq && !kMovesKeys;
  // Which of a consumer's own rows stay in registers, so far as these reach, and whether kᵀ of the third warpgroup
  // does.
  static constexpr bool kKeepsFirst = !kJoinsScores, kKeepsSecond = !kOwnsKeys && !kHasFourth;
  static constexpr bool kKeepsThird = kAddsDq ? kMovesKeys : !kHasFourth || !kHasSecondGradient;
  static constexpr bool kKeepsKeysOfDq = kMovesKeys;
  static constexpr int kHeadDim = kJvpHeadDim;
  static constexpr int kConsumers = 2, kBlockM = kBwdJvpBlockM, kBlockN = kBwdJvpBlockN;
  // A consumer takes so many rows of a tile that streams at a time: beside both gradients its registers hold s, z, e
  // and x of 32 of them, or s, z and e of all, if nothing of its own is there.
  static constexpr int kStepRows = kAddsDq && kMovesKeys ? kBlockN / 2 : kBlockN;
  // Where dq is added to, shared memory has no room for what may not be there.
  static constexpr int kOwnedStep = kAddsDq && !kMovesKeys ? 2 : 1;  // from one tensor of those that own to the next
  static constexpr int kStreamedTensors = kAddsDq ? kSideTensors - 1 : kSideTensors;
  static constexpr int kStages = !kAddsDq ? 4 : kMovesKeys ? 3 : 5;
  static constexpr int kProducerRegisters = kAddsDq ? 32 : 24;
  static constexpr int kConsumerRegisters = kJoinsScores ? 208 : kAddsDq ? 192 : 240;
  static constexpr int kDqRegisters = kKeepsKeysOfDq ? 96 : 64;
  static constexpr int kThreads = (1 + kConsumers + kAddsDq) * kWarpgroup;

  static constexpr int kTileBytesM = kBlockM * kRowBytes;
  static constexpr int kTileBytesN = kBlockN * kRowBytes;

  static_assert(!kAddsDq || (kOwnsKeys && !kIsWhole), "it is double backward that adds to dq where keys own");
};

// Numbers of the queries of a tile, as columns: of BwdJvpRows, where place_of_stats says.
struct ColumnNumbersOfTile {
  float lse_log2[kBwdJvpBlockN], mu[kBwdJvpBlockN], eps[kBwdJvpBlockN], gamma[kBwdJvpBlockN];
  int row_begin, num_rows, has_references;
  int num_owned;  // rows of the item
};

// The shared memory that the third warpgroup reads and writes.
template <typename Config, bool kAddsDq = Config::kAddsDq>
struct BwdJvpDqExchange {};

template <typename Config>
struct BwdJvpDqExchange<Config, true> {
  static constexpr int kStages = 2, kStagings = Config::kMovesKeys ? 1 : 2;
  static constexpr int kFactors = Config::kMovesKeys ? 2 : 1;  // ds, and g, which keys' tangents are multiplied by
  static constexpr int kDqTileFloats = Config::kBlockN * Config::kHeadDim;

  // Transposed, (keys, queries).
  alignas(1024) typename Config::Element factors[kStages][kFactors][Config::kBlockM * Config::kBlockN];
  alignas(128) float staging[kStagings][kDqTileFloats];
  Pipe<kStages> pipe;
};

template <typename Config>
struct BwdJvpSharedStorage {
  using Element = typename Config::Element;

  alignas(1024) Element owned[kSideTensors / Config::kOwnedStep][Config::kBlockM * Config::kHeadDim];
  alignas(1024) Element streamed[Config::kStages][Config::kStreamedTensors][Config::kBlockN * Config::kHeadDim];
  [[no_unique_address]] BwdJvpDqExchange<Config> dq_exchange;
  alignas(16) ColumnNumbersOfTile columns[Config::kStages];  // where keys own

  SingleBufferPipe owned_pipe;
  Pipe<Config::kStages> streamed_pipe;
};

}  // namespace mixed_attention::cuda::hopper
