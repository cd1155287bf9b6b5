// Tile sizes of the Hopper backward and the shared memory of its blocks, by head_dim.
#pragma once

#include <cstdint>

#include "cuda/hopper/config.h"

namespace mixed_attention::cuda::hopper {

// Query rows of one step of the kernel for dk and dv; the statistics of the queries are stored by such tiles.
inline constexpr int kQueryTileRows = 64;

// Two warpgroups of 64 key rows. A tile of queries waits in its buffer for three steps, one of output gradients for
// one.
template <int kHeadDim>
struct DkDvTuning;

template <>
struct DkDvTuning<64> {
  static constexpr int kStagesQ = 5, kStagesDout = 4;
  static constexpr bool kSharesOperand = false;
};

// dk and dv take 128 registers: the operands of their products must take turns in the same 16.
template <>
struct DkDvTuning<128> {
  static constexpr int kStagesQ = 4, kStagesDout = 3;
  static constexpr bool kSharesOperand = true;
};

// With kAddsDq a third warpgroup computes what the key tile adds to dq.
template <typename Element_, int kHeadDim_, bool kAddsDq_>
struct DkDvConfig : DkDvTuning<kHeadDim_> {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kAddsDq = kAddsDq_;
  static constexpr int kConsumers = 2;
  static constexpr int kBlockM = kQueryTileRows, kBlockN = kConsumers * kWarpgroupRows;
  static constexpr int kThreads = (1 + kConsumers + kAddsDq) * kWarpgroup;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = kAddsDq ? 192 : 240, kDqRegisters = 104;

  static constexpr int kSlabBytesM = kBlockM * kSlabColumns * sizeof(Element);
  static constexpr int kSlabBytesN = kBlockN * kSlabColumns * sizeof(Element);
  static constexpr int kTileBytesM = kHeadDim / kSlabColumns * kSlabBytesM;
  static constexpr int kTileBytesN = kHeadDim / kSlabColumns * kSlabBytesN;
  static constexpr int kStatsBytes = kBlockM * sizeof(float);

  static constexpr int kScoreBytes = kBlockN * kBlockM * sizeof(Element);
  static constexpr int kDqTileFloats = kBlockM * kHeadDim;

  static_assert(sizeof(Element) == 2 && kHeadDim % kSlabColumns == 0 && kBlockM == kSlabColumns);
};

// What the third warpgroup reads and writes.
template <typename Config, bool kAddsDq = Config::kAddsDq>
struct DqExchange {};

template <typename Config>
struct DqExchange<Config, true> {
  static constexpr int kStages = 3, kStagings = 2;

  // Transposed gradients of scores, (keys, queries).
  alignas(1024) typename Config::Element ds[kStages][Config::kBlockN * Config::kBlockM];
  alignas(128) float staging[kStagings][Config::kDqTileFloats];
  uint64_t ds_full[kStages], ds_empty[kStages];
};

// Tiles are slabs of (rows, 64) elements, one after the other, as the copy engine's 128-byte swizzle writes them.
template <typename Config>
struct DkDvSharedStorage {
  using Element = typename Config::Element;

  alignas(1024) Element k[Config::kBlockN * Config::kHeadDim];
  alignas(1024) Element v[Config::kBlockN * Config::kHeadDim];
  alignas(1024) Element q[Config::kStagesQ][Config::kBlockM * Config::kHeadDim];
  alignas(1024) Element dout[Config::kStagesDout][Config::kBlockM * Config::kHeadDim];
  alignas(1024) Element staging[Config::kBlockN * Config::kHeadDim];  // (rows, head_dim), 16 rows a warp
  alignas(128) float lse_log2[Config::kStagesQ][Config::kBlockM];
  alignas(128) float delta[Config::kStagesDout][Config::kBlockM];

  uint64_t kv_full, kv_empty;
  uint64_t q_full[Config::kStagesQ], q_empty[Config::kStagesQ];
  uint64_t dout_full[Config::kStagesDout], dout_empty[Config::kStagesDout];

  DqExchange<Config> exchange;
};

// Two warpgroups of 64 query rows. Keys wait in their buffer for two steps, values for one.
template <int kHeadDim>
struct DqTuning;

template <>
struct DqTuning<64> {
  static constexpr int kStages = 4;
};

template <>
struct DqTuning<128> {
  static constexpr int kStages = 2;
};

template <typename Element_, int kHeadDim_>
struct DqConfig : DqTuning<kHeadDim_> {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kConsumers = 2;
  static constexpr int kBlockM = kConsumers * kWarpgroupRows, kBlockN = 128;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

  static constexpr int kSlabBytesM = kBlockM * kSlabColumns * sizeof(Element);
  static constexpr int kSlabBytesN = kBlockN * kSlabColumns * sizeof(Element);
  static constexpr int kTileBytesM = kHeadDim / kSlabColumns * kSlabBytesM;
  static constexpr int kTileBytesN = kHeadDim / kSlabColumns * kSlabBytesN;

  static_assert(sizeof(Element) == 2 && kHeadDim % kSlabColumns == 0);
};

template <typename Config>
struct DqSharedStorage {
  using Element = typename Config::Element;

  alignas(1024) Element q[Config::kBlockM * Config::kHeadDim];
  alignas(1024) Element dout[Config::kBlockM * Config::kHeadDim];
  alignas(1024) Element k[Config::kStages][Config::kBlockN * Config::kHeadDim];
  alignas(1024) Element v[Config::kStages][Config::kBlockN * Config::kHeadDim];
  alignas(1024) Element staging[Config::kBlockM * Config::kHeadDim];  // (rows, head_dim), 16 rows a warp

  uint64_t q_full, q_empty;  // and dout
  uint64_t k_full[Config::kStages], k_empty[Config::kStages];
  uint64_t v_full[Config::kStages], v_empty[Config::kStages];
};

}  // namespace mixed_attention::cuda::hopper
