// Gradients of keys and values on Hopper: persistent blocks of one producer and two consumer warpgroups that own what
// they write. Gradients of queries are another kernel's (dq_kernel.cuh), or those of a third consumer warpgroup
// (dq_adder.cuh), which are added up in global memory.
//
// A work item of a block is a tile of kBlockN key rows of one batch_head. The producer, a single thread, copies its
// keys and values and then, tile by tile, the queries that read them, with their output gradients and statistics. Each
// consumer owns 64 of the key rows and goes through the transposed scores, in which keys are rows: s = k qᵀ, p = exp2(s
// - lse), dv += p dout, dp = v doutᵀ - delta, ds = p dp, dk += ds q. As rows of s are rows of dk and dv, p and ds are
// operands of their MMAs as they come out, and everything but the tiles stays in registers; so do its own rows of keys
// and values where there is room for them.
//
// In the step for tile t, dk += ds q of tile t - 1 and dp of t run under the exponentials of t, dv += p dout of t under
// the gradients of its scores, and s of tile t + 1 is issued as soon as the registers of s are free. What a warp does
// by itself takes longer than the MMAs: so what the next step reads beside them is read while s is in flight, and ds of
// t - 1 leaves for dq in the step for t. At the end of a step no MMA is in flight, which the compiler needs.
//
// Who signals whom: *_full is completed by TMA (one arrival of the producer and the bytes), *_empty by one arrival of
// every consumer warp. Items that nobody reads take part in no barrier.
#pragma once

#include <cstdint>

#include "cuda/hopper/bwd/cluster_sums.cuh"
#include "cuda/hopper/bwd/config.h"
#include "cuda/hopper/bwd/dk_dv_items.cuh"
#include "cuda/hopper/bwd/dq_adder.cuh"
#include "cuda/hopper/bwd/dq_sender.cuh"
#include "cuda/hopper/bwd/listed_dq.cuh"
#include "cuda/hopper/bwd/listed_items.cuh"
#include "cuda/hopper/bwd/listed_producer.cuh"
#include "cuda/hopper/bwd/own_keys.cuh"
#include "cuda/hopper/bwd/own_rows.cuh"
#include "cuda/hopper/bwd/params.h"
#include "cuda/hopper/bwd/query_producer.cuh"
#include "cuda/hopper/bwd/rare_items.cuh"
#include "cuda/hopper/bwd/scores.cuh"
#include "cuda/hopper/tile/mma.cuh"
#include "cuda/hopper/tile/ring.cuh"
#include "cuda/hopper/tile/run_roles.cuh"
#include "cuda/hopper/tile/store_rows.cuh"
#include "cuda/ptx/elect.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace mixed_attention::cuda::hopper {

template <typename Config>
__device__ inline void init_barriers(DkDvSharedStorage<Config>& shared) {
  constexpr int kConsumerWarps = Config::kConsumers * kWarpgroup / 32;
  constexpr int kReaders = kConsumerWarps + (Config::kAddsDq ? kWarpgroup / 32 : 0);  // of keys and values
  init_input_barriers<Config>(shared, kReaders);
  if constexpr (Config::kAddsDq) init_barriers(shared.dq_exchange);
  if constexpr (Config::kIsOrdered) {
    init_pipe(shared.dq_exchange.staging_pipe, kWarpgroup / 32, 1);
  }
  if constexpr (Config::kIsListed) init_list_barriers(shared, kReaders);
  ptx::mbarrier_init(shared.peer_full, kConsumerWarps);
  ptx::mbarrier_init(shared.peer_empty, kConsumerWarps);
  ptx::mbarrier_fence_init();
}

template <typename Config>
__device__ inline void consume(const DkDvParams<Config>& params, DkDvSharedStorage<Config>& shared, int consumer) {
  using Element = typename Config::Element;
  using Operand = ptx::SlabOperand<Config::kRowBytes>;
  using QRing = RingUse<Config::kStagesQ>;
  using DoutRing = RingUse<Config::kStagesDout>;
  constexpr int kBlockM = Config::kBlockM, kHeadDim = Config::kHeadDim;
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32 % 4, 0);
  const int first_row = consumer * kWarpgroupRows + warp * kWarpRows;  // of this warp in the tile

  // Operands and rings
  OwnRows<Config, (Config::kKeptInputs > 1 ? kHeadDim : 0)> k(shared.k, consumer * kWarpgroupRows);
  OwnRows<Config, (Config::kKeptInputs > 0 ? kHeadDim : 0)> v(shared.v, consumer * kWarpgroupRows);
  const Operand q_ring = Operand::make(shared.q, Config::kSlabBytesM);
  const Operand dout_ring = Operand::make(shared.dout, Config::kSlabBytesM);
  Element* staging = shared.staging[consumer * kWarpgroup / 32 + warp];

  const auto tile_of = [](Operand ring, int stage) { return ring.advance(stage * Config::kTileBytesM); };

  uint32_t num_used = 0;  // query tiles, over all items
  KeyUse<Config> kv{0};
  [[maybe_unused]] uint32_t num_exchanges = 0;
  for (auto item = make_items<Config>(params, shared); item.next();) {
    const int num_tiles = num_query_tiles<Config>(item);
    const int row_begin = rows_of<Config>(item).row_begin + first_row;
    const int num_rows = rows_of<Config>(item).row_end - row_begin;
    const auto find_own_keys = [&] {
      return OwnKeys<Config::kIsMasked>(params, rows_of<Config>(item).batch, row_begin, num_rows);
    };
    float dk[kHeadDim / 2] = {}, dv[kHeadDim / 2] = {};

    if (num_tiles > 0) {
      [[maybe_unused]] const auto own_keys = find_own_keys();
      float s[kBlockM / 2], dp[kBlockM / 2];
      uint32_t p_operand[kBlockM / 4], ds_operand[kBlockM / 4] = {};
      [[maybe_unused]] bool is_rare = false;
      if constexpr (Config::kSeparatesRareItems) {  // read while keys and values are on their way
        is_rare = sees_reference<Config>(params, item);
      }
      // Keys and values of the item
      wait_full(shared.kv_pipe, kv);
      int buffer = 0;
      if constexpr (!Config::kIsListed) kv ^= 1;
      if constexpr (Config::kKeyBuffers > 1) {
        buffer = kv.stage() * Config::kBlockN * kHeadDim;
        k.move_to(shared.k + buffer, consumer * kWarpgroupRows);
        v.move_to(shared.v + buffer, consumer * kWarpgroupRows);
      }
      if constexpr (Config::kSeparatesRareItems) {
        static_assert(kHeadDim == Config::kSlabColumns, "sees_infinity looks at one slab");
        const Element* rows = shared.k + buffer + first_row * kHeadDim;
        is_rare = is_rare_item(consumer, sees_infinity<Element, Config::kRowBytes>(rows) || is_rare);
      }
      k.load(first_row, params.head_dim);
      v.load(first_row, params.head_dim_v);
      // Scores of the first tile
      const QRing first{num_used};
      const DoutRing first_dout{num_used};
      Operand q_tile = tile_of(q_ring, first.stage()), previous_q = q_tile;
      Operand dout_tile = tile_of(dout_ring, first_dout.stage());
      ColumnStats<kBlockM> lse_log2;
      wait_full(shared.q_pipe, first);
      wait_full(shared.dout_pipe, first_dout);
      lse_log2.load(shared.q_stats[first.stage()]);
      start_differences(dp, shared.dout_stats[first_dout.stage()]);
      k.issue_transposed_scores(s, q_tile);
      if constexpr (Config::kAddsDq) wait_for_room(shared.dq_exchange, num_used);
      ptx::wgmma_wait<0>(s);

      // The first step adds zeros to dk and hands nothing over, the last one's scores of a next tile are not used: an
      // MMA that is issued in some steps only would make the compiler wait for each. kRelates: whether scores may have
      // to.
      const auto go_through_tiles = [&]<bool kRelates>() {
        for (int tile = 0; tile < num_tiles; ++tile, ++num_used) {
          const QRing previous{num_used - (tile > 0)}, next{num_used + (tile + 1 < num_tiles)};
          const DoutRing dout{num_used}, next_dout{next.count};

          // dk of the tile before, dp of this one
          issue_column_mma<Element>(dk, ds_operand, previous_q);
          v.template issue_transposed_scores<true>(dp, dout_tile);
          if constexpr (kRelates) {
            const float* lse_tile = shared.q_stats[QRing{num_used}.stage()];
            if (is_marked(lse_tile)) relate_columns(s, lse_tile);
          } else if constexpr (Config::kIsOrdered) {
            // NOTE: a branch that is never taken, which keeps ptxas from mixing what follows with the MMAs.
            if (shared.q_stats[QRing{num_used}.stage()][kMarkPlace] == kHasReferences) __trap();
          }
          scale_columns(s, params.softmax_scale_log2, lse_log2);
          // NOTE: behind a wait, a branch, ptxas spreads the handing over among the last exponentials; without one it
          // does so with the MMAs alone. An ordered dq makes that take more registers than there are.
          constexpr bool kWaitsEarly = Config::kAddsDq && !Config::kIsOrdered;
          const auto wait_for_next = [&] { wait_full(shared.q_pipe, next); };
          if constexpr (kWaitsEarly) wait_for_next();
          if constexpr (Config::kAddsDq) {
            hand_over(shared.dq_exchange, previous.count, ds_operand, first_row, own_keys, tile > 0);
          }

          // p, and dv under the gradients of scores
          exponentiate_all(s);
          if constexpr (Config::kSharesOperand) ptx::wgmma_wait<1>(dk);
          round_operand<Element>(p_operand, s);
          issue_column_mma<Element>(dv, p_operand, dout_tile);
          ptx::wgmma_wait<1>(dk, dp);

          // ds, and s of the next tile
          multiply_all(dp, s);
          previous_q = q_tile;
          q_tile = tile_of(q_ring, next.stage());
          dout_tile = tile_of(dout_ring, next_dout.stage());
          if constexpr (!kWaitsEarly) wait_for_next();
          k.issue_transposed_scores(s, q_tile);
          if constexpr (Config::kSharesOperand) ptx::wgmma_wait<1>(dv);
          round_operand<Element>(ds_operand, dp);
          if (tile > 0) sync_and_release(shared.q_pipe, previous);

          // Statistics of the next tile
          wait_full(shared.dout_pipe, next_dout);
          lse_log2.load(shared.q_stats[next.stage()]);
          start_differences(dp, shared.dout_stats[next_dout.stage()]);
          if constexpr (Config::kAddsDq) wait_for_room(shared.dq_exchange, num_used);
          ptx::wgmma_wait<0>(dv, s);
          sync_and_release(shared.dout_pipe, dout);
        }
      };
      if constexpr (Config::kSeparatesRareItems) {
        if (is_rare) {
          go_through_tiles.template operator()<true>();
        } else {
          go_through_tiles.template operator()<false>();
        }
      } else {
        go_through_tiles.template operator()<true>();
      }

      if constexpr (Config::kIsListed) {
        sync_and_release(shared.kv_pipe, kv);
        ++kv.count;
      } else {
        sync_and_release(shared.kv_pipe);
      }
      // dk of the last tile
      const QRing last{num_used - 1};
      issue_column_mma<Element>(dk, ds_operand, tile_of(q_ring, last.stage()));
      if constexpr (Config::kAddsDq) {
        hand_over(shared.dq_exchange, last.count, ds_operand, first_row, own_keys, true);
      }
      ptx::wgmma_wait<0>(dk);
      sync_and_release(shared.q_pipe, last);
      scale_all(dk, params.softmax_scale);
    }

    // Stores of dv and dk, or exchange within the cluster
    const auto store = [&](float (&grad)[kHeadDim / 2], void* tensor, const Strides& strides, int num_columns) {
      if constexpr (Config::kIsMasked) clear_other_keys(grad, find_own_keys());
      const int row = Config::kIsListed ? rows_of<Config>(item).row_begin + first_row : row_begin;
      const int count = Config::kIsListed ? rows_of<Config>(item).row_end - row : num_rows;
      Element* target = static_cast<Element*>(tensor) + rows_of<Config>(item).batch * strides.batch +
                        row * strides.row + rows_of<Config>(item).head * strides.head;
      store_rows<Element, kHeadDim>(staging, grad, target, strides.row, count, num_columns);
    };
    if constexpr (Config::kSplits == 1) {
      store(dv, params.dv, params.dv_strides, params.head_dim_v);
      store(dk, params.dk, params.dk_strides, params.head_dim);
    } else {
      const auto finish = [&](const float (&sent)[kHeadDim / 2], float (&kept)[kHeadDim / 2], void* tensor,
                              const Strides& strides, int num_columns) {
        const bool is_read = item.tiles().num_tiles > 0;
        if (is_read) exchange_sums(shared, num_exchanges++, reinterpret_cast<float*>(staging), sent, kept);
        store(kept, tensor, strides, num_columns);
        if (is_read) release_sums(shared);
      };
      if (QueryShare<Config>::block_rank() == 0) {
        finish(dk, dv, params.dv, params.dv_strides, params.head_dim_v);
      } else {
        finish(dv, dk, params.dk, params.dk_strides, params.head_dim);
      }
    }
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    hopper_dk_dv_kernel(const __grid_constant__ DkDvParams<Config> params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  DkDvSharedStorage<Config>& shared = *reinterpret_cast<DkDvSharedStorage<Config>*>(memory);

  clear_missing_input_slabs<Config>(params, shared);
  const auto prepare = [&] {
    prefetch_input_maps(params);
    init_barriers(shared);
  };
  const auto produce_as_warp = [&](int warp) {
    if constexpr (Config::kIsListed) {
      if (warp == 0) {
        take_items<Config>(params, shared.items);
      } else if (warp == 1) {
        if (ptx::elect_one()) produce_listed_keys(params, shared);
      } else if (warp == 2) {
        if (ptx::elect_one()) produce_listed_queries(params, shared);
      }
    } else if (warp == 0) {
      if (ptx::elect_one()) produce_queries<Config>(params, shared);
    } else if constexpr (Config::kIsOrdered) {
      if (warp <= DqExchange<Config>::kStagings && ptx::elect_one()) send_dq(params, shared, warp - 1);
    }
  };
  const auto consume_as = [&](int consumer) { consume(params, shared, consumer); };
  if constexpr (Config::kAddsDq) {
    run_roles<Config, Config::kSplits>(prepare, produce_as_warp, consume_as, [&] {
      if constexpr (Config::kIsListed) {
        add_listed_dq(params, shared);
      } else {
        add_dq(params, shared);
      }
    });
  } else {
    run_roles<Config, Config::kSplits>(prepare, produce_as_warp, consume_as);
  }
}

}  // namespace mixed_attention::cuda::hopper
