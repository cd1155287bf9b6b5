// The kernels for AMX: AVX-512, and products of bfloat16 pairs in tile registers.
#include "cpu/simd/shared_headers.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__clang__)
#pragma clang attribute push(                                                                                      \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c,bmi2"))), \
    apply_to = function)
#else
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c,bmi2,prefer-vector-width=512")
#endif
#define MIXED_ATTENTION_ISA amx
#define MIXED_ATTENTION_VECTOR_BYTES 64
#define MIXED_ATTENTION_VECTOR_REGISTERS 32
#define MIXED_ATTENTION_BFLOAT16_PAIRS 1
#define MIXED_ATTENTION_TILES 1
#include "cpu/simd/table.h"

namespace mixed_attention::cpu {

const InstructionSet kAmx = amx::instruction_set("AMX", [] {
  // The registers are large: Linux gives them to processes that ask, once, for all of their threads.
  constexpr long kAsk = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return kAvx512Bf16.is_available() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
});

}  // namespace mixed_attention::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
