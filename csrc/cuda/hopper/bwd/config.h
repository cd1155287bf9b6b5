// Tile sizes of the Hopper backward and the shared memory of its blocks, by head_dim.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/common/row_reference.h"
#include "cuda/hopper/bwd/listed_shared.h"
#include "cuda/hopper/config.h"
#include "cuda/hopper/tile/pipe.h"

namespace mixed_attention::cuda::hopper {

// Heads of another width are served by the next of these, as in the forward.
inline constexpr int kBwdHeadDims[] = {32, 64, 96, 128, 192, 256};
inline constexpr int kFp32BwdHeadDim = 64;  // the only one of fp32
inline constexpr int kFp32BwdHeadDims[] = {kFp32BwdHeadDim};

template <typename Visit>
auto with_bwd_head_dim(int64_t head_dim, const Visit& visit) {
  return with_head_dim_of<kBwdHeadDims>(head_dim, visit);
}

// Calls visit.operator()<Element, kHeadDim, kLimbs>() with those of the kernels that serve a call.
template <typename Visit>
auto with_bwd_kernel(const BwdParams& params, const Visit& visit) {
  return with_kernel_of<kFp32BwdHeadDims, kBwdHeadDims>(params, visit);
}

// True if one kernel computes all gradients of such heads. At 96 the registers of three warpgroups fall some words
// short of it; at 128 two of them could, but take as long as the two kernels.
constexpr bool can_add_dq(int64_t head_dim) { return head_dim <= 64; }

// True if dk and dv of 64 keys take more registers than a warpgroup has, so that one owns dk and another one dv.
constexpr bool is_wide(int64_t head_dim) { return head_dim > 128; }

// True if dq_accum holds dqᵀ, which has 64 rows to an MMA; else it holds dq.
constexpr bool transposes_dq(int head_dim) { return head_dim % kWarpgroupRows == 0; }

// Query rows of one step of the kernel for dk and dv; the statistics of the queries are stored by such tiles.
inline constexpr int kQueryTileRows = 64;

// The place of a query's statistics among those of its tile. A thread of an MMA has two neighbouring columns out of
// every eight: those out of sixteen lie side by side, to be read at once.
constexpr int place_of_stats(int row) { return row / 16 * 16 + row % 8 / 2 * 4 + row / 8 % 2 * 2 + row % 2; }

// A tile of statistics: a number for each query; then, of log-sum-exps, where the references of the tile's rows begin
// (row_reference.h), 8 bytes, and a mark; and 4 bytes, as TMA moves 16.
inline constexpr int kMarkPlace = kQueryTileRows + 2;

// The marks of a tile other than 0: one of its rows has a reference; or none has, but the tile has fewer rows than fit.
inline constexpr float kHasReferences = 1, kIsPartial = 2;
inline constexpr int kStatsTileFloats = kQueryTileRows + 4;

// The same of fp32. The kernel for dk and dv reads these beside a tile of queries.
struct QueryNumbers {
  float lse_log2[kQueryTileRows];    // +inf where there is no key, and where there is no query: p is 0
  float row_scales[kQueryTileRows];  // of the limbs of q
};

// It reads these beside a tile of output gradients. So that those of all rows can be added up by one MMA, they are
// given one row_scale: a row's own is row_scale * factors[row].
struct DoutNumbers {
  float delta[kQueryTileRows];    // row sum of out * dout, less dlse
  float factors[kQueryTileRows];  // 2^15 at most
  float row_scale;
  float has_reference;             // 1 if a row has one, else 0
  const RowReference* references;  // of the tile's rows; null if none has one and there are as many as fit
};

// Key rows of an item of that kernel.
constexpr int key_tile_rows(int64_t head_dim) { return is_wide(head_dim) ? kWarpgroupRows : 2 * kWarpgroupRows; }

// Tiles of kBlockM_ queries and kBlockN_ keys as they lie in shared memory, the limbs of fp32 one behind the other.
template <typename Element_, int kHeadDim_, int kBlockM_, int kBlockN_, int kLimbs_ = 1>
struct BwdTiles {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_, kBlockM = kBlockM_, kBlockN = kBlockN_, kLimbs = kLimbs_;
  static constexpr int kSlabColumns = slab_columns(kHeadDim), kRowBytes = kSlabColumns * sizeof(Element);
  static constexpr int kSlabBytesM = kBlockM * kRowBytes, kLimbBytesM = kHeadDim / kSlabColumns * kSlabBytesM;
  static constexpr int kSlabBytesN = kBlockN * kRowBytes, kLimbBytesN = kHeadDim / kSlabColumns * kSlabBytesN;
  static constexpr int kTileBytesM = kLimbs * kLimbBytesM, kTileBytesN = kLimbs * kLimbBytesN;
  static constexpr bool kIsListed = false;      // whether the items stand in a list on the device
  static constexpr bool kHasRowScales = false;  // whether they are limbs of fp32, each row with a scale of its own

  static_assert(sizeof(Element) == 2 && kHeadDim % kSlabColumns == 0, "tiles are whole slabs of 16-bit elements");
};

// How many tiles of queries, and of output gradients, the kernel for dk and dv holds. One of queries waits in its
// buffer for three steps, one of output gradients for one.
constexpr int dk_dv_stages(int head_dim) { return head_dim <= 96 ? 5 : 4; }

// How many tiles of keys, and of values, it holds where they stand in a list: items are of a few query tiles each, and
// the next one's keys come under them. Wide heads leave no room for that.
constexpr int num_key_buffers_of_list(int head_dim) { return head_dim < 64 ? 2 : 1; }

// Who computes dq: another kernel, or a third warpgroup, which adds what the key tile contributes atomically, as blocks
// come, or in a fixed order.
enum class DqForm { kSeparate, kAtomic, kOrdered };

template <typename Config>
struct DkDvSharedStorage;

// Each warpgroup owns 64 keys of a tile. kIsMasked: by a key padding mask. The queries of a tile are split over the
// kSplits blocks of a cluster. kIsListed: the items stand in a list on the device.
template <typename Element, int kHeadDim, bool kIsMasked_, DqForm kDqForm, int kSplits_ = 1, bool kIsListed_ = false>
struct DkDvConfig : BwdTiles<Element, kHeadDim, kQueryTileRows, key_tile_rows(kHeadDim)> {
  using Tiles = BwdTiles<Element, kHeadDim, kQueryTileRows, key_tile_rows(kHeadDim)>;
  using SharedStorage = DkDvSharedStorage<DkDvConfig>;
  static constexpr bool kIsMasked = kIsMasked_, kIsListed = kIsListed_;
  static constexpr int kKeyBuffers = kIsListed ? num_key_buffers_of_list(kHeadDim) : 1;
  static constexpr int kStagesQ = dk_dv_stages(kHeadDim), kStagesDout = dk_dv_stages(kHeadDim);
  static constexpr int kConsumers = Tiles::kBlockN / kWarpgroupRows;
  static constexpr int kScoreBytes = Tiles::kBlockN * Tiles::kBlockM * sizeof(Element);
  static constexpr int kDqTileFloats = Tiles::kBlockM * kHeadDim;

  static constexpr bool kAddsDq = kDqForm != DqForm::kSeparate, kIsOrdered = kDqForm == DqForm::kOrdered;
  static constexpr int kSplits = kSplits_;
  static constexpr int kThreads = (1 + kConsumers + kAddsDq) * kWarpgroup;
  // Who takes items from a list has more to hold than a producer, and gets it where others can do without.
  static constexpr bool kLeavesRegisters = kIsListed && kHeadDim <= (kAddsDq ? 32 : 64);
  static constexpr int kProducerRegisters = kSplits > 1 ? 48 : kLeavesRegisters ? 40 : kAddsDq ? 32 : 24;
  static constexpr int kDqRegisters = kLeavesRegisters ? 88 : 96;
  static constexpr int kConsumerRegisters = kAddsDq ? (kSplits > 1 ? 184 : 192) : kLeavesRegisters ? 232 : 240;
  // The registers hold some inputs as well: 1 for a consumer's own values, 2 for these and its keys. A mask's bits take
  // the last registers.
  static constexpr int kKeptInputs = kHeadDim > 64 || kSplits > 1 ? 0
                                     : kHeadDim < 64 || !kAddsDq  ? 2
                                     : kIsMasked && !kIsOrdered   ? 0
                                                                  : 1;
  // True if steps that relate no scores have a loop of their own: a branch in the only loop costs up to a tenth of the
  // rate where dq is added to. An ordered dq and two blocks leave no registers for two loops.
  static constexpr bool kSeparatesRareItems = kAddsDq && !(kIsOrdered && kSplits > 1);
  // The operands of the MMAs for dk and dv take turns in the same registers where these are few.
  static constexpr bool kSharesOperand = kHeadDim > 64 || kSplits > 1 || kIsMasked || kKeptInputs == 1;

  static_assert(Tiles::kBlockM * sizeof(Element) == hopper::kRowBytes, "rows of ds fill the widest swizzle");
  static_assert(kSplits == 1 || kSplits == 2, "blocks of a cluster exchange sums in pairs");
  static_assert(!kIsListed || (!kIsMasked && !kIsOrdered && kSplits == 1), "no list has masks, turns or splits");
};

// The shared memory that the third warpgroup reads and writes. If dq is ordered, a query tile's sums wait in their
// buffer for their turn.
template <typename Config, bool kAddsDq = Config::kAddsDq, bool kIsListed = Config::kIsListed>
struct DqExchange {};

template <typename Config>
struct DqExchange<Config, true, false> {
  static constexpr int kStages = 2;
  static constexpr int kStagings = Config::kIsOrdered && Config::kSplits == 1 ? 3 : 2;

  // Transposed gradients of scores, (keys, queries).
  alignas(1024) typename Config::Element ds[kStages][Config::kBlockN * Config::kBlockM];
  Pipe<kStages> ds_pipe;
  alignas(128) float staging[kStagings][Config::kDqTileFloats];
  Pipe<kStagings> staging_pipe;
};

// Where items stand in a list, sums leave from registers, and rows of dq, by warp, through shared memory.
template <typename Config>
struct DqExchange<Config, true, true> {
  static constexpr int kStages = 2;

  alignas(1024) typename Config::Element ds[kStages][Config::kBlockN * Config::kBlockM];
  Pipe<kStages> ds_pipe;
  alignas(128) typename Config::Element rows[kWarpgroup / 32][kWarpRows * kQueryTileRows];
  DqVisitRing visits;
};

struct NoItemRing {};

// Tiles are slabs of (rows, kSlabColumns) elements, one after the other, as TMA's swizzle writes them.
template <typename Config>
struct DkDvSharedStorage {
  using Element = typename Config::Element;

  alignas(1024) Element k[Config::kKeyBuffers * Config::kBlockN * Config::kHeadDim];
  alignas(1024) Element v[Config::kKeyBuffers * Config::kBlockN * Config::kHeadDim];
  alignas(1024) Element q[Config::kStagesQ][Config::kBlockM * Config::kHeadDim];
  alignas(1024) Element dout[Config::kStagesDout][Config::kBlockM * Config::kHeadDim];
  // By warp: 16 rows of a result on their way out, or, where queries are split, its fp32 sums of the other block.
  alignas(1024) Element staging[Config::kConsumers * kWarpgroup / 32][Config::kSplits * 16 * Config::kHeadDim];
  alignas(128) float q_stats[Config::kStagesQ][kStatsTileFloats];       // log-sum-exps in base 2, and a mark
  alignas(128) float dout_stats[Config::kStagesDout][Config::kBlockM];  // delta

  std::conditional_t<Config::kIsListed, Pipe<Config::kKeyBuffers>, SingleBufferPipe> kv_pipe;
  Pipe<Config::kStagesQ> q_pipe;
  Pipe<Config::kStagesDout> dout_pipe;

  DqExchange<Config> dq_exchange;
  uint64_t peer_full, peer_empty;  // of the other block's sums
  [[no_unique_address]] std::conditional_t<Config::kIsListed, ItemRing, NoItemRing> items;
};

// Two warpgroups of 64 query rows. Keys wait in their buffer for two steps, values for one.
inline constexpr int kDqTileRows = 2 * kWarpgroupRows;

struct DqTuning {
  int block_n, stages_k, stages_v;
};

// Beyond 128 shared memory bounds the tiles of keys, and rows of dq leave without passing through it.
constexpr DqTuning dq_tuning(int head_dim) {
  switch (head_dim) {
    case 32:
    case 64: return {128, 4, 4};
    case 96: return {128, 3, 3};
    case 128: return {128, 2, 2};
    case 192: return {80, 2, 2};
    default: return {64, 2, 1};
  }
}

template <typename Config>
struct DqSharedStorage;

template <typename Element, int kHeadDim, bool kIsMasked_, bool kIsListed_ = false>
struct DqConfig : BwdTiles<Element, kHeadDim, kDqTileRows, dq_tuning(kHeadDim).block_n> {
  using SharedStorage = DqSharedStorage<DqConfig>;
  static constexpr int kStagesK = dq_tuning(kHeadDim).stages_k, kStagesV = dq_tuning(kHeadDim).stages_v;
  static constexpr int kSplits = 1;
  static constexpr bool kIsMasked = kIsMasked_, kIsListed = kIsListed_;
  static constexpr int kConsumers = kDqTileRows / kWarpgroupRows;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr int kProducerRegisters = kIsMasked ? 40 : 24, kConsumerRegisters = kIsMasked ? 232 : 240;
  static constexpr bool kIsStaged = !is_wide(kHeadDim);  // whether dq leaves through shared memory
};

// Rows of dq on their way out, 16 of each warp.
template <typename Config, bool kIsStaged = Config::kIsStaged>
struct DqStaging {};

template <typename Config>
struct DqStaging<Config, true> {
  alignas(1024) typename Config::Element rows[Config::kConsumers * kWarpgroup / 32][kWarpRows * Config::kHeadDim];
};

template <typename Config>
struct DqSharedStorage {
  using Element = typename Config::Element;

  alignas(1024) Element q[Config::kBlockM * Config::kHeadDim];
  alignas(1024) Element dout[Config::kBlockM * Config::kHeadDim];
  alignas(1024) Element k[Config::kStagesK][Config::kBlockN * Config::kHeadDim];
  alignas(1024) Element v[Config::kStagesV][Config::kBlockN * Config::kHeadDim];
  DqStaging<Config> staging;

  alignas(16) uint32_t key_bits[Config::kStagesK][kKeyBitWords];  // of k's tiles; only under a mask

  SingleBufferPipe q_pipe;  // and of dout
  Pipe<Config::kStagesK> k_pipe;
  Pipe<Config::kStagesV> v_pipe;
};

}  // namespace mixed_attention::cuda::hopper
