// The grid of a launch.
#pragma once

namespace mixed_attention::cuda::ptx {

// gridDim.x, asked for anew wherever it is wanted. ptxas would hold it in a register through a whole walk.
__device__ inline int num_blocks_anew() {
  int count;
  asm volatile("mov.u32 %0, %%nctaid.x;\n" : "=r"(count));
  return count;
}

}  // namespace mixed_attention::cuda::ptx
