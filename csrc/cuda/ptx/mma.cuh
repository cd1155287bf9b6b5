// MMAs of one warp: c (16x8, fp32) += a (16xk) * b (kx8).
//
// With g = lane / 4 and t = lane % 4, a thread holds of c the elements (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace mixed_attention::cuda::ptx {

__device__ inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Operands are fp32 bits, of which the hardware reads the upper 19: sign, exponent and 10 bits of mantissa.
__device__ inline void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Rounds to nearest, ties away from zero, in the bits that the hardware reads; the lower ones stay as they come.
// Without cvt.rna.tf32, which sm_90 has no instruction for: there it becomes five.
__device__ inline uint32_t round_tf32(float x) {
  const float power = __uint_as_float(__float_as_uint(x) & 0xFF800000);  // of two, with the sign of x
  return __float_as_uint(fmaf(power, 0x1p-11f, x));
}

// x in two limbs: `high` rounded as above, with zeros below, and the exact rest. At least one limb of a NaN is NaN.
__device__ inline void split_tf32(float x, uint32_t& high, uint32_t& rest) {
  high = (__float_as_uint(x) + 0x1000) & 0xFFFFE000;
  rest = __float_as_uint(x - __uint_as_float(high));
}

}  // namespace mixed_attention::cuda::ptx
