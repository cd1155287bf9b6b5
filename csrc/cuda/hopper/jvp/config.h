// Tile sizes of the Hopper kernels for tangents of the forward, and the shared memory of a block.
#pragma once

#include <cstdint>

#include "cuda/hopper/config.h"
#include "cuda/hopper/tile/pipe.h"
#include "derivatives_params.h"

namespace mixed_attention::cuda::hopper {

// Columns of the kernels; narrower heads get columns of zeros, which are never stored.
inline constexpr int kJvpHeadDim = 64;

// What moves in a launch: queries alone, in one direction or in kMaxTangents of them, or anything, in one.
enum class JvpForm { kQuery, kQueries, kAll };

// A launch takes so many directions.
constexpr int directions_of(JvpForm form) { return form == JvpForm::kQueries ? kMaxTangents : 1; }

// That of a call's launches, of which there are more where it has more directions.
constexpr JvpForm jvp_form(const Tangents& tangents) {
  if (tangents.k != nullptr || tangents.v != nullptr) return JvpForm::kAll;
  return tangents.count == kMaxTangents ? JvpForm::kQueries : JvpForm::kQuery;
}

struct JvpTuning {
  int block_n, stages, producer_registers, consumer_registers;

  static constexpr int kConsumers = 2;
  constexpr int block_m() const { return kConsumers * kWarpgroupRows; }
};

// A thread of a consumer holds scores, their tangents, and both as operands, and the output and its tangent: 184
// registers with 80 keys, which leaves two warpgroups. The output and three tangents take 128: with 48 keys, scores and
// their tangents in one direction at a time, and operands of both, take 72.
constexpr JvpTuning jvp_tuning(JvpForm form) {
  switch (form) {
    case JvpForm::kQuery: return {80, 4, 40, 232};
    case JvpForm::kQueries: return {48, 4, 24, 240};
    default: return {80, 3, 40, 232};
  }
}

template <typename Element_, JvpForm kForm>
struct JvpConfig {
  using Element = Element_;
  static constexpr bool kMovesKeys = kForm == JvpForm::kAll;  // or queries alone
  static constexpr bool kKeepsQueries = !kMovesKeys;          // in registers, where there is room for them
  static constexpr int kDirections = directions_of(kForm);
  static constexpr int kHeadDim = kJvpHeadDim;
  static constexpr JvpTuning kTuning = jvp_tuning(kForm);
  static constexpr int kConsumers = kTuning.kConsumers, kBlockM = kTuning.block_m(), kBlockN = kTuning.block_n;
  static constexpr int kStages = kTuning.stages, kQueryBuffers = 2;
  static constexpr int kProducerRegisters = kTuning.producer_registers;
  static constexpr int kConsumerRegisters = kTuning.consumer_registers;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr int kBlocks = 1;

  // One slab each.
  static constexpr int kTileBytesM = kBlockM * kRowBytes;
  static constexpr int kTileBytesN = kBlockN * kRowBytes;
  static constexpr int kQueryBytes = (1 + kDirections) * kTileBytesM;  // q, then its tangents

  static_assert(kHeadDim * sizeof(Element) == kRowBytes, "a tile is one slab");
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= 65536 / kThreads / 8 * 8 * (1 + kConsumers),
                "the warpgroups ask for more registers than the launch gives, and would wait for ever");
};

// A tensor's tiles and those of its tangent, which come and go together.
template <typename Element, int kCount, int kRows, bool kMoves>
struct MovingTiles {
  alignas(1024) Element still[kCount][kRows * kJvpHeadDim];
  alignas(1024) Element dot[kCount][kRows * kJvpHeadDim];
};

template <typename Element, int kCount, int kRows>
struct MovingTiles<Element, kCount, kRows, false> {
  alignas(1024) Element still[kCount][kRows * kJvpHeadDim];
};

template <typename Config>
struct JvpSharedStorage {
  using Element = typename Config::Element;

  MovingTiles<Element, Config::kQueryBuffers, Config::kBlockM, true> q;
  MovingTiles<Element, Config::kStages, Config::kBlockN, Config::kMovesKeys> k;
  MovingTiles<Element, Config::kStages, Config::kBlockN, Config::kMovesKeys> v;

  Pipe<Config::kQueryBuffers> q_pipe;
  Pipe<Config::kStages> k_pipe;
  Pipe<Config::kStages> v_pipe;

  float bases[2][Config::kBlockM];  // of the rows of two items, by turns: RowBases
  uint64_t finished;                // all consumer warps, with all of their items
  int has_overflowed;               // whether a result has: fwd/overflow.cuh
};

}  // namespace mixed_attention::cuda::hopper
