// Copies of tiles into shared memory: slab by slab, onto a barrier that expects their bytes.
#pragma once

#include <cuda.h>

#include "ceil_div.h"
#include "cuda/hopper/config.h"
#include "cuda/ptx/fence.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"

namespace mixed_attention::cuda::hopper {

// Prefetches the maps of a backward kernel's inputs.
template <typename Params>
__device__ inline void prefetch_input_maps(const Params& params) {
  ptx::prefetch_tensor_map(params.q);
  ptx::prefetch_tensor_map(params.dout);
  ptx::prefetch_tensor_map(params.k);
  ptx::prefetch_tensor_map(params.v);
}

// Copies kRows rows of a head; map: make_tile_map. Those past the tensor's end arrive as zeros, as do columns past its
// own in their slab; slabs without any are left out.
template <int kRows, int kHeadDim, typename Element>
__device__ inline void load_rows(Element* buffer, const CUtensorMap& map, ptx::Mbarrier& full, int row_begin, int head,
                                 int batch, int columns = kHeadDim) {
  constexpr int kColumns = slab_columns(kHeadDim);
#pragma unroll
  for (int slab = 0; slab < kHeadDim / kColumns; ++slab) {
    if (!has_slab<kHeadDim>(slab, columns)) continue;
    ptx::load_tile(buffer + slab * kRows * kColumns, map, full, slab * kColumns, row_begin, head, batch);
  }
}

// Copies num_rows rows of a head and fills up with zeros to kRows; map: make_clipped_tile_map. What lies behind them
// belongs to others, and 0 * NaN would reach the results.
template <int kRows, int kHeadDim, typename Element>
__device__ inline void load_clipped_rows(Element* buffer, const CUtensorMap& map, ptx::Mbarrier& full, int row_begin,
                                         int num_rows, int head, int batch, int columns = kHeadDim) {
  constexpr int kColumns = slab_columns(kHeadDim);
#pragma unroll
  for (int slab = 0; slab < kHeadDim / kColumns; ++slab) {
    if (!has_slab<kHeadDim>(slab, columns)) continue;
    ptx::load_tile(buffer + slab * kRows * kColumns, map, full, slab * kColumns, kRows - num_rows, row_begin + num_rows,
                   head, batch);
  }
}

// The same for a tensor of so many columns and all limbs of its rows (half_limbs.h), one tile behind the other; 16-bit
// numbers are a single limb. limb_step: by so many sequences the low limbs stand behind the high ones.
template <int kHeadDim, int kLimbs>
struct TileLoads {
  int columns;

  // What a tile brings onto its barrier.
  template <int kRows>
  __device__ int bytes() const {
    constexpr int kSlabBytes = kRows * slab_columns(kHeadDim) * 2;
    int sum = 0;
#pragma unroll
    for (int slab = 0; slab < kHeadDim / slab_columns(kHeadDim); ++slab) {
      if (has_slab<kHeadDim>(slab, columns)) sum += kLimbs * kSlabBytes;
    }
    return sum;
  }

  template <int kRows, typename Element>
  __device__ void load(Element* buffer, const CUtensorMap& map, ptx::Mbarrier& full, int row_begin, int head, int batch,
                       int limb_step) const {
#pragma unroll
    for (int limb = 0; limb < kLimbs; ++limb) {
      load_rows<kRows, kHeadDim>(buffer + limb * kRows * kHeadDim, map, full, row_begin, head, batch + limb * limb_step,
                                 columns);
    }
  }

  template <int kRows, typename Element>
  __device__ void load_clipped(Element* buffer, const CUtensorMap& map, ptx::Mbarrier& full, int row_begin,
                               int num_rows, int head, int batch, int limb_step) const {
#pragma unroll
    for (int limb = 0; limb < kLimbs; ++limb) {
      load_clipped_rows<kRows, kHeadDim>(buffer + limb * kRows * kHeadDim, map, full, row_begin, num_rows, head,
                                         batch + limb * limb_step, columns);
    }
  }
};

// Writes zeros to the slabs of all tiles that no copy of a tensor of so many columns brings. All threads of a block
// take part before it meets at a barrier, and its pipelines start behind that. tiles: an array of them in shared
// memory.
template <int kRows, int kHeadDim, typename Tiles>
__device__ inline void clear_missing_slabs(Tiles& tiles, int columns) {
  constexpr int kSlabBytes = kRows * slab_columns(kHeadDim) * 2, kTileBytes = kRows * kHeadDim * 2;
  static_assert(sizeof(Tiles) % kTileBytes == 0, "an array of whole tiles");
  if (has_slab<kHeadDim>(kHeadDim / slab_columns(kHeadDim) - 1, columns)) return;
  const int first_byte = ceil_div(columns, slab_columns(kHeadDim)) * kSlabBytes;
  auto* const bytes = reinterpret_cast<unsigned char*>(tiles);
#pragma unroll 1
  for (int tile = 0; tile < static_cast<int>(sizeof(Tiles)); tile += kTileBytes) {
#pragma unroll 1
    for (int i = first_byte + 16 * static_cast<int>(threadIdx.x); i < kTileBytes;
         i += 16 * static_cast<int>(blockDim.x)) {
      *reinterpret_cast<uint4*>(bytes + tile + i) = uint4{};
    }
  }
  ptx::fence_async_shared();
}

// The same of all inputs of a backward kernel.
template <typename Config, typename Params, typename SharedStorage>
__device__ inline void clear_missing_input_slabs(const Params& params, SharedStorage& shared) {
  constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN, kHeadDim = Config::kHeadDim;
  clear_missing_slabs<kBlockM, kHeadDim>(shared.q, params.head_dim);
  clear_missing_slabs<kBlockN, kHeadDim>(shared.k, params.head_dim);
  clear_missing_slabs<kBlockM, kHeadDim>(shared.dout, params.head_dim_v);
  clear_missing_slabs<kBlockN, kHeadDim>(shared.v, params.head_dim_v);
}

}  // namespace mixed_attention::cuda::hopper
