// The lane of a thread.
#pragma once

namespace mixed_attention::cuda::ptx {

// Read at this place. What is computed from threadIdx in a loop is the same in all of its rounds: the compiler would
// keep it through the MMAs, and spill.
__device__ inline int lane_anew() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;\n" : "=r"(lane));
  return lane;
}

}  // namespace mixed_attention::cuda::ptx
