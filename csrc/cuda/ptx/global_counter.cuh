// Counters in global memory by which blocks follow one another.
#pragma once

#include <cstdint>

namespace mixed_attention::cuda::ptx {

// Waits until the counter has this value; what others did before they raised it is seen from here on.
__device__ inline void wait_for_count(const uint32_t* counter, uint32_t value) {
  uint32_t count;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(count) : "l"(counter) : "memory");
  } while (count != value);
}

// Raises the counter by one, behind all that this thread has done or knows of.
__device__ inline void raise_count(uint32_t* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;\n" ::"l"(counter) : "memory");
}

}  // namespace mixed_attention::cuda::ptx
