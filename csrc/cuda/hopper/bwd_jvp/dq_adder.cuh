// dq of double backward where keys own: the consumers hand over ds, and g where keys move, and a third warpgroup adds
// dqᵀ = kᵀ dsᵀ + k'ᵀ gᵀ to sums in global memory, as that of the backward does (bwd/dq_adder.cuh). Its kᵀ stays in
// registers for a whole item, or in shared memory where these go to the consumers.
//
// Who signals whom: full by one arrival of every consumer warp, empty by one of every warp that reads.
#pragma once

#include <cstdint>

#include "cuda/hopper/bwd/ds_exchange.cuh"
#include "cuda/hopper/bwd/own_keys.cuh"
#include "cuda/hopper/bwd/query_tiles.cuh"
#include "cuda/hopper/bwd_jvp/config.h"
#include "cuda/hopper/bwd_jvp/items.cuh"
#include "cuda/hopper/bwd_jvp/mma.cuh"
#include "cuda/hopper/bwd_jvp/params.h"
#include "cuda/hopper/tile/bulk_add.cuh"
#include "cuda/hopper/tile/mma.cuh"
#include "cuda/hopper/tile/named_barriers.h"
#include "cuda/hopper/tile/register_operand.cuh"
#include "cuda/hopper/tile/ring.cuh"
#include "cuda/ptx/bulk_reduce.cuh"
#include "cuda/ptx/fence.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace mixed_attention::cuda::hopper {

template <typename Config>
using ExchangeUse = RingUse<BwdJvpDqExchange<Config>::kStages>;

// Waits until factors of the step's tile may be written.
template <typename Config>
__device__ inline void wait_for_room(BwdJvpDqExchange<Config>& exchange, Step<Config> step) {
  wait_empty(exchange.pipe, ExchangeUse<Config>{step.tile()});
}

// Writes a step's factors of this warp's 16 keys, which start at first_row. With the last step of a tile they are
// published.
template <typename Config>
__device__ inline void hand_over(BwdJvpDqExchange<Config>& exchange, Step<Config> step, const SideMma<Config>& mma,
                                 int first_row, const OwnKeys<false>& own_keys) {
  const ExchangeUse<Config> use{step.tile()};
  auto& factors = exchange.factors[use.stage()];
  store_scores(factors[0], mma.ds, first_row, own_keys, step.first_row() / 8);
  if constexpr (Config::kMovesKeys) store_scores(factors[1], mma.g, first_row, own_keys, step.first_row() / 8);
  ptx::fence_async_shared();
  __syncwarp();
  if (step.is_last_of_tile()) arrive_as_warp(exchange.pipe.full[use.stage()]);
}

template <typename Config>
__device__ inline void add_dq(const BwdJvpKernelParams<Config>& params, BwdJvpSharedStorage<Config>& shared) {
  using Element = typename Config::Element;
  using Exchange = BwdJvpDqExchange<Config>;
  Exchange& exchange = shared.dq_exchange;
  const ptx::Operand factors = ptx::Operand::make(exchange.factors);
  constexpr int kFactorBytes = Config::kBlockM * kRowBytes;

  uint32_t num_used = 0;  // query tiles, over all items
  uint32_t owned_parity = 0;
  for (SideItems<Config> items(params.table); items.next_with_keys();) {
    [[maybe_unused]] uint32_t keys[Config::kBlockM / 4];
    wait_full(shared.owned_pipe, owned_parity);
    owned_parity ^= 1;
    if constexpr (Config::kKeepsKeysOfDq) load_column_operand(keys, shared.owned[0]);

    const ItemRows rows = items.rows();
    const int64_t first_tile = (int64_t{rows.batch} * params.table.num_heads + rows.head) * params.dq_accum.num_tiles;
    auto tiles = tiles_of<Config>(items);
    for (int num_left = items.tiles().num_tiles; num_left > 0; --num_left, ++num_used) {
      const ExchangeUse<Config> use{num_used};
      const ptx::Operand ds = factors.advance(use.stage() * Exchange::kFactors * kFactorBytes);
      float dq[Exchange::kDqTileFloats / kWarpgroup] = {};
      wait_full(exchange.pipe, use);
      if constexpr (Config::kKeepsKeysOfDq) {
        issue_column_mma<Element>(dq, keys, ds);
      } else {
        issue_transposed_mma<Element, Config::kBlockM>(dq, ptx::Operand::make(shared.owned[0]), ds);
      }
      if constexpr (Config::kMovesKeys) {
        issue_transposed_mma<Element, Config::kBlockM, true>(dq, ptx::Operand::make(shared.owned[1]),
                                                             ds.advance(kFactorBytes));
      }
      ptx::wgmma_wait<0>(dq);
      release(exchange.pipe, use);
      add_accumulators<Exchange::kStagings>(
          exchange.staging[num_used % Exchange::kStagings], dq, kDqStagingBarrierBesideTurns,
          [&] { return params.dq_accum.of_tile(first_tile + tiles.next().index, Exchange::kDqTileFloats); });
    }
    release(shared.owned_pipe);
  }
  if (threadIdx.x % kWarpgroup == 0) ptx::bulk_wait<0>();
}

}  // namespace mixed_attention::cuda::hopper
