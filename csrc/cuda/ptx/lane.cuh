// The numbers of a thread.
#pragma once

namespace mixed_attention::cuda::ptx {

// Read at this place. What is computed from threadIdx in a loop is the same in all of its rounds: the compiler would
// keep it through the MMAs, and spill.
__device__ inline int lane_anew() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;\n" : "=r"(lane));
  return lane;
}

// threadIdx.x, likewise.
__device__ inline int thread_anew() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(thread));
  return thread;
}

}  // namespace mixed_attention::cuda::ptx
