// The sixteen hardware barriers of a block; 0 is __syncthreads. `threads` counts those that arrive and those that wait.
#pragma once

namespace mixed_attention::cuda::ptx {

__device__ inline void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

__device__ inline void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// Waits like sync; whether the predicate holds in any of the threads.
__device__ inline bool named_barrier_any(int id, int threads, bool predicate) {
  int any;
  asm volatile(
      "{\n"
      ".reg .pred p, q;\n"
      "setp.ne.b32 p, %3, 0;\n"
      "bar.red.or.pred q, %1, %2, p;\n"
      "selp.b32 %0, 1, 0, q;\n"
      "}\n"
      : "=r"(any)
      : "r"(id), "r"(threads), "r"(static_cast<int>(predicate))
      : "memory");
  return __any_sync(0xffffffff, any != 0);  // the same in all lanes; tells the compiler, too
}

}  // namespace mixed_attention::cuda::ptx
