// Copies of tiles into shared memory: slab by slab, onto a barrier that expects their bytes.
#pragma once

#include <cuda.h>

#include "cuda/hopper/config.h"
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

// Copies kRows rows of a head; map: make_tile_map. Those past the tensor's end arrive as zeros, as do columns past the
// head's.
template <int kRows, int kHeadDim, typename Element>
__device__ inline void load_rows(Element* buffer, const CUtensorMap& map, ptx::Mbarrier& full, int row_begin, int head,
                                 int batch) {
  constexpr int kColumns = slab_columns(kHeadDim);
#pragma unroll
  for (int slab = 0; slab < kHeadDim / kColumns; ++slab) {
    ptx::load_tile(buffer + slab * kRows * kColumns, map, full, slab * kColumns, row_begin, head, batch);
  }
}

// Copies num_rows rows of a head and fills up with zeros to kRows; map: make_clipped_tile_map. What lies behind them
// belongs to others, and 0 * NaN would reach the results.
template <int kRows, int kHeadDim, typename Element>
__device__ inline void load_clipped_rows(Element* buffer, const CUtensorMap& map, ptx::Mbarrier& full, int row_begin,
                                         int num_rows, int head, int batch) {
  constexpr int kColumns = slab_columns(kHeadDim);
#pragma unroll
  for (int slab = 0; slab < kHeadDim / kColumns; ++slab) {
    ptx::load_tile(buffer + slab * kRows * kColumns, map, full, slab * kColumns, kRows - num_rows, row_begin + num_rows,
                   head, batch);
  }
}

// The same of all limbs of the rows (half_limbs.h), one tile behind the other; 16-bit numbers are a single limb.
// limb_step: by so many sequences the low limbs stand behind the high ones.
template <int kHeadDim, int kLimbs>
struct LimbLoads {
  template <int kRows, typename Element>
  __device__ static void load(Element* buffer, const CUtensorMap& map, ptx::Mbarrier& full, int row_begin, int head,
                              int batch, int limb_step) {
#pragma unroll
    for (int limb = 0; limb < kLimbs; ++limb) {
      load_rows<kRows, kHeadDim>(buffer + limb * kRows * kHeadDim, map, full, row_begin, head,
                                 batch + limb * limb_step);
    }
  }

  template <int kRows, typename Element>
  __device__ static void load_clipped(Element* buffer, const CUtensorMap& map, ptx::Mbarrier& full, int row_begin,
                                      int num_rows, int head, int batch, int limb_step) {
#pragma unroll
    for (int limb = 0; limb < kLimbs; ++limb) {
      load_clipped_rows<kRows, kHeadDim>(buffer + limb * kRows * kHeadDim, map, full, row_begin, num_rows, head,
                                         batch + limb * limb_step);
    }
  }
};

}  // namespace mixed_attention::cuda::hopper
