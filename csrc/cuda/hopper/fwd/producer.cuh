// The producer of the forward, a single thread: the queries of every work item, and its tiles of keys and values.
#pragma once

#include <cstdint>

#include "cuda/hopper/config.h"
#include "cuda/hopper/fwd/params.h"
#include "cuda/hopper/fwd/walk.cuh"
#include "cuda/hopper/tile/load_tile.cuh"
#include "cuda/hopper/tile/ring.cuh"
#include "cuda/ptx/mbarrier.cuh"

namespace mixed_attention::cuda::hopper {

// Sets to zero what the producer never loads, by all threads of a block, before its pipelines start.
template <typename Config>
__device__ inline void clear_missing_slabs(const FwdKernelParams& params, FwdSharedStorage<Config>& shared) {
  constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN, kHeadDim = Config::kHeadDim;
  clear_missing_slabs<kBlockM, kHeadDim>(shared.q, params.head_dim);
  clear_missing_slabs<kBlockN, kHeadDim>(shared.k, params.head_dim);
  clear_missing_slabs<kBlockN, kHeadDim>(shared.v, params.head_dim_v);
}

// Counts what a producer has loaded, over all work items: key tiles and tiles of queries.
template <typename Config>
struct Loaded {
  uint32_t num_key_tiles = 0;
  RingUse<Config::kQueryBuffers> q{0};
};

template <typename Config>
__device__ inline void produce(const FwdKernelParams& params, FwdSharedStorage<Config>& shared, Loaded<Config>& loaded,
                               int team) {
  using Ring = RingUse<Config::kStages>;
  using Loads = TileLoads<Config::kHeadDim, Config::kLimbs>;
  constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN;
  const Loads qk{params.head_dim}, v{params.head_dim_v};
  uint32_t& num_loaded = loaded.num_key_tiles;
  auto& q = loaded.q;
  for (auto items = walk_of_team<LeanWalk<Config>>(params.table, team); items.next_with_keys(); ++q.count) {
    const TileShare share = items.share();
    const ItemRows queries = items.rows();

    const auto load_k = [&](KeyTile tile, Ring use) {
      ptx::Mbarrier& full = begin_copy(shared.k_pipe, use, qk.template bytes<kBlockN>());
      qk.template load_clipped<kBlockN>(shared.k[use.stage()], params.k, full, tile.row_begin, tile.num_rows,
                                        queries.head, queries.batch * params.k_batch_step,
                                        params.row_scales.k_limb_step);
    };
    const auto load_v = [&](KeyTile tile, Ring use) {
      ptx::Mbarrier& full = begin_copy(shared.v_pipe, use, v.template bytes<kBlockN>());
      v.template load_clipped<kBlockN>(shared.v[use.stage()], params.v, full, tile.row_begin, tile.num_rows,
                                       queries.head, queries.batch * params.v_batch_step,
                                       params.row_scales.v_limb_step);
    };

    // In the order in which the consumers need them: keys run one tile ahead of values.
    KeyTileIterator<kBlockN> keys(items, share.begin);
    KeyTile tile = keys.next();
    load_k(tile, Ring{num_loaded});
    ptx::Mbarrier& q_full = begin_copy(shared.q_pipe, q, qk.template bytes<kBlockM>());
    qk.template load<kBlockM>(shared.q[q.stage()], params.q, q_full, queries.row_begin, queries.head,
                              queries.batch * params.q_batch_step, params.row_scales.q_limb_step);
    for (int num_left = share.end - share.begin - 1; num_left > 0; --num_left) {
      const KeyTile next = keys.next();
      load_k(next, Ring{num_loaded + 1});
      load_v(tile, Ring{num_loaded});
      tile = next;
      ++num_loaded;
    }
    load_v(tile, Ring{num_loaded});
    ++num_loaded;
  }
}

}  // namespace mixed_attention::cuda::hopper
