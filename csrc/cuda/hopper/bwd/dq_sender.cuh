// Adds an ordered dq from shared memory to dq_accum. A thread for each buffer does so, beside the producer, so that
// nobody else waits for a turn.
//
// Who signals whom: staging_full by one arrival of every warp that wrote accumulators, staging_empty by one of the
// sender.
#pragma once

#include <cstdint>

#include "cuda/hopper/bwd/config.h"
#include "cuda/hopper/bwd/params.h"
#include "cuda/hopper/bwd/query_walk.cuh"
#include "cuda/hopper/tile/ring.cuh"
#include "cuda/ptx/bulk_reduce.cuh"
#include "cuda/ptx/fence.cuh"
#include "cuda/ptx/global_counter.cuh"
#include "cuda/ptx/mbarrier.cuh"

namespace mixed_attention::cuda::hopper {

// Sends the query tiles that go through buffer `stage`.
template <typename Config>
__device__ inline void send_dq(const DkDvKernelParams& params, DkDvSharedStorage<Config>& shared, int stage) {
  constexpr int kBytes = Config::kDqTileFloats * sizeof(float);
  auto& exchange = shared.dq_exchange;
  const float* staging = exchange.staging[stage];

  RingUse<DqExchange<Config>::kStagings> use{0};  // query tiles, over all items
  for (KeyItems<Config> item(params.table); item.next();) {
    if (QueryShare<Config>(item.tiles()).count == 0) continue;
    const int64_t batch_head = int64_t{item.batch} * params.table.num_heads + item.head;
    QueryWalk<Config> walk(params.table, item);
    for (int i = 0; i < walk.num_tiles(); ++i, ++use.count) {
      walk.next();
      if (use.stage() != stage) continue;
      const int64_t place = batch_head * params.dq_accum.num_tiles + walk.place();
      float* const sums = params.dq_accum.of_tile(place, Config::kDqTileFloats);
      uint32_t* const turns = params.dq_accum.turns + place;
      const int turn = walk.turn();
      ptx::wait_for_count(turns, turn);
      ptx::fence_async_global();
      wait_full(exchange.staging_pipe, use);
      if (turn == 0) {
        ptx::bulk_store(sums, staging, kBytes);
      } else {
        ptx::bulk_add(sums, staging, kBytes);
      }
      ptx::bulk_commit();
      ptx::bulk_wait_read<0>();
      ptx::mbarrier_arrive(exchange.staging_pipe.empty[stage]);
      ptx::bulk_wait<0>();
      ptx::raise_count(turns);
    }
  }
}

}  // namespace mixed_attention::cuda::hopper
