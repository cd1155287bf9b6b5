// Tile sizes of the Hopper kernels and the shared memory of a block, by head_dim.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cuda/hopper/tile/pipe.h"
#include "params.h"

namespace mixed_attention::cuda::hopper {

inline constexpr int kWarpgroup = 128;     // threads
inline constexpr int kWarpgroupRows = 64;  // query rows of one warpgroup, fixed by wgmma
inline constexpr int kWarpRows = 16;       // of them, one warp's
inline constexpr int kSlabColumns = 64;    // columns of 16 bits in 128 bytes, the widest swizzle
inline constexpr int kRowBytes = 128;      // of such a slab
// One step of an MMA, 16 along the summed dimension.
inline constexpr int kColumnStepBytes = 32;
inline constexpr int kRowStepBytes = 16 * kRowBytes;

// True if a forward's warpgroup without rows may skip the softmax. That pays with three warpgroups only: with two, a
// step takes as long as the MMAs.
constexpr bool skips_softmax(int block_m) { return block_m > 2 * kWarpgroupRows; }

// Words for a bit for every key of a tile.
inline constexpr int kKeyBitWords = 4;

// Heads of another width are served by the next of these, with columns of zeros that are never stored.
inline constexpr int kFwdHeadDims[] = {32, 64, 96, 128, 192, 256};
inline constexpr int kMaxFwdHeadDim = 256;

// The width that a kernel has to have: that of queries and keys, or that of values, whichever is larger. To the other
// ones TMA adds columns of zeros, too. Sizes: AttentionParams or a Problem.
template <typename Sizes>
constexpr int64_t widest_head_dim(const Sizes& sizes) {
  return std::max(sizes.head_dim, sizes.head_dim_v);
}

// Calls visit.operator()<kHeadDim>() with the first of kHeadDims that is not less than head_dim.
template <const auto& kHeadDims, size_t kIndex = 0, typename Visit>
auto with_head_dim_of(int64_t head_dim, const Visit& visit) {
  constexpr int kHeadDim = kHeadDims[kIndex];
  if constexpr (kIndex + 1 < std::size(kHeadDims)) {
    if (head_dim > kHeadDim) return with_head_dim_of<kHeadDims, kIndex + 1>(head_dim, visit);
  }
  return visit.template operator()<kHeadDim>();
}

// The same for fp32, whose numbers are multiplied as fp16 ones, their limbs.
inline constexpr int kFp32HeadDims[] = {64, 128};
inline constexpr int kMinFp32HeadDim = 40;  // narrower ones would be multiplied by too many zeros
inline constexpr int kMaxFp32HeadDim = 128;

// Calls visit.operator()<kLimbs>() with the limbs of an fp32 number. One of them has the 11 significant bits of TF32.
template <typename Visit>
auto with_limbs(const AttentionParams& params, const Visit& visit) {
  return params.allow_tf32 ? visit.template operator()<1>() : visit.template operator()<2>();
}

// Calls visit.operator()<Element, kHeadDim, kLimbs>() with those of the kernel that serves a call, of the widths that
// its pass has for fp32 and for 16 bits, whose numbers are a single limb.
template <const auto& kFp32HeadDims, const auto& kHeadDims, typename Visit>
auto with_kernel_of(const AttentionParams& params, const Visit& visit) {
  if (params.dtype == DType::kFloat32) {
    return with_head_dim_of<kFp32HeadDims>(widest_head_dim(params), [&]<int kHeadDim>() {
      return with_limbs(params, [&]<int kLimbs>() { return visit.template operator()<float, kHeadDim, kLimbs>(); });
    });
  }
  return with_head_dim_of<kHeadDims>(widest_head_dim(params), [&]<int kHeadDim>() {
    return params.dtype == DType::kBFloat16 ? visit.template operator()<__nv_bfloat16, kHeadDim, 1>()
                                            : visit.template operator()<__half, kHeadDim, 1>();
  });
}

template <typename Visit>
auto with_fwd_kernel(const FwdParams& params, const Visit& visit) {
  return with_kernel_of<kFp32HeadDims, kFwdHeadDims>(params, visit);
}

// Columns of the slabs that a tile is stored in: as wide as a swizzle allows, but none of them half empty, which the
// MMAs would take for work.
constexpr int slab_columns(int head_dim) { return head_dim % kSlabColumns == 0 ? kSlabColumns : kSlabColumns / 2; }

// True if a slab of a tile holds columns of a tensor that has so many. Copies bring such slabs alone: one from behind
// the last column faults now and then. The others are zeros from the start of a block on (clear_missing_slabs).
template <int kHeadDim>
constexpr bool has_slab(int slab, int columns) {
  return slab == 0 || slab * slab_columns(kHeadDim) < columns;
}

// How a forward kernel is cut. Registers are a thread's: the sum over all warpgroups may not exceed what the launch
// gives, 65536 a block.
struct FwdTuning {
  int consumers, block_n, stages, producer_registers, consumer_registers;
  int polynomial_every;  // one exponential out of so many is a polynomial; 0: none
  int query_buffers;
  int blocks = 1;  // that run at a time on a multiprocessor
  int teams = 1;   // of a block: so many consumers each, with a producer, buffers and work items of their own

  constexpr int block_m() const { return consumers * kWarpgroupRows; }
};

// The tuning for 16-bit inputs.
constexpr FwdTuning fwd_tuning(int head_dim) {
  switch (head_dim) {
    // The exponential unit takes twice as long as the tensor cores: more of p by polynomial.
    case 32: return {3, 128, 4, 32, 160, 8, 2};
    // A score costs as many cycles of the exponential unit as of the tensor cores here: a third warpgroup gives each
    // one's softmax two others' MMAs to hide under. Scores, p and output take 128 of its 160 registers.
    case 64: return {3, 128, 4, 32, 160, 16, 2};
    // Scores, p and output take 144 registers, too many for three warpgroups.
    case 96: return {2, 128, 3, 40, 232, 0, 2};
    // Two warpgroups: the MMAs take twice as long as the softmax, and the output takes twice the registers.
    case 128: return {2, 128, 2, 40, 232, 0, 2};
    // Shared memory bounds the tiles from here on: two of keys, two of values, and a single one of queries, in whose
    // place the next one arrives under the last MMA of the item.
    case 192: return {2, 112, 2, 40, 232, 0, 1};
    default: return {2, 80, 2, 40, 232, 0, 1};
  }
}

// The head_dims, of the kernels, that have one for lists; it would spill at 256, and each takes its time to compile.
constexpr bool has_list(int head_dim) { return head_dim == 32 || head_dim == 64 || head_dim == 128; }

// The tuning of the kernel that goes through a list of tiles, for 16-bit inputs. Lists are of many groups of a few
// hundred rows each: a tile of 192 rows would be a half empty one for most of them, and to begin and to end an item
// takes as long as its tiles. At 32 two blocks share a multiprocessor, and one works while the other begins. At 64
// these would have 104 registers to a consumer, for which ptxas waits for every MMA; two teams of one block have 112.
constexpr FwdTuning fwd_tuning_of_list(int head_dim) {
  switch (head_dim) {
    case 32: return {2, 64, 3, 40, 96, 16, 2, 2};
    case 64: return {2, 64, 4, 32, 112, 16, 2, 1, 2};
    default: return fwd_tuning(head_dim);
  }
}

// What work items of a block take, in tenths of a microsecond of an H200 (docs/kernels/forward.md, diary).
struct FwdCost {
  int key_tile, rest;
};

// What they take in the kernel that goes through a table, and in the one that goes through a list.
constexpr FwdCost fwd_cost(int head_dim) { return head_dim == 32 ? FwdCost{13, 22} : FwdCost{15, 23}; }
constexpr FwdCost fwd_cost_of_list(int head_dim) {
  return head_dim == 32 ? FwdCost{5, 15} : head_dim == 64 ? FwdCost{5, 14} : FwdCost{12, 23};
}

// The tuning for fp32 inputs.
constexpr FwdTuning fwd_tuning_fp32(int head_dim, int limbs) {
  // Scores, p, output and what a tile adds to it take 192 registers, which leaves two warpgroups; as MMAs take three
  // times as long as those of one limb, they hide the softmax all the same. At 128 the output and what a tile adds to
  // it take twice the registers: half as many keys.
  if (limbs == 2) {
    return head_dim == 64 ? FwdTuning{2, 128, 2, 40, 232, 0, 2} : FwdTuning{2, 64, 2, 40, 232, 0, 1};
  }
  // What a tile adds to the output is in the row_scale of the tile, and so in registers of its own; with tiles of 64
  // keys three warpgroups have them, which hide more of a softmax than two do with 128. At 128 scores, p, output and
  // what a tile adds to it take 200 registers.
  return head_dim == 64 ? FwdTuning{3, 64, 8, 32, 160, 0, 2} : FwdTuning{2, 96, 3, 40, 232, 0, 2};
}

// True if the numbers of a row have a row_scale: half_limbs.h.
template <typename Element>
inline constexpr bool kHasRowScales = std::is_same_v<Element, float>;

template <typename Element, int kHeadDim, int kLimbs>
inline constexpr FwdTuning kFwdTuning =
    kHasRowScales<Element> ? fwd_tuning_fp32(kHeadDim, kLimbs) : fwd_tuning(kHeadDim);

// What a forward kernel does beside the plain work.
enum class FwdForm {
  kPlain,
  kMasked,  // by a key padding mask
  kListed,  // its items stand in a list on the device
};

template <typename Element_, int kHeadDim_, int kLimbs_, FwdForm kForm>
struct FwdConfig {
  using Element = Element_;
  static constexpr bool kHasRowScales = hopper::kHasRowScales<Element>;
  using Factor = std::conditional_t<kHasRowScales, __half, Element>;  // what is multiplied
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kLimbs = kLimbs_;
  static constexpr bool kIsMasked = kForm == FwdForm::kMasked;
  static constexpr bool kIsListed = kForm == FwdForm::kListed;
  static constexpr FwdTuning kTuning = kIsListed ? fwd_tuning_of_list(kHeadDim) : kFwdTuning<Element, kHeadDim, kLimbs>;
  static constexpr int kConsumers = kTuning.consumers, kBlockM = kTuning.block_m(), kBlockN = kTuning.block_n;
  static constexpr int kStages = kTuning.stages, kQueryBuffers = kTuning.query_buffers;
  static constexpr int kProducerRegisters = kTuning.producer_registers, kConsumerRegisters = kTuning.consumer_registers;
  // A masked key's p by polynomial would not quite be zero, and masking leaves no time for polynomials anyway.
  static constexpr int kPolynomialEvery = kIsMasked ? 0 : kTuning.polynomial_every;
  static constexpr int kSlabColumns = slab_columns(kHeadDim);
  static constexpr int kSlabs = kHeadDim / kSlabColumns;
  static constexpr int kRowBytes = kSlabColumns * sizeof(Factor);
  static constexpr int kBlocks = kTuning.blocks, kTeams = kTuning.teams;
  static constexpr int kConsumersOfBlock = kTeams * kConsumers;
  static constexpr int kThreads = (1 + kConsumersOfBlock) * kWarpgroup;

  static constexpr int kSlabBytesM = kBlockM * kSlabColumns * sizeof(Factor);
  static constexpr int kSlabBytesN = kBlockN * kSlabColumns * sizeof(Factor);
  static constexpr int kLimbBytesM = kSlabs * kSlabBytesM;
  static constexpr int kLimbBytesN = kSlabs * kSlabBytesN;
  static constexpr int kTileBytesM = kLimbs * kLimbBytesM;
  static constexpr int kTileBytesN = kLimbs * kLimbBytesN;

  static_assert(sizeof(Factor) == 2 && kHeadDim % kSlabColumns == 0, "tiles are whole slabs of 16-bit factors");
  static_assert(kHasRowScales ? kForm == FwdForm::kPlain : kLimbs == 1,
                "no kernel for fp32 masks keys or has a list, and 16-bit inputs are limbs");
  static_assert(kTeams == 1 || kIsListed, "the walk of a table knows no teams");
  static_assert(kProducerRegisters + kConsumersOfBlock * kConsumerRegisters <=
                    65536 / kBlocks / kThreads / 8 * 8 * (1 + kConsumersOfBlock),
                "the warpgroups ask for more registers than the launch gives, and would wait for ever");
};

// The row_scales of a tile's keys, by which its scores are multiplied, and those of its values, as shares of the
// largest, by which its p is.
template <int kBlockN>
struct TileRowScales {
  alignas(16) float k[kBlockN], v[kBlockN];
  float largest_v;
};

template <typename Config>
struct RowScalesRing {
  TileRowScales<Config::kBlockN> tiles[Config::kStages];
  Pipe<Config::kStages> pipe;
};

struct NoRowScales {};

// Tiles are slabs of (rows, kSlabColumns) factors, one after the other, as TMA's swizzle writes them; one limb follows
// the other.
template <typename Config>
struct FwdSharedStorage {
  using Factor = typename Config::Factor;

  alignas(1024) Factor q[Config::kQueryBuffers][Config::kLimbs * Config::kBlockM * Config::kHeadDim];
  alignas(1024) Factor k[Config::kStages][Config::kLimbs * Config::kBlockN * Config::kHeadDim];
  alignas(1024) Factor v[Config::kStages][Config::kLimbs * Config::kBlockN * Config::kHeadDim];

  Pipe<Config::kQueryBuffers> q_pipe;
  Pipe<Config::kStages> k_pipe;
  Pipe<Config::kStages> v_pipe;

  alignas(16) uint32_t key_bits[Config::kStages][kKeyBitWords];  // of k's tiles; only under a mask
  float bases[2][Config::kBlockM];                               // of the rows of two items, by turns: RowBases
  uint64_t finished;                                             // all consumer warps, with all of their items
  int has_overflowed;                                            // whether an output has: overflow.cuh
  std::conditional_t<Config::kHasRowScales, RowScalesRing<Config>, NoRowScales> row_scales;
};

}  // namespace mixed_attention::cuda::hopper
