// One thread of a warp.
#pragma once

#include <cstdint>

namespace mixed_attention::cuda::ptx {

// True in one lane of a full warp; unlike a comparison of lane numbers it tells the compiler that there is only one.
__device__ inline bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
}

}  // namespace mixed_attention::cuda::ptx
