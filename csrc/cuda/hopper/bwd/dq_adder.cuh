// The third warpgroup of the kernel for dk and dv computes what a key tile adds to dq.
//
// The transposed dqᵀ = kᵀ dsᵀ: kᵀ stays in registers for a whole item, dsᵀ comes from the other warpgroups as they have
// it. Where the head has no 64 columns to be rows of dqᵀ, dq = ds k with both from shared memory. The sums of a query
// tile leave in the order of the accumulators, by other threads if dq is ordered (dq_sender.cuh);
// hopper_dq_accum_kernel puts them right.
#pragma once

#include <cstdint>

#include "cuda/hopper/bwd/config.h"
#include "cuda/hopper/bwd/ds_exchange.cuh"
#include "cuda/hopper/bwd/params.h"
#include "cuda/hopper/bwd/query_walk.cuh"
#include "cuda/hopper/tile/bulk_add.cuh"
#include "cuda/hopper/tile/mma.cuh"
#include "cuda/hopper/tile/named_barriers.h"
#include "cuda/hopper/tile/register_operand.cuh"
#include "cuda/hopper/tile/ring.cuh"
#include "cuda/ptx/bulk_reduce.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace mixed_attention::cuda::hopper {

template <typename Config>
__device__ inline void add_dq(const DkDvKernelParams& params, DkDvSharedStorage<Config>& shared) {
  using Element = typename Config::Element;
  auto& exchange = shared.dq_exchange;
  using Ring = RingUse<DqExchange<Config>::kStages>;
  using Stagings = RingUse<DqExchange<Config>::kStagings>;
  constexpr bool kTransposes = transposes_dq(Config::kHeadDim);
  const int thread = threadIdx.x % kWarpgroup;
  const ptx::Operand ds_ring = ptx::Operand::make(exchange.ds);

  uint32_t num_used = 0;  // query tiles, over all items
  uint32_t kv_parity = 0;
  for (KeyItems<Config> item(params.table); item.next();) {
    if (QueryShare<Config>(item.tiles()).count == 0) continue;
    [[maybe_unused]] uint32_t keys[Config::kBlockN / 4];
    wait_full(shared.kv_pipe, kv_parity);
    kv_parity ^= 1;
    if constexpr (kTransposes) {
      load_column_operand(keys, shared.k);
      sync_and_release(shared.kv_pipe);
    }

    const int64_t first_tile = (int64_t{item.batch} * params.table.num_heads + item.head) * params.stats.num_tiles;
    QueryWalk<Config> walk(params.table, item);
    for (int i = 0; i < walk.num_tiles(); ++i, ++num_used) {
      const Ring ds{num_used};
      const ptx::Operand ds_tile = ds_ring.advance(ds.stage() * Config::kScoreBytes);
      float dq[Config::kDqTileFloats / kWarpgroup] = {};
      wait_full(exchange.ds_pipe, ds);
      if constexpr (kTransposes) {
        issue_column_mma<Element>(dq, keys, ds_tile);
      } else {
        issue_transposed_mma<Element, Config::kBlockN>(
            dq, ds_tile, ptx::SlabOperand<Config::kRowBytes>::make(shared.k, Config::kSlabBytesN));
      }
      ptx::wgmma_wait<0>(dq);
      release(exchange.ds_pipe, ds);

      const Stagings use{num_used};
      float* const staging = exchange.staging[use.stage()];
      if constexpr (Config::kIsOrdered) {
        wait_empty(exchange.staging_pipe, use);
        stage_accumulators(staging, dq);
        sync_and_arrive_as_warp(exchange.staging_pipe.full[use.stage()]);
      } else {
        add_accumulators<DqExchange<Config>::kStagings>(staging, dq, kDqStagingBarrier, [&] {
          return params.dq_accum.of_tile(first_tile + walk.next().index, Config::kDqTileFloats);
        });
      }
    }
    if constexpr (!kTransposes) release(shared.kv_pipe);
  }
  if (!Config::kIsOrdered && thread == 0) ptx::bulk_wait<0>();
}

}  // namespace mixed_attention::cuda::hopper
