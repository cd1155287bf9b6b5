// Adds a warpgroup's accumulators to global memory, where others add theirs as well.
#pragma once

#include "cuda/hopper/config.h"
#include "cuda/ptx/bulk_reduce.cuh"
#include "cuda/ptx/fence.cuh"
#include "cuda/ptx/named_barrier.cuh"

namespace mixed_attention::cuda::hopper {

// Writes this warpgroup's accumulators in an order in which they leave in 16 bytes a thread and one bulk operation.
template <int kCount>
__device__ inline void stage_accumulators(float* staging, const float (&sums)[kCount]) {
#pragma unroll
  for (int chunk = 0; chunk < kCount / 4; ++chunk) {
    reinterpret_cast<float4*>(staging)[chunk * kWarpgroup + threadIdx.x % kWarpgroup] =
        make_float4(sums[4 * chunk], sums[4 * chunk + 1], sums[4 * chunk + 2], sums[4 * chunk + 3]);
  }
  ptx::fence_async_shared();
}

// Adds them to the numbers at target(), which lie in this order. A warpgroup's kStagings buffers take turns; its first
// thread alone calls target, and has to wait for the last additions.
template <int kStagings, int kCount, typename Target>
__device__ inline void add_accumulators(float* staging, const float (&sums)[kCount], int barrier, Target target) {
  const int thread = threadIdx.x % kWarpgroup;
  if (thread == 0) ptx::bulk_wait_read<kStagings - 1>();
  ptx::named_barrier_sync(barrier, kWarpgroup);
  stage_accumulators(staging, sums);
  ptx::named_barrier_sync(barrier, kWarpgroup);
  if (thread == 0) {
    ptx::bulk_add(target(), staging, sizeof(float) * kCount * kWarpgroup);
    ptx::bulk_commit();
  }
}

}  // namespace mixed_attention::cuda::hopper
