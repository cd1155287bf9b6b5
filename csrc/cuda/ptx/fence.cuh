// Order between the proxies through which memory is reached.
#pragma once

namespace mixed_attention::cuda::ptx {

// Shows this thread's accesses to shared memory to later asynchronous ones: MMAs and bulk copies.
__device__ inline void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// Puts later asynchronous accesses to global memory behind what this thread has done or knows of.
__device__ inline void fence_async_global() { asm volatile("fence.proxy.async.global;\n" ::: "memory"); }

}  // namespace mixed_attention::cuda::ptx
