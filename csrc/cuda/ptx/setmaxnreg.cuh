// Moves registers between the warpgroups of a block. All warps of a warpgroup take part; the sum over the block must
// not exceed what the launch gave, or the increase waits for ever.
#pragma once

namespace mixed_attention::cuda::ptx {

template <int kRegisters>
__device__ inline void release_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "setmaxnreg takes no other numbers");
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ inline void acquire_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "setmaxnreg takes no other numbers");
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

}  // namespace mixed_attention::cuda::ptx
