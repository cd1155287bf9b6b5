// The producers, single threads, of the kernel that goes through a list of keys: one of keys and values, one of
// queries, which come ahead of the keys of their item. That one tells the warpgroup that computes dq what becomes of
// it, visit by visit.
#pragma once

#include <cstdint>

#include "cuda/hopper/bwd/config.h"
#include "cuda/hopper/bwd/listed_items.cuh"
#include "cuda/hopper/bwd/listed_walk.cuh"
#include "cuda/hopper/bwd/params.h"
#include "cuda/hopper/tile/load_tile.cuh"
#include "cuda/hopper/tile/ring.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"

namespace mixed_attention::cuda::hopper {

// Loads the keys and values of every item that somebody reads.
template <typename Config>
__device__ inline void produce_listed_keys(const ListedDkDvKernelParams& params, DkDvSharedStorage<Config>& shared) {
  constexpr int kBlockN = Config::kBlockN, kHeadDim = Config::kHeadDim;
  const TileLoads<kHeadDim, 1> k{params.head_dim}, v{params.head_dim_v};
  RingUse<Config::kKeyBuffers> kv{0};
  for (ListedItems items(shared.items); items.next<true>();) {
    const ListedItem& item = items.item();  // read where it is wanted, as registers are few
    if (item.num_tiles == 0) continue;
    ptx::Mbarrier& kv_full = begin_copy(shared.kv_pipe, kv, k.template bytes<kBlockN>() + v.template bytes<kBlockN>());
    const int num_keys = min(kBlockN, item.row_end - item.row_begin);
    const int buffer = kv.stage() * kBlockN * kHeadDim;
    ++kv.count;
    k.template load_clipped<kBlockN>(shared.k + buffer, params.k, kv_full, item.row_begin, num_keys, item.head,
                                     item.batch * params.k_batch_step, 0);
    v.template load_clipped<kBlockN>(shared.v + buffer, params.v, kv_full, item.row_begin, num_keys, item.head,
                                     item.batch * params.v_batch_step, 0);
  }
}

// Loads, tile by tile, the queries that read every item, with their output gradients and statistics.
template <typename Config>
__device__ inline void produce_listed_queries(const ListedDkDvKernelParams& params, DkDvSharedStorage<Config>& shared) {
  constexpr int kBlockM = Config::kBlockM, kHeadDim = Config::kHeadDim;
  constexpr int kQStatsBytes = sizeof(shared.q_stats[0]), kDoutStatsBytes = sizeof(shared.dout_stats[0]);
  const TileLoads<kHeadDim, 1> q_loads{params.head_dim}, dout_loads{params.head_dim_v};
  uint32_t num_loaded = 0;  // query tiles, over all items
  for (ListedItems items(shared.items); items.next<true>();) {
    const ListedItem& item = items.item();
    if (item.num_tiles == 0) continue;
    // Fewer registers than 64 bits take; blocks of the kernel that makes the statistics are as many.
    const int first_tile = (item.batch * params.table.num_heads + item.head) * params.stats.num_tiles;
    ListedQueryIterator queries(params.table.runs, item.first_run, item.is_first(), item.is_last());
    for (int i = 0; i < item.num_tiles; ++i, ++num_loaded) {
      const QueryTile tile = queries.next();
      const auto stats = [&] { return int64_t{first_tile + tile.index} * kStatsTileFloats; };

      // Queries
      const RingUse<Config::kStagesQ> q{num_loaded};
      ptx::Mbarrier& q_full = begin_copy(shared.q_pipe, q, q_loads.template bytes<kBlockM>() + kQStatsBytes);
      q_loads.template load_clipped<kBlockM>(shared.q[q.stage()], params.q, q_full, tile.row_begin, tile.num_rows,
                                             item.head, item.batch * params.q_batch_step, 0);
      ptx::load_bytes(&shared.q_stats[q.stage()], params.stats.lse_log2 + stats(), q_full, kQStatsBytes);

      // What becomes of their dq. Its place is free: whoever reads it is fewer visits behind than there are places.
      if constexpr (Config::kAddsDq) {
        const RingUse<kDqVisits> visit{num_loaded};
        shared.dq_exchange.visits.visits[visit.stage()] = queries.visit(tile);
        ptx::mbarrier_arrive(shared.dq_exchange.visits.full[visit.stage()]);
      }

      // Output gradients
      const RingUse<Config::kStagesDout> dout{num_loaded};
      ptx::Mbarrier& dout_full =
          begin_copy(shared.dout_pipe, dout, dout_loads.template bytes<kBlockM>() + kDoutStatsBytes);
      dout_loads.template load_clipped<kBlockM>(shared.dout[dout.stage()], params.dout, dout_full, tile.row_begin,
                                                tile.num_rows, item.head, item.batch * params.dout_batch_step, 0);
      ptx::load_bytes(&shared.dout_stats[dout.stage()], params.stats.delta + stats(), dout_full, kDoutStatsBytes);
    }
  }
}

}  // namespace mixed_attention::cuda::hopper
