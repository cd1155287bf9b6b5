// Rings of buffers in shared memory, through which a producer hands tiles to consumers.
#pragma once

#include <cstdint>

#include "cuda/hopper/tile/pipe.h"
#include "cuda/ptx/mbarrier.cuh"

namespace mixed_attention::cuda::hopper {

// A use of a ring of buffers, counted from the start of the block: the buffer that it goes through, and the phases of
// the buffer's barriers that it waits for.
template <int kStages>
struct RingUse {
  uint32_t count;

  __device__ int stage() const { return count % kStages; }
  __device__ uint32_t full_parity() const { return count / kStages % 2; }
  __device__ uint32_t empty_parity() const { return full_parity() ^ 1; }
};

// Arrives for a warp whose lanes are in step, as they are behind a wait for MMAs.
__device__ inline void arrive_as_warp(ptx::Mbarrier& barrier) {
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barrier);
}

// Arrives for a warp, all of whose lanes are done.
__device__ inline void sync_and_arrive_as_warp(ptx::Mbarrier& barrier) {
  __syncwarp();
  arrive_as_warp(barrier);
}

// num_producers: who arrives at full, beside the bytes of copies; num_consumers: who arrives at empty.
template <int kStages>
__device__ inline void init_pipe(Pipe<kStages>& pipe, int num_producers, int num_consumers) {
  for (int stage = 0; stage < kStages; ++stage) {
    ptx::mbarrier_init(pipe.full[stage], num_producers);
    ptx::mbarrier_init(pipe.empty[stage], num_consumers);
  }
}

template <int kStages>
__device__ inline void wait_full(Pipe<kStages>& pipe, RingUse<kStages> use) {
  ptx::mbarrier_wait(pipe.full[use.stage()], use.full_parity());
}

template <int kStages>
__device__ inline void wait_empty(Pipe<kStages>& pipe, RingUse<kStages> use) {
  ptx::mbarrier_wait(pipe.empty[use.stage()], use.empty_parity());
}

// Waits for the buffer and returns the barrier onto which the producer is to copy so many bytes.
template <int kStages>
__device__ inline ptx::Mbarrier& begin_copy(Pipe<kStages>& pipe, RingUse<kStages> use, int bytes) {
  wait_empty(pipe, use);
  ptx::mbarrier_arrive_expect(pipe.full[use.stage()], bytes);
  return pipe.full[use.stage()];
}

// Gives the buffer back for a warp whose lanes are in step.
template <int kStages>
__device__ inline void release(Pipe<kStages>& pipe, RingUse<kStages> use) {
  arrive_as_warp(pipe.empty[use.stage()]);
}

// Gives the buffer back for a warp, all of whose lanes are done.
template <int kStages>
__device__ inline void sync_and_release(Pipe<kStages>& pipe, RingUse<kStages> use) {
  sync_and_arrive_as_warp(pipe.empty[use.stage()]);
}

// The same for a single buffer. Either side keeps the parity that it waits for next: consumers begin with 0, producers
// with 1, and turn it about behind the wait.
__device__ inline void init_pipe(SingleBufferPipe& pipe, int num_producers, int num_consumers) {
  ptx::mbarrier_init(pipe.full, num_producers);
  ptx::mbarrier_init(pipe.empty, num_consumers);
}

__device__ inline void wait_full(SingleBufferPipe& pipe, uint32_t parity) { ptx::mbarrier_wait(pipe.full, parity); }

__device__ inline ptx::Mbarrier& begin_copy(SingleBufferPipe& pipe, uint32_t parity, int bytes) {
  ptx::mbarrier_wait(pipe.empty, parity);
  ptx::mbarrier_arrive_expect(pipe.full, bytes);
  return pipe.full;
}

__device__ inline void release(SingleBufferPipe& pipe) { arrive_as_warp(pipe.empty); }
__device__ inline void sync_and_release(SingleBufferPipe& pipe) { sync_and_arrive_as_warp(pipe.empty); }

}  // namespace mixed_attention::cuda::hopper
