// Tells the rare work items, which want the loop that relates scores: a query of their batch_head has a reference
// (row_reference.h), or a key of theirs has an entry that is infinite or NaN. What fills up a tile of queries is zero,
// and zero times infinity would be NaN in the sums of such a key, which the queries that there are may give a p of
// zero.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/hopper/bwd/config.h"
#include "cuda/hopper/bwd/params.h"
#include "cuda/hopper/tile/named_barriers.h"
#include "cuda/ptx/named_barrier.cuh"

namespace mixed_attention::cuda::hopper {

// True if a query of a tile, of those of all batch_heads, has a reference.
__device__ inline bool is_rare_tile(const QueryStats& stats, int64_t tile) {
  return stats.lse_log2[tile * kStatsTileFloats + kMarkPlace] == kHasReferences;
}

// True if this thread sees a query with a reference; each of a warpgroup's threads looks at some tiles of a batch_head.
__device__ inline bool sees_reference(const QueryStats& stats, int64_t batch_head) {
  const float* const first = stats.lse_log2 + batch_head * stats.num_tiles * kStatsTileFloats;
  bool has_one = false;
#pragma unroll 4
  for (int tile = threadIdx.x % kWarpgroup; tile < stats.num_tiles; tile += kWarpgroup) {
    has_one |= first[tile * kStatsTileFloats + kMarkPlace] == kHasReferences;
  }
  return has_one;
}

// True if this lane sees an entry that is not finite; each lane looks at some entries of a warp's rows of a slab of
// keys.
template <typename Element, int kRowBytes>
__device__ inline bool sees_infinity(const void* rows) {
  constexpr uint32_t kInfinity = std::is_same_v<Element, __nv_bfloat16> ? 0x7F80 : 0x7C00;
  uint32_t largest = 0;  // of both halves of the words
#pragma unroll
  for (int bytes = 0; bytes < kWarpRows * kRowBytes; bytes += 32 * sizeof(uint4)) {
    const uint4 words =
        *reinterpret_cast<const uint4*>(static_cast<const char*>(rows) + bytes + threadIdx.x % 32 * sizeof(uint4));
    for (const uint32_t word : {words.x, words.y, words.z, words.w}) largest = __vmaxu2(largest, word & 0x7FFF7FFF);
  }
  return largest >> 16 >= kInfinity || (largest & 0xFFFF) >= kInfinity;
}

// True if any thread of a consumer has seen one.
__device__ inline bool is_rare_item(int consumer, bool sees_one) {
  return ptx::named_barrier_any(kRareItemBarrier + consumer, kWarpgroup, sees_one);
}

}  // namespace mixed_attention::cuda::hopper
