// A consumer's own keys or values, 64 rows of a tile, as an operand of MMAs with queries or output gradients: the first
// kKeptColumns columns in registers, where shared memory is not read for them again, the others where they lie.
#pragma once

#include <cstdint>

#include "cuda/hopper/config.h"
#include "cuda/hopper/tile/mma.cuh"
#include "cuda/hopper/tile/register_operand.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace mixed_attention::cuda::hopper {

template <typename Config, int kKeptColumns>
class OwnRows {
 public:
  using Element = typename Config::Element;
  using Operand = ptx::SlabOperand<Config::kRowBytes>;

  // first_row: of the consumer in the tile.
  __device__ OwnRows(const Element* tile, int first_row) : tile_(tile), shared_(operand(tile, first_row)) {}

  // Goes to another tile: that of the item, where there are several buffers.
  __device__ void move_to(const Element* tile, int first_row) {
    tile_ = tile;
    shared_ = operand(tile, first_row);
  }

  // Loads the rows, of so many columns, as soon as the tile of an item is there; first_row is that of this warp in it.
  __device__ void load(int first_row, int columns) {
    if constexpr (kKeptColumns > 0) {
      load_row_operand<Config::kRowBytes, Config::kSlabBytesN>(
          kept_, tile_, first_row, [&](int slab) { return has_slab<Config::kHeadDim>(slab, columns); });
    }
  }

  // Issues their MMAs with queries or output gradients: s, or, with kAdds, dp on top of what the result holds.
  template <bool kAdds = false>
  __device__ void issue_transposed_scores(float (&result)[Config::kBlockM / 2], Operand queries) const {
    ptx::wgmma_fence();
    if constexpr (kKeptColumns > 0) add_row_mma<Element, Config::kSlabBytesM>(result, kept_, queries, !kAdds);
    if constexpr (kKeptColumns < Config::kHeadDim) {
      add_row_mma<Element, Config::kHeadDim - kKeptColumns, Config::kSlabBytesN, Config::kSlabBytesM>(
          result, shared_, queries.advance(kKeptSlabs * Config::kSlabBytesM), !kAdds && kKeptColumns == 0);
    }
    ptx::wgmma_commit();
  }

 private:
  static constexpr int kKeptSlabs = kKeptColumns / Config::kSlabColumns;
  static_assert(kKeptColumns % Config::kSlabColumns == 0, "slabs are in registers as a whole or not at all");

  __device__ static Operand operand(const Element* tile, int first_row) {
    return Operand::make(tile).advance(kKeptSlabs * Config::kSlabBytesN + first_row * Config::kRowBytes);
  }

  const Element* tile_;
  Operand shared_;
  uint32_t kept_[kKeptColumns > 0 ? kKeptColumns / 4 : 1];
};

}  // namespace mixed_attention::cuda::hopper
