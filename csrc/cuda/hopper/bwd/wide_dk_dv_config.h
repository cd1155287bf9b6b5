// Tile sizes of the kernel for dk and dv of wide heads, and the shared memory of its blocks.
#pragma once

#include <cstdint>

#include "cuda/hopper/bwd/config.h"

namespace mixed_attention::cuda::hopper {

struct WideDkDvTuning {
  int stages_q, stages_dout;
  int kept_columns;  // of keys and values, in registers
};

// A tile of queries waits in its buffer for two steps or so, one of output gradients for one and a half.
constexpr WideDkDvTuning wide_dk_dv_tuning(int head_dim) {
  return head_dim == 192 ? WideDkDvTuning{4, 3, 192} : WideDkDvTuning{3, 2, 128};
}

template <typename Config>
struct WideDkDvSharedStorage;

// Two warpgroups share a tile of 64 keys: one owns dv, the other one dk.
template <typename Element, int kHeadDim, bool kIsMasked_>
struct WideDkDvConfig : BwdTiles<Element, kHeadDim, kQueryTileRows, key_tile_rows(kHeadDim)> {
  using Tiles = BwdTiles<Element, kHeadDim, kQueryTileRows, key_tile_rows(kHeadDim)>;
  using SharedStorage = WideDkDvSharedStorage<WideDkDvConfig>;
  static constexpr WideDkDvTuning kTuning = wide_dk_dv_tuning(kHeadDim);
  static constexpr int kStagesQ = kTuning.stages_q, kStagesDout = kTuning.stages_dout;
  static constexpr int kKeptColumns = kTuning.kept_columns;
  static constexpr bool kIsMasked = kIsMasked_, kIsOrdered = false;
  static constexpr int kConsumers = 2, kSplits = 1;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

  static_assert(is_wide(kHeadDim) && Tiles::kBlockN == kWarpgroupRows, "either owner has 64 keys");
  static_assert(Tiles::kBlockM * sizeof(float) <= kKeptColumns * sizeof(Element),
                "p passes through shared memory where keys and values are in registers");
};

template <typename Config>
struct WideDkDvSharedStorage {
  using Element = typename Config::Element;

  alignas(1024) Element k[Config::kBlockN * Config::kHeadDim];
  alignas(1024) Element v[Config::kBlockN * Config::kHeadDim];
  alignas(1024) Element q[Config::kStagesQ][Config::kBlockM * Config::kHeadDim];
  alignas(1024) Element dout[Config::kStagesDout][Config::kBlockM * Config::kHeadDim];
  alignas(128) float q_stats[Config::kStagesQ][kStatsTileFloats];       // log-sum-exps in base 2, and a mark
  alignas(128) float dout_stats[Config::kStagesDout][Config::kBlockM];  // delta

  SingleBufferPipe kv_pipe;
  uint64_t kv_kept;
  Pipe<Config::kStagesQ> q_pipe;
  Pipe<Config::kStagesDout> dout_pipe;
  Pipe<2> p_pipe;
};

}  // namespace mixed_attention::cuda::hopper
