// The forward and its tangent in one direction on Hopper: persistent blocks of one producer and two consumer
// warpgroups, with the roles, rings and turns of the forward (fwd/kernel.cuh).
//
// A consumer owns 64 query rows and computes, tile by tile, scores s = q kᵀ and x = q' kᵀ + q k'ᵀ, weights p and
// h = p (scale x - c), and the sums of p v and of h v + p v' (softmax.cuh): six products, or four where queries alone
// move. Scores of a tile are issued together with the sums of the tile before, under which its exponentials run; that
// goes on from item to item.
#pragma once

#include <cstdint>

#include "cuda/hopper/fwd/epilogue.cuh"
#include "cuda/hopper/fwd/mma.cuh"
#include "cuda/hopper/fwd/softmax.cuh"
#include "cuda/hopper/jvp/config.h"
#include "cuda/hopper/jvp/epilogue.cuh"
#include "cuda/hopper/jvp/mma.cuh"
#include "cuda/hopper/jvp/params.h"
#include "cuda/hopper/jvp/repair.cuh"
#include "cuda/hopper/jvp/run_tangents.cuh"
#include "cuda/hopper/jvp/softmax.cuh"
#include "cuda/hopper/plan/work_items.cuh"
#include "cuda/hopper/tile/load_tile.cuh"
#include "cuda/hopper/tile/named_barriers.h"
#include "cuda/hopper/tile/ring.cuh"
#include "cuda/ptx/fence.cuh"
#include "cuda/ptx/lane.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace mixed_attention::cuda::hopper {

template <typename Config>
__device__ inline void produce_moving(const JvpKernelParams& params, JvpSharedStorage<Config>& shared,
                                      uint32_t& num_loaded, RingUse<Config::kQueryBuffers>& q_use) {
  using Ring = RingUse<Config::kStages>;
  for (ItemWalk<Config::kBlockM> items(params.table); items.next_with_keys(); ++q_use.count) {
    const TileShare share = items.share();
    const ItemRows queries = items.rows();

    const auto load_key_tile = [&](auto& tiles, const MovingMaps& maps, auto& pipe, KeyTile tile, Ring use) {
      const auto load = [&](typename Config::Element* buffer, const CUtensorMap& map, ptx::Mbarrier& full, int step) {
        load_clipped_rows<Config::kBlockN, Config::kHeadDim>(buffer, map, full, tile.row_begin, tile.num_rows,
                                                             queries.head, queries.batch * step);
      };
      const bool moves = Config::kMovesKeys && maps.moves;
      ptx::Mbarrier& full = begin_copy(pipe, use, moves ? 2 * Config::kTileBytesN : Config::kTileBytesN);
      load(tiles.still[use.stage()], maps.still, full, maps.still_batch_step);
      if constexpr (Config::kMovesKeys) {
        if (moves) load(tiles.dot[use.stage()], maps.dot, full, maps.dot_batch_step);
      }
    };
    const auto load_k = [&](KeyTile tile, Ring use) { load_key_tile(shared.k, params.k, shared.k_pipe, tile, use); };
    const auto load_v = [&](KeyTile tile, Ring use) { load_key_tile(shared.v, params.v, shared.v_pipe, tile, use); };
    const auto load_q = [&] {
      const auto load = [&](typename Config::Element* buffer, const CUtensorMap& map, ptx::Mbarrier& full, int step) {
        load_rows<Config::kBlockM, Config::kHeadDim>(buffer, map, full, queries.row_begin, queries.head,
                                                     queries.batch * step);
      };
      const bool moves = params.q.moves;
      ptx::Mbarrier& full = begin_copy(shared.q_pipe, q_use, moves ? 2 * Config::kTileBytesM : Config::kTileBytesM);
      load(shared.q.still[q_use.stage()], params.q.still, full, params.q.still_batch_step);
      if (moves) load(shared.q.dot[q_use.stage()], params.q.dot, full, params.q.dot_batch_step);
    };

    // In the order in which the consumers need them: keys run one tile ahead of values.
    KeyTileIterator<Config::kBlockN> keys(items, share.begin);
    KeyTile tile = keys.next();
    load_k(tile, Ring{num_loaded});
    load_q();
    for (int i = share.begin + 1; i < share.end; ++i) {
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

template <typename Config>
__device__ inline void consume_moving(const JvpKernelParams& params, JvpSharedStorage<Config>& shared, int consumer) {
  using Numbers = WithTangents<typename Config::Element>;
  using Ring = RingUse<Config::kStages>;
  using Walk = ItemWalk<Config::kBlockM>;
  // This warp's first row in the tile is computed where it is used: it would take a register through the MMAs.
  const auto first_row = [] { return (ptx::thread_anew() - kWarpgroup) / 32 * kWarpRows; };

  // Consumer 0's first turn comes from the last one.
  const int own_turn = kTurnBarrier + consumer;
  const int next_turn = kTurnBarrier + (consumer + 1) % Config::kConsumers;
  const int own_vote = vote_barrier(Config::kConsumers) + consumer;
  if (consumer == Config::kConsumers - 1) ptx::named_barrier_arrive(next_turn, 2 * kWarpgroup);

  // Walk, ring uses and registers
  Walk items(params.table);
  TileShare share{};  // of the current item
  RingUse<Config::kQueryBuffers> q_use{0};
  Ring k_use{0};  // v is always the use before
  JvpMma<Config> mma(params, shared, consumer);
  OnlineSoftmax softmax;
  TangentSums tangents;
  const float scale_log2[2] = {params.softmax_scale_log2, params.softmax_scale_log2};

  const auto wait_for_queries = [&] {
    wait_full(shared.q_pipe, q_use);
    mma.load_queries(shared, q_use.stage(), first_row());
  };
  const auto issue_scores = [&] { mma.issue_scores(q_use.stage(), k_use.stage()); };
  const auto issue_outputs = [&](Ring v_use) {
    wait_full(shared.v_pipe, v_use);
    mma.issue_outputs(v_use.stage());
  };
  // Issues all MMAs of a step: the scores of one tile, and what the one before adds to the sums. The scores are there
  // when it returns.
  const auto issue_all = [&](Ring v_use) {
    wait_full(shared.k_pipe, k_use);
    ptx::named_barrier_sync(own_turn, 2 * kWarpgroup);
    issue_scores();
    issue_outputs(v_use);
    ptx::named_barrier_arrive(next_turn, 2 * kWarpgroup);
    ptx::wgmma_wait<2>(mma.s);
  };
  const auto issue_first = [&] {
    issue_scores();
    ptx::wgmma_wait<0>(mma.s, mma.x);
  };
  const auto finish_scores = [&](int tile) {
    if (tile < share.num_partial) mask_columns(mma.s, items.ranges()[tile].tail);
  };
  const auto bases_of = [&](uint32_t item) {
    return RowBases{shared.bases[item % 2] + first_row() + ptx::lane_anew() / 4, false};
  };
  const auto start_softmax = [&] { softmax.start<Numbers, 0>(mma.s, scale_log2, bases_of(q_use.count)); };
  const auto weigh = [&] { tangents.weigh(mma.x, mma.s, params.softmax_scale); };
  // NOTE: the answer depends on all that runs under the MMAs, as ptxas would move that behind the wait for them.
  const auto asks_for_repair = [&] {
    return ptx::named_barrier_any(own_vote, kWarpgroup, softmax.overflows<Numbers>() || !tangents.is_finite());
  };
  // Takes in the first tile of an item, whose sums are none yet.
  const auto add_first_tile = [&] {
    softmax.settle<Numbers>();
    tangents.add_tile(softmax, [&](const float (&change)[2]) { add_rows(mma.x, mma.s, change); });
    softmax.add_tile();
    mma.take_factors();
  };
  const auto add_tile = [&] {
    tangents.add_tile(softmax, [&](const float (&change)[2]) { mma.move_means(change); });
    softmax.add_tile();
    mma.take_factors();
  };

  // Softmax of the first tile of the first item
  bool has_keys = items.next_with_keys();
  if (has_keys) {
    share = items.share();
    wait_for_queries();
    wait_full(shared.k_pipe, k_use);
    issue_first();
    finish_scores(share.begin);
    release(shared.k_pipe, k_use);
    start_softmax();
    tangents.start();
    weigh();
    add_first_tile();
  }
  while (has_keys) {
    // Tiles behind the first
    clear(mma.out);
    clear(mma.out_dot);
    for (int tile = share.begin + 1; tile < share.end; ++tile) {
      const Ring v_use = k_use;
      ++k_use.count;
      issue_all(v_use);
      finish_scores(tile);
      softmax.exponentiate<0>(mma.s, scale_log2);
      ptx::wgmma_wait<1>(mma.x);
      weigh();
      const bool is_overflow = asks_for_repair();
      mma.wait();
      release(shared.v_pipe, v_use);
      if (is_overflow) {
        // Scores once more, under raised bases
        float factor[2];
        issue_first();
        finish_scores(tile);
        softmax.raise<Numbers, 0>(mma.s, scale_log2, factor, bases_of(q_use.count));
        softmax.settle<Numbers>();
        mma.scale_sums(factor);
        tangents.scale(factor);
        weigh();
      }
      release(shared.k_pipe, k_use);
      add_tile();
    }
    release(shared.q_pipe, q_use);

    // Last MMAs beside the next item's first
    const Walk finished = items;
    const OnlineSoftmax total = softmax;
    const TangentSums total_dot = tangents;
    const Ring v_use = k_use;
    ++k_use.count;
    ++q_use.count;
    has_keys = items.next_with_keys();
    if (has_keys) {
      wait_for_queries();
      issue_all(v_use);
      share = items.share();
      finish_scores(share.begin);
      start_softmax();
      ptx::wgmma_wait<1>(mma.x);
      release(shared.k_pipe, k_use);
      tangents.start();
      weigh();
      asks_for_repair();
      mma.wait();
      add_first_tile();
    } else {
      issue_outputs(v_use);
      mma.wait();
    }
    release(shared.v_pipe, v_use);
    // Results of the finished item
    store_tangents(params, shared, finished.rows(), first_row(), mma.out, mma.out_dot, total, total_dot,
                   bases_of(q_use.count - 1));
  }
  // Items without keys
  for (bool is_left = items.item < params.table.num_items; is_left; is_left = items.next()) {
    clear(mma.out);
    clear(mma.out_dot);
    store_tangents(params, shared, items.rows(), first_row(), mma.out, mma.out_dot, OnlineSoftmax{}, TangentSums{},
                   bases_of(0));
  }
  // Second walk after an overflow
  finish_items(shared);
  if (must_repair(shared)) repair_tangents(params, shared, mma, q_use, k_use, first_row());
}

// Zeros for tangents of what does not move: they stay, as no copy comes.
template <typename Config>
__device__ inline void fill_still_tangents(const JvpKernelParams& params, JvpSharedStorage<Config>& shared) {
  if constexpr (Config::kMovesKeys) {
    const auto fill = [](auto& tiles, const MovingMaps& maps) {
      if (maps.moves) return;
      auto* words = reinterpret_cast<uint4*>(&tiles.dot);
      for (int i = threadIdx.x; i < static_cast<int>(sizeof(tiles.dot) / sizeof(uint4)); i += Config::kThreads) {
        words[i] = uint4{};
      }
    };
    fill(shared.q, params.q);
    fill(shared.k, params.k);
    fill(shared.v, params.v);
    ptx::fence_async_shared();
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks)
    hopper_attention_jvp_kernel(const __grid_constant__ JvpKernelParams params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  JvpSharedStorage<Config>& shared = *reinterpret_cast<JvpSharedStorage<Config>*>(memory);

  fill_still_tangents(params, shared);
  const auto prefetch = [&] {
    for (const MovingMaps* maps : {&params.q, &params.k, &params.v}) {
      ptx::prefetch_tensor_map(maps->still);
      if (maps->moves) ptx::prefetch_tensor_map(maps->dot);
    }
  };
  const auto produce = [&](auto&... counts) { produce_moving(params, shared, counts...); };
  run_tangents(shared, prefetch, produce, [&](int consumer) { consume_moving(params, shared, consumer); });
}

}  // namespace mixed_attention::cuda::hopper
