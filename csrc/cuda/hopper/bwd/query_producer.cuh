// The producer, a single thread, of the kernels that go through the queries of key tiles.
#pragma once

#include <cstdint>

#include "cuda/hopper/bwd/config.h"
#include "cuda/hopper/bwd/params.h"
#include "cuda/hopper/bwd/query_walk.cuh"
#include "cuda/hopper/tile/load_tile.cuh"
#include "cuda/hopper/tile/ring.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"

namespace mixed_attention::cuda::hopper {

// num_key_readers: warps that read keys and values.
template <typename Config, typename SharedStorage>
__device__ inline void init_input_barriers(SharedStorage& shared, int num_key_readers) {
  constexpr int kConsumerWarps = Config::kConsumers * kWarpgroup / 32;
  init_pipe(shared.kv_pipe, 1, num_key_readers);
  init_pipe(shared.q_pipe, 1, kConsumerWarps);
  init_pipe(shared.dout_pipe, 1, kConsumerWarps);
}

// The statistics of a tile of queries in global memory.
__device__ inline const float* q_stats_of(const QueryStats& stats, int64_t tile) {
  return stats.lse_log2 + tile * kStatsTileFloats;
}
__device__ inline const float* dout_stats_of(const QueryStats& stats, int64_t tile) {
  return stats.delta + tile * kStatsTileFloats;
}
__device__ inline const QueryNumbers* q_stats_of(const Fp32QueryStats& stats, int64_t tile) { return stats.q + tile; }
__device__ inline const DoutNumbers* dout_stats_of(const Fp32QueryStats& stats, int64_t tile) {
  return stats.dout + tile;
}

// Loads the keys and values of every work item, then, tile by tile, the queries that read them, with their output
// gradients and statistics.
template <typename Config, typename Params, typename SharedStorage>
__device__ inline void produce_queries(const Params& params, SharedStorage& shared) {
  constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN;
  constexpr int kQStatsBytes = sizeof(shared.q_stats[0]), kDoutStatsBytes = sizeof(shared.dout_stats[0]);
  using Loads = TileLoads<Config::kHeadDim, Config::kLimbs>;
  const Loads qk{params.head_dim}, v{params.head_dim_v};  // the latter also of output gradients
  const LimbSteps steps = limb_steps(params);
  uint32_t num_loaded = 0;  // query tiles, over all items
  uint32_t kv_parity = 1;
  for (KeyItems<Config> item(params.table); item.next();) {
    if (QueryShare<Config>(item.tiles()).count == 0) continue;

    // Keys and values
    ptx::Mbarrier& kv_full =
        begin_copy(shared.kv_pipe, kv_parity, qk.template bytes<kBlockN>() + v.template bytes<kBlockN>());
    kv_parity ^= 1;
    const int num_keys = min(kBlockN, item.tiles().row_end - item.row_begin);
    qk.template load_clipped<kBlockN>(shared.k, params.k, kv_full, item.row_begin, num_keys, item.head,
                                      item.batch * params.k_batch_step, steps.k);
    v.template load_clipped<kBlockN>(shared.v, params.v, kv_full, item.row_begin, num_keys, item.head,
                                     item.batch * params.v_batch_step, steps.v);

    const int64_t first_tile = (int64_t{item.batch} * params.table.num_heads + item.head) * params.stats.num_tiles;
    QueryWalk<Config> walk(params.table, item);
    for (int i = 0; i < walk.num_tiles(); ++i, ++num_loaded) {
      const QueryTile tile = walk.next();
      const int64_t stats = first_tile + tile.index;

      // Queries
      const RingUse<Config::kStagesQ> q{num_loaded};
      ptx::Mbarrier& q_full = begin_copy(shared.q_pipe, q, qk.template bytes<kBlockM>() + kQStatsBytes);
      qk.template load_clipped<kBlockM>(shared.q[q.stage()], params.q, q_full, tile.row_begin, tile.num_rows, item.head,
                                        item.batch * params.q_batch_step, steps.q);
      ptx::load_bytes(&shared.q_stats[q.stage()], q_stats_of(params.stats, stats), q_full, kQStatsBytes);

      // Output gradients
      const RingUse<Config::kStagesDout> dout{num_loaded};
      ptx::Mbarrier& dout_full = begin_copy(shared.dout_pipe, dout, v.template bytes<kBlockM>() + kDoutStatsBytes);
      v.template load_clipped<kBlockM>(shared.dout[dout.stage()], params.dout, dout_full, tile.row_begin, tile.num_rows,
                                       item.head, item.batch * params.dout_batch_step, steps.dout);
      ptx::load_bytes(&shared.dout_stats[dout.stage()], dout_stats_of(params.stats, stats), dout_full, kDoutStatsBytes);
    }
  }
}

}  // namespace mixed_attention::cuda::hopper
