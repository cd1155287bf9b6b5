// The producer, a single thread, of the kernels that go through the keys of query tiles.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/hopper/bwd/config.h"
#include "cuda/hopper/bwd/params.h"
#include "cuda/hopper/plan/work_items.cuh"
#include "cuda/hopper/tile/load_tile.cuh"
#include "cuda/hopper/tile/ring.cuh"
#include "cuda/ptx/mbarrier.cuh"

namespace mixed_attention::cuda::hopper {

template <typename Config>
using QueryItems = ItemsOf<
    std::conditional_t<Config::kIsListed, ListWalk<Config::kBlockM>, ItemWalk<Config::kBlockM, UncutWorkTable>>>;

// num_key_producers: who brings the tiles of keys, and what belongs to them.
template <typename Config, typename SharedStorage>
__device__ inline void init_key_barriers(SharedStorage& shared, int num_key_producers) {
  constexpr int kConsumerWarps = Config::kConsumers * kWarpgroup / 32;
  init_pipe(shared.q_pipe, 1, kConsumerWarps);
  init_pipe(shared.k_pipe, num_key_producers, kConsumerWarps);
  init_pipe(shared.v_pipe, 1, kConsumerWarps);
  ptx::mbarrier_fence_init();
}

// Loads the queries and output gradients of every work item, then, tile by tile, the keys and values that they read.
template <typename Config, typename Params, typename SharedStorage>
__device__ inline void produce_keys(const Params& params, SharedStorage& shared) {
  constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN;
  using Loads = TileLoads<Config::kHeadDim, Config::kLimbs>;
  const Loads qk{params.head_dim}, v{params.head_dim_v};  // the latter also of output gradients
  const LimbSteps steps = limb_steps(params);
  uint32_t num_loaded = 0;  // key tiles, over all items
  uint32_t q_parity = 1;
  for (QueryItems<Config> item(params.table); item.next();) {
    const int num_tiles = item.tiles().num_tiles;
    if (num_tiles == 0) continue;

    // Queries and output gradients
    ptx::Mbarrier& q_full =
        begin_copy(shared.q_pipe, q_parity, qk.template bytes<kBlockM>() + v.template bytes<kBlockM>());
    q_parity ^= 1;
    qk.template load<kBlockM>(shared.q, params.q, q_full, item.row_begin, item.head, item.batch * params.q_batch_step,
                              steps.q);
    v.template load<kBlockM>(shared.dout, params.dout, q_full, item.row_begin, item.head,
                             item.batch * params.dout_batch_step, steps.dout);

    // Keys and values
    KeyTileIterator<kBlockN> keys(item);
    for (int i = 0; i < num_tiles; ++i, ++num_loaded) {
      const KeyTile tile = keys.next();
      const auto load = [&](const Loads& loads, auto use, auto& ring, auto& pipe, const CUtensorMap& map,
                            int batch_step, int limb_step) {
        ptx::Mbarrier& full = begin_copy(pipe, use, loads.template bytes<kBlockN>());
        loads.template load_clipped<kBlockN>(ring[use.stage()], map, full, tile.row_begin, tile.num_rows, item.head,
                                             item.batch * batch_step, limb_step);
      };
      load(qk, RingUse<Config::kStagesK>{num_loaded}, shared.k, shared.k_pipe, params.k, params.k_batch_step, steps.k);
      load(v, RingUse<Config::kStagesV>{num_loaded}, shared.v, shared.v_pipe, params.v, params.v_batch_step, steps.v);
    }
  }
}

}  // namespace mixed_attention::cuda::hopper
