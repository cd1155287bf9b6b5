// Barriers in shared memory that count arrivals of threads and bytes of copies.
//
// A barrier's phases are numbered 0, 1, 2, ...; wait(phase & 1) returns once that phase is complete. The phase before
// the first counts as complete, so whoever waits for a buffer that starts out free begins with parity 1.
#pragma once

#include <cstdint>

#include "cuda/ptx/shared_address.cuh"

namespace mixed_attention::cuda::ptx {

using Mbarrier = uint64_t;

__device__ inline void mbarrier_init(Mbarrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}

// Shows initialised barriers to TMA; the other threads need a __syncthreads as well.
__device__ inline void mbarrier_fence_init() { asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory"); }

__device__ inline void mbarrier_arrive(Mbarrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(&barrier)) : "memory");
}

// Arrives, and makes the phase wait for that many bytes of copies too.
__device__ inline void mbarrier_arrive_expect(Mbarrier& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}

__device__ inline void mbarrier_wait(Mbarrier& barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
      "@!complete bra again;\n"
      "}\n" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

}  // namespace mixed_attention::cuda::ptx
