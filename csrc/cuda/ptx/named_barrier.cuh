// The sixteen hardware barriers of a block; 0 is __syncthreads. `threads` counts those that arrive and those that wait.
#pragma once

namespace mixed_attention::cuda::ptx {

__device__ inline void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

__device__ inline void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace mixed_attention::cuda::ptx
