// Attention forward on Hopper: persistent blocks of one producer and two or three consumer warpgroups.
//
// A work item of a block is a tile of kBlockM query rows of one batch_head, or a split of one, which goes through a
// share of the tile's keys and whose output is combined with the others' by a second kernel. The producer, a single
// thread, copies its queries and then its key and value tiles into rings of buffers. Each consumer owns 64 of the rows
// and computes, tile by tile, s = q k^T, p = exp2(s - softmax_base), and o += p v, with s, p and o in registers.
//
// Two overlaps keep the tensor cores busy. Within a warpgroup, s of a tile is issued together with o += p v of the tile
// before, and the softmax of the one runs under the MMA of the other; that goes on from item to item, so that an item's
// last MMA runs beside the next one's first. Between warpgroups, a ring of named barriers makes them issue their MMAs
// in turn, so that the softmax of one lies under the MMAs of the others.
//
// The kernel of 64 columns that goes through a list has two teams of a producer and two consumers, which share a
// block's registers and shared memory and nothing else: each has its own items, as a block has elsewhere.
//
// Who signals whom: *_full is completed by TMA (one arrival of the producer and the bytes; under a mask k_full also by
// one of the thread that brings its bits), row_scales.full by one of the warp that brings the row_scales of fp32 tiles
// (half_limbs.h), *_empty by one arrival of every consumer warp. Items without keys come last and take part in no
// barrier.
#pragma once

#include <cstdint>

#include "cuda/hopper/config.h"
#include "cuda/hopper/fwd/epilogue.cuh"
#include "cuda/hopper/fwd/mma.cuh"
#include "cuda/hopper/fwd/params.h"
#include "cuda/hopper/fwd/producer.cuh"
#include "cuda/hopper/fwd/repair.cuh"
#include "cuda/hopper/fwd/softmax.cuh"
#include "cuda/hopper/fwd/tile_row_scales.cuh"
#include "cuda/hopper/fwd/walk.cuh"
#include "cuda/hopper/mask/key_bits.cuh"
#include "cuda/hopper/tile/load_tile.cuh"
#include "cuda/hopper/tile/named_barriers.h"
#include "cuda/hopper/tile/ring.cuh"
#include "cuda/hopper/tile/run_roles.cuh"
#include "cuda/ptx/elect.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace mixed_attention::cuda::hopper {

template <typename Config>
__device__ inline void init_barriers(FwdSharedStorage<Config>& shared) {
  constexpr int kConsumerWarps = Config::kConsumers * kWarpgroup / 32;
  init_pipe(shared.q_pipe, 1, kConsumerWarps);
  init_pipe(shared.k_pipe, Config::kIsMasked ? 2 : 1, kConsumerWarps);
  init_pipe(shared.v_pipe, 1, kConsumerWarps);
  if constexpr (Config::kHasRowScales) init_pipe(shared.row_scales.pipe, 1, kConsumerWarps);
  ptx::mbarrier_init(shared.finished, kConsumerWarps);
  shared.has_overflowed = 0;
  ptx::mbarrier_fence_init();
}

// Under a mask a second thread follows the first and brings the bits of the key tiles.
template <typename Config>
__device__ inline void produce_key_bits(const FwdKernelParams& params, FwdSharedStorage<Config>& shared,
                                        Loaded<Config>& loaded, int) {
  RingUse<Config::kStages> use{loaded.num_key_tiles};
  for (Walk<Config> items(params.table); items.next_with_keys();) {
    const TileShare share = items.share();
    const uint32_t* key_mask_bits = params.key_mask_bits + items.rows().batch * params.key_mask_step;
    KeyTileIterator<Config::kBlockN> keys(items, share.begin);
    for (int i = share.begin; i < share.end; ++i, ++use.count) {
      wait_empty(shared.k_pipe, use);
      gather_key_bits(shared.key_bits[use.stage()], key_mask_bits, keys.next());
      ptx::mbarrier_arrive(shared.k_pipe.full[use.stage()]);
    }
  }
  loaded.num_key_tiles = use.count;
}

// The row_scales of the key tiles of fp32 inputs come by warps of their own, too, which take tiles in turn. One would
// need longer for a tile, from reading where it lies to the end of its barrier, than a step of 64 keys by one limb
// takes.
template <typename Config>
inline constexpr int kRowScaleWarps = Config::kLimbs == 1 && Config::kBlockN <= 64 ? 2 : 1;

template <typename Config>
__device__ inline void produce_row_scales(const FwdKernelParams& params, FwdSharedStorage<Config>& shared,
                                          uint32_t turn) {
  RingUse<Config::kStages> use{0};
  for (Walk<Config> items(params.table); items.next_with_keys();) {
    const TileShare share = items.share();
    const ItemRows queries = items.rows();
    const auto row_scales_of_keys = [&](const float* row_scales, int batch_step) {
      return row_scales_of_head(row_scales, queries, batch_step, params.table.num_heads, params.row_scales.seqlen_k);
    };
    const float* k_scales = row_scales_of_keys(params.row_scales.k, params.k_batch_step);
    const float* v_scales = row_scales_of_keys(params.row_scales.v, params.v_batch_step);
    KeyTileIterator<Config::kBlockN> keys(items, share.begin);
    for (int i = share.begin; i < share.end; ++i, ++use.count) {
      const KeyTile tile = keys.next();
      if (use.count % kRowScaleWarps<Config> != turn) continue;
      const TileRowScalesLoad<Config::kBlockN> load(k_scales, v_scales, tile);
      wait_empty(shared.row_scales.pipe, use);
      load.store(shared.row_scales.tiles[use.stage()]);
      sync_and_arrive_as_warp(shared.row_scales.pipe.full[use.stage()]);
    }
  }
}

template <typename Config>
__device__ inline void consume(const FwdKernelParams& params, FwdSharedStorage<Config>& shared, int consumer,
                               int team) {
  using Element = typename Config::Element;
  using Ring = RingUse<Config::kStages>;
  const int lane = threadIdx.x % 32;
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32 % 4, 0);
  const int first_row = consumer * kWarpgroupRows + warp * kWarpRows;  // of this warp in the tile

  // Consumer 0's first turn comes from the last one.
  const int first_of_team = team * Config::kConsumers;
  const int own_turn = kTurnBarrier + first_of_team + consumer;
  const int next_turn = kTurnBarrier + first_of_team + (consumer + 1) % Config::kConsumers;
  const int own_vote = vote_barrier(Config::kConsumersOfBlock) + first_of_team + consumer;
  if (consumer == Config::kConsumers - 1) ptx::named_barrier_arrive(next_turn, 2 * kWarpgroup);

  // Walk, ring uses and registers
  auto items = walk_of_team<Walk<Config>>(params.table, team);
  TileShare share{};     // of the current item
  bool has_rows = true;  // whether it has some for this warpgroup, which goes along in any case
  RingUse<Config::kQueryBuffers> q_use{0};
  Ring k_use{0};  // v is always the use before
  FwdMma<Config> mma(params, shared, consumer);
  auto& s = mma.s;
  auto& o = mma.o;
  OnlineSoftmax softmax;

  const auto issue_s = [&] { mma.issue_s(q_use.stage(), k_use.stage()); };
  const auto issue_o = [&](Ring v_use) {
    wait_full(shared.v_pipe, v_use);
    mma.issue_o(v_use.stage());
  };
  // Issues both MMAs of a step: the scores of one tile, and what the one before adds to the output.
  const auto issue_both = [&](Ring v_use) {
    wait_full(shared.k_pipe, k_use);
    ptx::named_barrier_sync(own_turn, 2 * kWarpgroup);
    issue_s();
    issue_o(v_use);
    ptx::named_barrier_arrive(next_turn, 2 * kWarpgroup);
    ptx::wgmma_wait<1>(s);
  };
  // Finishes the scores of a tile that has not been released yet; what is no key gets -inf.
  const auto finish_s = [&](int tile) { finish_scores(params, shared, mma, items, share, k_use, tile); };
  const auto bases_of = [&](uint32_t item) { return RowBases{shared.bases[item % 2] + first_row + lane / 4, false}; };
  const auto start_softmax = [&] {
    softmax.start<Element, Config::kPolynomialEvery>(s, mma.scale_log2, bases_of(q_use.count));
  };
  // NOTE: the answer depends on all exponentials. Without a barrier at this place ptxas moves most of them behind the
  // wait for the MMA that they should run under.
  const auto overflows = [&] {
    return ptx::named_barrier_any(own_vote, kWarpgroup, has_rows && softmax.overflows<Element>());
  };

  // Rows of the next item
  const auto begin_item = [&] {
    share = items.share();
    if constexpr (skips_softmax(Config::kBlockM)) {
      const ItemRows rows = items.rows();
      has_rows = rows.row_begin + consumer * kWarpgroupRows < rows.row_end;
    }
  };

  // Softmax of the first tile of the first item
  bool has_keys = items.next_with_keys();
  if (has_keys) {
    begin_item();
    mma.start_item(params, items.rows(), first_row);
    wait_full(shared.q_pipe, q_use);
    wait_full(shared.k_pipe, k_use);
    issue_s();
    ptx::wgmma_wait<0>(s);
    finish_s(share.begin);
    release(shared.k_pipe, k_use);
    start_softmax();
    softmax.settle<Element>();
    softmax.add_tile();
    mma.take_p(shared, k_use);
  }
  // Items: every step but the last of each
  while (has_keys) {
    clear(o);
    for (int tile = share.begin + 1; tile < share.end; ++tile) {
      const Ring v_use = k_use;
      ++k_use.count;
      issue_both(v_use);
      if (has_rows) {
        finish_s(tile);
        softmax.exponentiate<Config::kPolynomialEvery>(s, mma.scale_log2);
      }
      const bool is_overflow = overflows();
      mma.wait();
      release(shared.v_pipe, v_use);
      if (is_overflow) {
        float factor[2];
        issue_s();
        ptx::wgmma_wait<0>(s);
        finish_s(tile);
        softmax.raise<Element, Config::kPolynomialEvery>(s, mma.scale_log2, factor, bases_of(q_use.count));
        softmax.settle<Element>();
        scale_rows(o, factor);
      }
      release(shared.k_pipe, k_use);
      softmax.add_tile();
      mma.take_p(shared, k_use);
    }
    release(shared.q_pipe, q_use);

    // Last MMA beside the next item's first
    const Walk<Config> finished = items;
    const OnlineSoftmax total = softmax;
    const Ring v_use = k_use;
    ++k_use.count;
    ++q_use.count;
    has_keys = items.next_with_keys();
    if (has_keys) {
      mma.start_item(params, items.rows(), first_row);
      wait_full(shared.q_pipe, q_use);
      issue_both(v_use);
      begin_item();
      finish_s(share.begin);
      release(shared.k_pipe, k_use);
      start_softmax();
      overflows();
      mma.wait();
      softmax.settle<Element>();
      softmax.add_tile();
      mma.take_p(shared, k_use);
    } else {
      issue_o(v_use);
      mma.wait();
    }
    release(shared.v_pipe, v_use);
    // Output of the finished item
    store_item<Config>(params, shared, finished, first_row, o, total, bases_of(q_use.count - 1));
  }
  // Items without keys
  for (bool is_left = items.item < params.table.num_items; is_left; is_left = items.next()) {
    clear(o);
    store_result<Config>(params, shared, items.rows(), first_row, o, OnlineSoftmax{}, bases_of(0));
  }
  // Second walk after an overflow
  finish_items(shared);
  if (must_repair(shared)) repair_items(params, shared, mma, q_use, k_use, first_row, team);
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks)
    hopper_attention_fwd_kernel(const __grid_constant__ FwdKernelParams params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto* const shared = reinterpret_cast<FwdSharedStorage<Config>*>(memory);  // of every team

#pragma unroll
  for (int team = 0; team < Config::kTeams; ++team) clear_missing_slabs(params, shared[team]);
  const auto prepare = [&] {
    ptx::prefetch_tensor_map(params.q);
    ptx::prefetch_tensor_map(params.k);
    ptx::prefetch_tensor_map(params.v);
    for (int team = 0; team < Config::kTeams; ++team) init_barriers(shared[team]);
  };
  const auto produce_as_warp = [&](int warp) {
    const int team = Config::kTeams == 1 ? 0 : warp;
    Loaded<Config> loaded;
    const auto produce_by = [&](const auto& load) {
      load(params, shared[team], loaded, team);
      if (must_repair(shared[team])) load(params, shared[team], loaded, team);
    };
    if (warp < Config::kTeams && ptx::elect_one()) {
      produce_by(produce<Config>);
    } else if constexpr (Config::kHasRowScales) {
      if (warp >= 1 && warp <= kRowScaleWarps<Config>) produce_row_scales(params, shared[0], warp - 1);
    } else if (Config::kIsMasked && warp == 1 && ptx::elect_one()) {
      produce_by(produce_key_bits<Config>);
    }
  };
  run_roles<Config>(prepare, produce_as_warp, [&](int consumer) {
    const int team = Config::kTeams == 1 ? 0 : consumer / Config::kConsumers;
    consume(params, shared[team], consumer - team * Config::kConsumers, team);
  });
}

}  // namespace mixed_attention::cuda::hopper
