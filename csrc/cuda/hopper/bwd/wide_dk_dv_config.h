// Tile sizes of the kernel for dk and dv of wide heads, and the shared memory of its blocks.
#pragma once

#include <cstdint>

#include "cuda/hopper/bwd/config.h"

namespace mixed_attention::cuda::hopper {

// A tile of queries waits in its buffer for two steps or so, one of output gradients for one and a half. Of keys and
// values kKeptColumns columns are in registers.
template <int kHeadDim>
struct WideDkDvTuning;

template <>
struct WideDkDvTuning<192> {
  static constexpr int kStagesQ = 4, kStagesDout = 3, kKeptColumns = 192;
};

template <>
struct WideDkDvTuning<256> {
  static constexpr int kStagesQ = 3, kStagesDout = 2, kKeptColumns = 128;
};

// Two warpgroups share a tile of 64 keys: one owns dv, the other one dk.
template <typename Element, int kHeadDim, bool kIsMasked_>
struct WideDkDvConfig : WideDkDvTuning<kHeadDim>, BwdTiles<Element, kHeadDim, kQueryTileRows, key_tile_rows(kHeadDim)> {
  using Tiles = BwdTiles<Element, kHeadDim, kQueryTileRows, key_tile_rows(kHeadDim)>;
  static constexpr bool kIsMasked = kIsMasked_, kIsOrdered = false;
  static constexpr int kConsumers = 2, kSplits = 1;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

  static_assert(is_wide(kHeadDim) && Tiles::kBlockN == kWarpgroupRows);
  // p passes through shared memory where keys and values are in registers.
  static_assert(Tiles::kBlockM * sizeof(float) <= WideDkDvTuning<kHeadDim>::kKeptColumns * sizeof(Element));
};

template <typename Config>
struct WideDkDvSharedStorage {
  using Element = typename Config::Element;

  alignas(1024) Element k[Config::kBlockN * Config::kHeadDim];
  alignas(1024) Element v[Config::kBlockN * Config::kHeadDim];
  alignas(1024) Element q[Config::kStagesQ][Config::kBlockM * Config::kHeadDim];
  alignas(1024) Element dout[Config::kStagesDout][Config::kBlockM * Config::kHeadDim];
  alignas(128) float lse_log2[Config::kStagesQ][kStatsTileFloats];
  alignas(128) float delta[Config::kStagesDout][Config::kBlockM];

  uint64_t kv_full, kv_empty, kv_kept;
  uint64_t q_full[Config::kStagesQ], q_empty[Config::kStagesQ];
  uint64_t dout_full[Config::kStagesDout], dout_empty[Config::kStagesDout];
  uint64_t p_full[2], p_empty[2];
};

}  // namespace mixed_attention::cuda::hopper
