// dk and dv of a key tile whose queries are split over the two blocks of a cluster: each sends one of its two sums to
// the other, through shared memory and warp by warp, and ends with the whole of the other one.
//
// Who signals whom: peer_full and peer_empty by one arrival of every consumer warp of the other block. Items that
// nobody reads exchange nothing; they come last, so that no sums arrive where their zeros leave.
#pragma once

#include <cstdint>

#include "cuda/hopper/bwd/config.h"
#include "cuda/hopper/bwd/query_walk.cuh"
#include "cuda/ptx/cluster.cuh"

namespace mixed_attention::cuda::hopper {

// Sends one sum to where the peer's warp has its `sums`, and adds the peer's part to the other; release_sums is to
// follow. count: exchanges of this block so far.
template <typename Config, int kCount>
__device__ inline void exchange_sums(DkDvSharedStorage<Config>& shared, uint32_t count, float* sums,
                                     const float (&sent)[kCount], float (&kept)[kCount]) {
  const int lane = threadIdx.x % 32;
  const int peer = 1 - QueryShare<Config>::block_rank();
  constexpr int kStride = 32 * sizeof(float4);

  ptx::mbarrier_wait_cluster(shared.peer_empty, count % 2 ^ 1);
  const uint32_t target = ptx::address_in_block(sums, peer) + lane * sizeof(float4);
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    ptx::store_in_block(target + i / 4 * kStride, make_float4(sent[i], sent[i + 1], sent[i + 2], sent[i + 3]));
  }
  __syncwarp();
  if (lane == 0) ptx::mbarrier_arrive_in_block(ptx::address_in_block(&shared.peer_full, peer));

  ptx::mbarrier_wait_cluster(shared.peer_full, count % 2);
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const float4 part = reinterpret_cast<const float4*>(sums)[i / 4 * 32 + lane];
    kept[i] += part.x;
    kept[i + 1] += part.y;
    kept[i + 2] += part.z;
    kept[i + 3] += part.w;
  }
}

template <typename Config>
__device__ inline void release_sums(DkDvSharedStorage<Config>& shared) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    ptx::mbarrier_arrive_in_block(ptx::address_in_block(&shared.peer_empty, 1 - QueryShare<Config>::block_rank()));
  }
}

}  // namespace mixed_attention::cuda::hopper
