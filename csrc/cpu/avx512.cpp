// The kernels for AVX-512.
#include "cpu/simd/shared_headers.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2,prefer-vector-width=512")
#endif
#define MIXED_ATTENTION_ISA avx512
#define MIXED_ATTENTION_VECTOR_BYTES 64
#define MIXED_ATTENTION_VECTOR_REGISTERS 32
#include "cpu/simd/table.h"

namespace mixed_attention::cpu {

const InstructionSet kAvx512 = avx512::instruction_set("AVX512", [] {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
});

}  // namespace mixed_attention::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
