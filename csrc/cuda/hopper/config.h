// Tile sizes of the Hopper kernels and the shared memory of a block, by head_dim.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>

namespace mixed_attention::cuda::hopper {

inline constexpr int kWarpgroup = 128;     // threads
inline constexpr int kWarpgroupRows = 64;  // query rows of one warpgroup, fixed by wgmma
inline constexpr int kWarpRows = 16;       // of them, one warp's
inline constexpr int kSlabColumns = 64;    // columns of 16 bits in 128 bytes, the widest swizzle
inline constexpr int kRowBytes = 128;      // of such a slab
// One step of a product, 16 along the summed dimension.
inline constexpr int kColumnStepBytes = 32;
inline constexpr int kRowStepBytes = 16 * kRowBytes;

// Whether a forward's warpgroup without a row spares its weights: with two of them a step takes as long as the
// products.
constexpr bool spares_weights(int block_m) { return block_m > 2 * kWarpgroupRows; }

// Words for a bit for every key of a tile.
inline constexpr int kKeyBitWords = 4;

// Heads of another width are served by the next of these, with columns of zeros that are never stored.
inline constexpr int kFwdHeadDims[] = {32, 64, 96, 128, 192, 256};
inline constexpr int kMaxFwdHeadDim = 256;

// Calls visit.operator()<kHeadDim>() with the first of kHeadDims that is not less than head_dim.
template <const auto& kHeadDims, size_t kIndex = 0, typename Visit>
auto with_head_dim_of(int64_t head_dim, const Visit& visit) {
  constexpr int kHeadDim = kHeadDims[kIndex];
  if constexpr (kIndex + 1 < std::size(kHeadDims)) {
    if (head_dim > kHeadDim) return with_head_dim_of<kHeadDims, kIndex + 1>(head_dim, visit);
  }
  return visit.template operator()<kHeadDim>();
}

template <typename Visit>
auto with_fwd_head_dim(int64_t head_dim, const Visit& visit) {
  return with_head_dim_of<kFwdHeadDims>(head_dim, visit);
}

// Columns of the slabs that a tile is stored in: as wide as a swizzle allows, but none of them half empty, which the
// products would take for work.
constexpr int slab_columns(int head_dim) { return head_dim % kSlabColumns == 0 ? kSlabColumns : kSlabColumns / 2; }

// Registers a thread: the sum over all warpgroups may not exceed what the launch gives, 65536 a block.
template <int kHeadDim>
struct FwdTuning;

// The exponential unit takes twice as long as the tensor cores: more weights by polynomial.
template <>
struct FwdTuning<32> {
  static constexpr int kConsumers = 3, kBlockN = 128, kStages = 4, kProducerRegisters = 32, kConsumerRegisters = 160;
  static constexpr int kPolynomialEvery = 8, kQueryBuffers = 2;
};

// A score costs as many cycles of the exponential unit as of the tensor cores here: a third warpgroup gives each one's
// softmax two others' products to hide under. Scores, weights and output take 128 of its 160 registers.
template <>
struct FwdTuning<64> {
  static constexpr int kConsumers = 3, kBlockN = 128, kStages = 4, kProducerRegisters = 32, kConsumerRegisters = 160;
  static constexpr int kPolynomialEvery = 16, kQueryBuffers = 2;
};

// Scores, weights and output take 144 registers, too many for three warpgroups.
template <>
struct FwdTuning<96> {
  static constexpr int kConsumers = 2, kBlockN = 128, kStages = 3, kProducerRegisters = 40, kConsumerRegisters = 232;
  static constexpr int kPolynomialEvery = 0, kQueryBuffers = 2;
};

// Two warpgroups: the product is twice as long as the softmax, and the output takes twice the registers.
template <>
struct FwdTuning<128> {
  static constexpr int kConsumers = 2, kBlockN = 128, kStages = 2, kProducerRegisters = 40, kConsumerRegisters = 232;
  static constexpr int kPolynomialEvery = 0, kQueryBuffers = 2;
};

// Shared memory bounds the tiles from here on: two of keys, two of values, and a single one of queries, in whose place
// the next one arrives under the last product of the item.
template <>
struct FwdTuning<192> {
  static constexpr int kConsumers = 2, kBlockN = 112, kStages = 2, kProducerRegisters = 40, kConsumerRegisters = 232;
  static constexpr int kPolynomialEvery = 0, kQueryBuffers = 1;
};

template <>
struct FwdTuning<256> {
  static constexpr int kConsumers = 2, kBlockN = 80, kStages = 2, kProducerRegisters = 40, kConsumerRegisters = 232;
  static constexpr int kPolynomialEvery = 0, kQueryBuffers = 1;
};

// kIsMasked: by a key padding mask.
template <typename Element_, int kHeadDim_, bool kIsMasked_>
struct FwdConfig : FwdTuning<kHeadDim_> {
  using Element = Element_;
  using Tuning = FwdTuning<kHeadDim_>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kIsMasked = kIsMasked_;
  // A masked key's weight by polynomial would not quite be zero, and masking leaves no time for polynomials anyway.
  static constexpr int kPolynomialEvery = kIsMasked ? 0 : Tuning::kPolynomialEvery;
  static constexpr int kSlabColumns = slab_columns(kHeadDim);
  static constexpr int kSlabs = kHeadDim / kSlabColumns;
  static constexpr int kRowBytes = kSlabColumns * sizeof(Element);
  static constexpr int kBlockM = Tuning::kConsumers * kWarpgroupRows;
  static constexpr int kThreads = (1 + Tuning::kConsumers) * kWarpgroup;

  static constexpr int kSlabBytesM = kBlockM * kSlabColumns * sizeof(Element);
  static constexpr int kSlabBytesN = Tuning::kBlockN * kSlabColumns * sizeof(Element);
  static constexpr int kTileBytesM = kSlabs * kSlabBytesM;
  static constexpr int kTileBytesN = kSlabs * kSlabBytesN;

  static_assert(sizeof(Element) == 2 && kHeadDim % kSlabColumns == 0);
  static_assert(Tuning::kProducerRegisters + Tuning::kConsumers * Tuning::kConsumerRegisters <=
                65536 / kThreads / 8 * 8 * (1 + Tuning::kConsumers));
};

// Tiles are slabs of (rows, kSlabColumns) elements, one after the other, as the copy engine's swizzle writes them.
template <typename Config>
struct FwdSharedStorage {
  using Element = typename Config::Element;

  alignas(1024) Element q[Config::kQueryBuffers][Config::kBlockM * Config::kHeadDim];
  alignas(1024) Element k[Config::kStages][Config::kBlockN * Config::kHeadDim];
  alignas(1024) Element v[Config::kStages][Config::kBlockN * Config::kHeadDim];

  uint64_t q_full[Config::kQueryBuffers], q_empty[Config::kQueryBuffers];
  uint64_t k_full[Config::kStages], k_empty[Config::kStages];
  uint64_t v_full[Config::kStages], v_empty[Config::kStages];

  alignas(16) uint32_t key_bits[Config::kStages][kKeyBitWords];  // of k's tiles; only under a mask
};

}  // namespace mixed_attention::cuda::hopper
