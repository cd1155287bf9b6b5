// ds passes through shared memory to the warpgroup that computes dq.
//
// Who signals whom: ds_full by one arrival of every warp that computes scores, ds_empty by one of every warp that
// reads.
#pragma once

#include <cstdint>

#include "cuda/hopper/bwd/config.h"
#include "cuda/hopper/bwd/own_keys.cuh"
#include "cuda/hopper/tile/ring.cuh"
#include "cuda/ptx/fence.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/stmatrix.cuh"

namespace mixed_attention::cuda::hopper {

template <typename Config>
__device__ inline void init_barriers(DqExchange<Config>& exchange) {
  init_pipe(exchange.ds_pipe, Config::kConsumers * kWarpgroup / 32, kWarpgroup / 32);
}

// Waits until a tile's ds may be written.
template <typename Config>
__device__ inline void wait_for_room(DqExchange<Config>& exchange, uint32_t count) {
  const RingUse<DqExchange<Config>::kStages> use{count};
  wait_empty(exchange.ds_pipe, use);
}

// Writes columns of a tile of transposed scores, (keys, queries), of this warp's 16 keys, which start at first_row.
// Keys that do not count (own_keys.cuh) become zeros. first_chunk: the column of the first one, in 16 bytes.
template <int kWords, bool kIsMasked>
__device__ inline void store_scores(const void* tile, const uint32_t (&words)[kWords], int first_row,
                                    const OwnKeys<kIsMasked>& own_keys, int first_chunk = 0) {
  const int lane = threadIdx.x % 32;
  const int row = first_row + lane % 16;
  const bool counts[2] = {own_keys.count(0), own_keys.count(1)};
  const auto word = [&](int i) { return counts[i % 2] ? words[i] : 0; };

  const uint32_t target = ptx::shared_address(tile) + row * kRowBytes;
#pragma unroll
  for (int step = 0; step < kWords / 4; ++step) {
    const int chunk = first_chunk + 2 * step + lane / 16;
    ptx::stmatrix_x4(target + (chunk ^ (row % 8)) * 16, word(4 * step), word(4 * step + 1), word(4 * step + 2),
                     word(4 * step + 3));
  }
}

// Writes a tile's ds of this warp's keys to the buffer of the warpgroup that computes dq, behind wait_for_room. Unless
// `arrives`, nothing is published and the buffer stays free.
template <typename Config, bool kIsMasked>
__device__ inline void hand_over(DqExchange<Config>& exchange, uint32_t count, const uint32_t (&ds)[16], int first_row,
                                 const OwnKeys<kIsMasked>& own_keys, bool arrives) {
  const RingUse<DqExchange<Config>::kStages> use{count};
  store_scores(exchange.ds[use.stage()], ds, first_row, own_keys);
  ptx::fence_async_shared();
  __syncwarp();
  if (threadIdx.x % 32 == 0 && arrives) ptx::mbarrier_arrive(exchange.ds_pipe.full[use.stage()]);
}

}  // namespace mixed_attention::cuda::hopper
