// MMAs of a warpgroup: d (64 x N, fp32) += a (64 x 16) * b (16 x N), asynchronous.
//
// A thread of warp w and lane l holds in d[i] the element of row 16 w + l / 4 + 8 (i / 2 % 2) and column
// 8 (i / 4) + 2 (l % 4) + i % 2. As operand a from registers, the words of step k are the pairs d[8k..8k+7] in order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/ptx/shared_address.cuh"

namespace mixed_attention::cuda::ptx {

// Opens a batch: orders earlier accesses to the registers that its MMAs read or accumulate in.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }

__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

// Keeps the compiler from moving accesses to these registers across this point.
template <int kCount>
__device__ inline void pin(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// Waits until at most kPending batches are in flight; `results` are accumulators of the finished ones.
template <int kPending, int... kCounts>
__device__ inline void wgmma_wait(float (&... results)[kCounts]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
  (pin(results), ...);
}

// Operand in shared memory: rows of 128 or 64 bytes, side by side as slabs of so many columns, with TMA's swizzle of
// that width, aligned to 1024 bytes. Only the low word, the address in units of 16 bytes, differs between operands.
template <int kRowBytes>
struct SlabOperand {
  static_assert(kRowBytes == 128 || kRowBytes == 64, "wgmma reads slabs as the wide swizzles of TMA leave them");

  uint32_t low;

  // slab_bytes: distance of the slabs; only transposed operands need it, the others step from slab to slab themselves.
  __device__ static SlabOperand make(const void* tile, int slab_bytes = 16) {
    return {(shared_address(tile) >> 4) | (static_cast<uint32_t>(slab_bytes >> 4) << 16)};
  }
  __device__ SlabOperand advance(int bytes) const { return {low + (bytes >> 4)}; }

  __device__ uint64_t descriptor() const {
    constexpr uint64_t kSwizzle = uint64_t{kRowBytes == 128 ? 1 : 2} << 62;
    constexpr uint64_t kEightRows = uint64_t{8 * kRowBytes >> 4} << 32;
    return kSwizzle | kEightRows | low;
  }
};

using Operand = SlabOperand<128>;

// One step of 16 along the summed dimension.
//   ss: a and b from shared memory, both with the summed dimension along their rows, or, where the instruction
//     transposes them, down their columns; a is then one slab wide.
//   rs: a from registers; b's summed dimension runs down its columns, or along its rows.
// Those in shared memory are given by their descriptors; accumulate 0 overwrites d.
template <typename Element, int kN>
struct Wgmma;

// The instruction names every register it accumulates in, so that its text depends on N.
#define WGMMA_REGISTERS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_REGISTERS_24 WGMMA_REGISTERS_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define WGMMA_REGISTERS_32 WGMMA_REGISTERS_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_REGISTERS_40 WGMMA_REGISTERS_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define WGMMA_REGISTERS_48 WGMMA_REGISTERS_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_REGISTERS_56 WGMMA_REGISTERS_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define WGMMA_REGISTERS_64 WGMMA_REGISTERS_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_REGISTERS_72 WGMMA_REGISTERS_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define WGMMA_REGISTERS_80 WGMMA_REGISTERS_72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define WGMMA_REGISTERS_88 WGMMA_REGISTERS_80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define WGMMA_REGISTERS_96 WGMMA_REGISTERS_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_REGISTERS_128                                                                                    \
  WGMMA_REGISTERS_96                                                                                           \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, " \
  "%114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define WGMMA_8(d, i)                                                                                         \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define WGMMA_ACCUMULATORS_16(d) WGMMA_8(d, 0), WGMMA_8(d, 8)
#define WGMMA_ACCUMULATORS_24(d) WGMMA_ACCUMULATORS_16(d), WGMMA_8(d, 16)
#define WGMMA_ACCUMULATORS_32(d) WGMMA_ACCUMULATORS_24(d), WGMMA_8(d, 24)
#define WGMMA_ACCUMULATORS_40(d) WGMMA_ACCUMULATORS_32(d), WGMMA_8(d, 32)
#define WGMMA_ACCUMULATORS_48(d) WGMMA_ACCUMULATORS_40(d), WGMMA_8(d, 40)
#define WGMMA_ACCUMULATORS_56(d) WGMMA_ACCUMULATORS_48(d), WGMMA_8(d, 48)
#define WGMMA_ACCUMULATORS_64(d) WGMMA_ACCUMULATORS_56(d), WGMMA_8(d, 56)
#define WGMMA_ACCUMULATORS_72(d) WGMMA_ACCUMULATORS_64(d), WGMMA_8(d, 64)
#define WGMMA_ACCUMULATORS_80(d) WGMMA_ACCUMULATORS_72(d), WGMMA_8(d, 72)
#define WGMMA_ACCUMULATORS_88(d) WGMMA_ACCUMULATORS_80(d), WGMMA_8(d, 80)
#define WGMMA_ACCUMULATORS_96(d) WGMMA_ACCUMULATORS_88(d), WGMMA_8(d, 88)
#define WGMMA_ACCUMULATORS_128(d) \
  WGMMA_ACCUMULATORS_96(d), WGMMA_8(d, 96), WGMMA_8(d, 104), WGMMA_8(d, 112), WGMMA_8(d, 120)

// p0 to p5: the numbers of the operands after the accumulators.
#define WGMMA_DEFINE(N, Element, type, count, p0, p1, p2, p3, p4, p5, p6)                                        \
  template <>                                                                                                    \
  struct Wgmma<Element, N> {                                                                                     \
    template <bool kTransposes = false>                                                                          \
    __device__ static void ss(float (&d)[count], uint64_t a, uint64_t b, int accumulate) {                       \
      asm volatile(                                                                                              \
          "{\n"                                                                                                  \
          ".reg .pred p;\n"                                                                                      \
          "setp.ne.b32 p, %" p2                                                                                  \
          ", 0;\n"                                                                                               \
          "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" WGMMA_REGISTERS_##count           \
          "}, %" p0 ", %" p1 ", p, 1, 1, %" p3 ", %" p3                                                          \
          ";\n"                                                                                                  \
          "}\n"                                                                                                  \
          : WGMMA_ACCUMULATORS_##count(d)                                                                        \
          : "l"(a), "l"(b), "r"(accumulate), "n"(int{kTransposes}));                                             \
    }                                                                                                            \
    template <bool kAlongRows = false>                                                                           \
    __device__ static void rs(float (&d)[count], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b, \
                              int accumulate) {                                                                  \
      asm volatile(                                                                                              \
          "{\n"                                                                                                  \
          ".reg .pred p;\n"                                                                                      \
          "setp.ne.b32 p, %" p5                                                                                  \
          ", 0;\n"                                                                                               \
          "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" WGMMA_REGISTERS_##count           \
          "}, {%" p0 ", %" p1 ", %" p2 ", %" p3 "}, %" p4 ", p, 1, 1, %" p6                                      \
          ";\n"                                                                                                  \
          "}\n"                                                                                                  \
          : WGMMA_ACCUMULATORS_##count(d)                                                                        \
          : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(accumulate), "n"(int{!kAlongRows}));                 \
    }                                                                                                            \
  };

WGMMA_DEFINE(32, __nv_bfloat16, "bf16", 16, "16", "17", "18", "19", "20", "21", "22")
WGMMA_DEFINE(32, __half, "f16", 16, "16", "17", "18", "19", "20", "21", "22")
WGMMA_DEFINE(48, __nv_bfloat16, "bf16", 24, "24", "25", "26", "27", "28", "29", "30")
WGMMA_DEFINE(48, __half, "f16", 24, "24", "25", "26", "27", "28", "29", "30")
WGMMA_DEFINE(64, __nv_bfloat16, "bf16", 32, "32", "33", "34", "35", "36", "37", "38")
WGMMA_DEFINE(64, __half, "f16", 32, "32", "33", "34", "35", "36", "37", "38")
WGMMA_DEFINE(80, __nv_bfloat16, "bf16", 40, "40", "41", "42", "43", "44", "45", "46")
WGMMA_DEFINE(80, __half, "f16", 40, "40", "41", "42", "43", "44", "45", "46")
WGMMA_DEFINE(96, __nv_bfloat16, "bf16", 48, "48", "49", "50", "51", "52", "53", "54")
WGMMA_DEFINE(96, __half, "f16", 48, "48", "49", "50", "51", "52", "53", "54")
WGMMA_DEFINE(112, __nv_bfloat16, "bf16", 56, "56", "57", "58", "59", "60", "61", "62")
WGMMA_DEFINE(112, __half, "f16", 56, "56", "57", "58", "59", "60", "61", "62")
WGMMA_DEFINE(128, __nv_bfloat16, "bf16", 64, "64", "65", "66", "67", "68", "69", "70")
WGMMA_DEFINE(128, __half, "f16", 64, "64", "65", "66", "67", "68", "69", "70")
WGMMA_DEFINE(192, __nv_bfloat16, "bf16", 96, "96", "97", "98", "99", "100", "101", "102")
WGMMA_DEFINE(192, __half, "f16", 96, "96", "97", "98", "99", "100", "101", "102")
WGMMA_DEFINE(256, __nv_bfloat16, "bf16", 128, "128", "129", "130", "131", "132", "133", "134")
WGMMA_DEFINE(256, __half, "f16", 128, "128", "129", "130", "131", "132", "133", "134")

#undef WGMMA_DEFINE

// The same for b of two tiles of N rows, one behind the other in shared memory, whose results are two arrays.
template <typename Element, int kN>
struct WgmmaPair;

#define WGMMA_DEFINE_PAIR_OF_64(Element, type)                                                          \
  template <>                                                                                           \
  struct WgmmaPair<Element, 64> {                                                                       \
    __device__ static void ss(float (&d)[32], float (&e)[32], uint64_t a, uint64_t b, int accumulate) { \
      asm volatile(                                                                                     \
          "{\n"                                                                                         \
          ".reg .pred p;\n"                                                                             \
          "setp.ne.b32 p, %66, 0;\n"                                                                    \
          "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" WGMMA_REGISTERS_64          \
          "}, %64, %65, p, 1, 1, 0, 0;\n"                                                               \
          "}\n"                                                                                         \
          : WGMMA_ACCUMULATORS_32(d), WGMMA_ACCUMULATORS_32(e)                                          \
          : "l"(a), "l"(b), "r"(accumulate));                                                           \
    }                                                                                                   \
  };

WGMMA_DEFINE_PAIR_OF_64(__nv_bfloat16, "bf16")
WGMMA_DEFINE_PAIR_OF_64(__half, "f16")

#undef WGMMA_DEFINE_PAIR_OF_64
#undef WGMMA_ACCUMULATORS_128
#undef WGMMA_ACCUMULATORS_96
#undef WGMMA_ACCUMULATORS_88
#undef WGMMA_ACCUMULATORS_80
#undef WGMMA_ACCUMULATORS_72
#undef WGMMA_ACCUMULATORS_64
#undef WGMMA_ACCUMULATORS_56
#undef WGMMA_ACCUMULATORS_48
#undef WGMMA_ACCUMULATORS_40
#undef WGMMA_ACCUMULATORS_32
#undef WGMMA_ACCUMULATORS_24
#undef WGMMA_ACCUMULATORS_16
#undef WGMMA_8
#undef WGMMA_REGISTERS_128
#undef WGMMA_REGISTERS_96
#undef WGMMA_REGISTERS_88
#undef WGMMA_REGISTERS_80
#undef WGMMA_REGISTERS_72
#undef WGMMA_REGISTERS_64
#undef WGMMA_REGISTERS_56
#undef WGMMA_REGISTERS_48
#undef WGMMA_REGISTERS_40
#undef WGMMA_REGISTERS_32
#undef WGMMA_REGISTERS_24
#undef WGMMA_REGISTERS_16

}  // namespace mixed_attention::cuda::ptx
