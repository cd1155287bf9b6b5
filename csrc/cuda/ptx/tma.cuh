// Copies from global to shared memory by TMA. One thread issues; the bytes count on the barrier. Elements of a tile
// that lie outside the tensor arrive as zeros and count as well.
#pragma once

#include <cuda.h>

#include "cuda/ptx/mbarrier.cuh"

namespace mixed_attention::cuda::ptx {

__device__ inline void prefetch_tensor_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(&map) : "memory");
}

__device__ inline void load_tile(void* shared, const CUtensorMap& map, Mbarrier& barrier, int c0, int c1, int c2,
                                 int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];\n" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

__device__ inline void load_tile(void* shared, const CUtensorMap& map, Mbarrier& barrier, int c0, int c1, int c2,
                                 int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, "
      "%7}], [%2];\n" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// Copies bytes in a row; both addresses and their number are multiples of 16.
__device__ inline void load_bytes(void* shared, const void* global, Mbarrier& barrier, int bytes) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(&barrier))
               : "memory");
}

}  // namespace mixed_attention::cuda::ptx
