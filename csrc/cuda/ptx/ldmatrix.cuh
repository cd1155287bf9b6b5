// Loads of 8x8 matrices of 16-bit elements, or 8x4 of 32-bit ones, in the layout of mma's operands.
#pragma once

#include <cstdint>

namespace mixed_attention::cuda::ptx {

// Four matrices; lanes 8i to 8i+7 give the shared addresses of the rows of matrix i.
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// Four matrices, each transposed: 16-bit elements only.
__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

}  // namespace mixed_attention::cuda::ptx
