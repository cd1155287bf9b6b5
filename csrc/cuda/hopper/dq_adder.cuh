// What a key tile adds to dq, by the third warpgroup of the kernel for dk and dv.
//
// The transposed dqᵀ += kᵀ dsᵀ: kᵀ stays in registers for a whole item, dsᵀ comes from the other warpgroups as they
// have it. The sums of a query tile lie in the order of the accumulators, so that they leave in 16 bytes a thread and a
// single bulk addition; hopper_dq_sums_kernel puts them right.
//
// Who signals whom: ds_full by one arrival of every warp that computes scores, ds_empty by one of every warp here.
#pragma once

#include <cstdint>

#include "cuda/hopper/bwd_config.h"
#include "cuda/hopper/bwd_params.h"
#include "cuda/hopper/products.cuh"
#include "cuda/hopper/query_tiles.cuh"
#include "cuda/hopper/ring.cuh"
#include "cuda/hopper/split_sums.cuh"
#include "cuda/ptx/bulk_reduce.cuh"
#include "cuda/ptx/fence.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/stmatrix.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace mixed_attention::cuda::hopper {

constexpr int kDqBarrier = 1;  // named barrier of this warpgroup

template <typename Config>
__device__ inline void init_barriers(DqExchange<Config, true>& exchange) {
  for (int stage = 0; stage < exchange.kStages; ++stage) {
    ptx::mbarrier_init(exchange.ds_full[stage], Config::kConsumers * kWarpgroup / 32);
    ptx::mbarrier_init(exchange.ds_empty[stage], kWarpgroup / 32);
  }
}

// Gives the warpgroup for dq a tile's ds of this warp's 16 keys, which start at first_row. Rows from num_rows on are
// past the end of the keys: their weights may be infinite, and zeros take their place.
template <typename Config>
__device__ inline void hand_over(DqExchange<Config, true>& exchange, uint32_t count, const uint32_t (&ds)[16],
                                 int first_row, int num_rows) {
  const RingUse<DqExchange<Config>::kStages> use{count};
  const int lane = threadIdx.x % 32;
  const int row = first_row + lane % 16;
  const bool exists[2] = {lane / 4 < num_rows, lane / 4 + 8 < num_rows};
  const auto word = [&](int i) { return exists[i % 2] ? ds[i] : 0; };

  ptx::mbarrier_wait(exchange.ds_empty[use.stage()], use.empty_parity());
  const uint32_t target = ptx::shared_address(exchange.ds[use.stage()]) + row * kRowBytes;
#pragma unroll
  for (int step = 0; step < Config::kBlockM / 16; ++step) {
    const int chunk = 2 * step + lane / 16;
    ptx::stmatrix_x4(target + (chunk ^ (row % 8)) * 16, word(4 * step), word(4 * step + 1), word(4 * step + 2),
                     word(4 * step + 3));
  }
  ptx::fence_async_shared();
  __syncwarp();
  if (lane == 0) ptx::mbarrier_arrive(exchange.ds_full[use.stage()]);
}

// This warp's rows of kᵀ as operand of all products of an item.
template <typename Config>
__device__ inline void load_transposed_keys(uint32_t (&operand)[Config::kBlockN / 4],
                                            const typename Config::Element* keys) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32 % 4;
  const int row = lane % 8 + lane / 16 * 8;
  const int chunk = 2 * warp + lane / 8 % 2;
  const auto* source = reinterpret_cast<const unsigned char*>(keys) + row * kRowBytes + (chunk ^ (row % 8)) * 16;
#pragma unroll
  for (int step = 0; step < Config::kBlockN / 16; ++step) {
    uint32_t words[4];
    ptx::ldmatrix_x4_trans(words, source + step * kRowStepBytes);
#pragma unroll
    for (int i = 0; i < 4; ++i) operand[4 * step + i] = words[i];
  }
}

template <typename Config>
__device__ inline void add_dq(const DkDvKernelParams& params, DkDvSharedStorage<Config>& shared) {
  using Element = typename Config::Element;
  auto& exchange = shared.dq_exchange;
  using Ring = RingUse<DqExchange<Config>::kStages>;
  constexpr int kStagings = DqExchange<Config>::kStagings;
  const int thread = threadIdx.x % kWarpgroup;
  const int lane = thread % 32;
  const ptx::Operand ds_ring = ptx::Operand::make(exchange.ds);

  uint32_t num_used = 0;  // query tiles, over all items
  uint32_t kv_parity = 0;
  for (KeyItems<Config> item(params.table); item.next();) {
    const KeySegmentTiles& segment = item.tiles();
    const QueryShare<Config> share(segment);
    if (share.count == 0) continue;
    uint32_t keys[Config::kBlockN / 4];
    ptx::mbarrier_wait(shared.kv_full, kv_parity);
    kv_parity ^= 1;
    load_transposed_keys<Config>(keys, shared.k);
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(shared.kv_empty);

    const int64_t first_tile = (int64_t{item.batch} * params.table.num_heads + item.head) * params.stats.num_tiles;
    QueryTileIterator queries(params.table, segment, share.first);
    for (int i = 0; i < share.count; ++i, ++num_used) {
      const Ring ds{num_used};
      float dq[Config::kBlockM / 2] = {};
      ptx::mbarrier_wait(exchange.ds_full[ds.stage()], ds.full_parity());
      issue_column_products<Element>(dq, keys, ds_ring.advance(ds.stage() * Config::kScoreBytes));
      ptx::wgmma_wait<0>(dq);
      if (lane == 0) ptx::mbarrier_arrive(exchange.ds_empty[ds.stage()]);

      float* staging = exchange.staging[num_used % kStagings];
      if (thread == 0) ptx::bulk_wait_read<kStagings - 1>();
      ptx::named_barrier_sync(kDqBarrier, kWarpgroup);
#pragma unroll
      for (int chunk = 0; chunk < Config::kBlockM / 8; ++chunk) {
        reinterpret_cast<float4*>(staging)[chunk * kWarpgroup + thread] =
            make_float4(dq[4 * chunk], dq[4 * chunk + 1], dq[4 * chunk + 2], dq[4 * chunk + 3]);
      }
      ptx::fence_async_shared();
      ptx::named_barrier_sync(kDqBarrier, kWarpgroup);
      if (thread == 0) {
        float* sums = params.dq_sums + (first_tile + queries.next().index) * Config::kDqTileFloats;
        ptx::bulk_add(sums, staging, sizeof(float) * Config::kDqTileFloats);
        ptx::bulk_commit();
      }
    }
  }
  if (thread == 0) ptx::bulk_wait<0>();
}

}  // namespace mixed_attention::cuda::hopper
