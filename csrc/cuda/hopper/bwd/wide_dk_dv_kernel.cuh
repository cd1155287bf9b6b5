// Gradients of keys and values of wide heads on Hopper: persistent blocks of one producer and two consumer warpgroups,
// of which one owns dv, the other one dk. Those of queries are another kernel's (dq_kernel.cuh).
//
// A work item of a block is a tile of 64 key rows of one batch_head, and the producer copies what that of
// dk_dv_kernel.cuh does. Keys are rows of the transposed scores here, too, but dk and dv of 64 keys together would take
// all registers of a warpgroup. So the owner of dv computes s = k qᵀ, p = exp2(s - lse) and dv += p dout, and hands p
// over to the owner of dk, which computes dp = v doutᵀ, ds = p (dp - delta) and dk += ds q: two MMAs each, and none
// twice. Keys and values are in registers, of 256 columns the first half: shared memory would be busy for longer than
// the tensor cores.
//
// In the step for tile t, the owner of dv issues s of t and then dv += p dout of tile t - 1, under which the
// exponentials of t run. The owner of dk issues dk += ds q of tile t - 1 and then dp of t, and computes ds of t under
// the MMAs of the other: in the opposite order ds would run under dk, but a tile of queries would wait for half a step
// more, and 256 columns leave room for five tiles. At the end of a step no MMA of a warpgroup is in flight, which the
// compiler needs.
//
// Who signals whom: *_full is completed by TMA (one arrival of the producer and the bytes), *_empty by one arrival of
// every consumer warp; those of p: p_exchange.cuh. Items that nobody reads take part in no barrier.
#pragma once

#include <cstdint>

#include "cuda/hopper/bwd/own_keys.cuh"
#include "cuda/hopper/bwd/own_rows.cuh"
#include "cuda/hopper/bwd/p_exchange.cuh"
#include "cuda/hopper/bwd/params.h"
#include "cuda/hopper/bwd/query_producer.cuh"
#include "cuda/hopper/bwd/scores.cuh"
#include "cuda/hopper/bwd/wide_dk_dv_config.h"
#include "cuda/hopper/plan/work_items.cuh"
#include "cuda/hopper/tile/mma.cuh"
#include "cuda/hopper/tile/ring.cuh"
#include "cuda/hopper/tile/run_roles.cuh"
#include "cuda/hopper/tile/store_rows.cuh"
#include "cuda/ptx/elect.cuh"
#include "cuda/ptx/fence.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace mixed_attention::cuda::hopper {

// p has passed through k and v, which TMA is to fill again.
template <typename Config>
__device__ inline void release_keys(WideDkDvSharedStorage<Config>& shared) {
  ptx::fence_async_shared();
  sync_and_release(shared.kv_pipe);
}

// Writes this warp's rows of dk or dv.
template <typename Config, int kCount>
__device__ inline void store_gradient(const DkDvKernelParams& params, const ItemRows& item, int first_row,
                                      float (&gradient)[kCount], void* tensor, const Strides& strides,
                                      int num_columns) {
  using Element = typename Config::Element;
  const int row_begin = item.row_begin + first_row;
  const int num_rows = item.row_end - row_begin;
  if constexpr (Config::kIsMasked) {
    clear_other_keys(gradient, OwnKeys<true>(params, item.batch, row_begin, num_rows));
  }
  Element* target =
      static_cast<Element*>(tensor) + item.batch * strides.batch + row_begin * strides.row + item.head * strides.head;
  store_rows_directly(gradient, target, strides.row, num_rows, num_columns);
}

// An owner's place in the tile of keys, and its rings of queries and output gradients.
template <typename Config>
struct Owner {
  using Operand = ptx::SlabOperand<Config::kRowBytes>;

  int first_row;  // of this warp in the tile
  Operand q_ring, dout_ring;

  __device__ explicit Owner(WideDkDvSharedStorage<Config>& shared)
      : first_row(threadIdx.x / 32 % 4 * kWarpRows),
        q_ring(Operand::make(shared.q, Config::kSlabBytesM)),
        dout_ring(Operand::make(shared.dout, Config::kSlabBytesM)) {}

  __device__ Operand q(RingUse<Config::kStagesQ> use) const {
    return q_ring.advance(use.stage() * Config::kTileBytesM);
  }
  __device__ Operand dout(RingUse<Config::kStagesDout> use) const {
    return dout_ring.advance(use.stage() * Config::kTileBytesM);
  }
};

template <typename Config>
__device__ inline void own_dv(const DkDvKernelParams& params, WideDkDvSharedStorage<Config>& shared) {
  using Element = typename Config::Element;
  using QRing = RingUse<Config::kStagesQ>;
  using DoutRing = RingUse<Config::kStagesDout>;
  const Owner<Config> owner(shared);
  OwnRows<Config, Config::kKeptColumns> k(shared.k, 0);

  uint32_t num_used = 0;  // query tiles, over all items
  uint32_t kv_parity = 0;
  for (ItemWalk<Config::kBlockN, KeyWorkTable> items(params.table); items.next();) {
    const int num_tiles = items.tiles().num_tiles;
    float dv[Config::kHeadDim / 2] = {};

    if (num_tiles > 0) {
      float s[Config::kBlockM / 2];
      uint32_t p_operand[Config::kBlockM / 4];
      const auto issue_scores = [&](QRing q) {
        wait_full(shared.q_pipe, q);
        k.issue_transposed_scores(s, owner.q(q));
      };
      const auto issue_dv = [&](DoutRing dout) {
        wait_full(shared.dout_pipe, dout);
        issue_column_mma<Element>(dv, p_operand, owner.dout(dout));
      };
      // Turns scores into p.
      const auto exponentiate = [&](QRing q) {
        ColumnStats<Config::kBlockM> lse_log2;
        const float* lse_tile = shared.q_stats[q.stage()];
        if (is_marked(lse_tile)) relate_columns(s, lse_tile);
        lse_log2.load(shared.q_stats[q.stage()]);
        scale_columns(s, params.softmax_scale_log2, lse_log2);
        exponentiate_all(s);
        const PRing p{q.count};
        wait_empty(shared.p_pipe, p);
        OwnP(shared, p).store(s);
        sync_and_arrive_as_warp(shared.p_pipe.full[p.stage()]);
        sync_and_release(shared.q_pipe, q);
      };

      // Keys into registers, and p of the first tile
      wait_full(shared.kv_pipe, kv_parity);
      k.load(owner.first_row, params.head_dim);
      sync_and_arrive_as_warp(shared.kv_kept);
      issue_scores(QRing{num_used});
      ptx::wgmma_wait<0>(s);
      ptx::mbarrier_wait(shared.kv_kept, kv_parity);
      kv_parity ^= 1;
      exponentiate(QRing{num_used});
      round_operand<Element>(p_operand, s);

      // s of a tile, and dv of the one before
      for (int tile = 1; tile < num_tiles; ++tile) {
        const DoutRing dout{num_used};
        const QRing q{++num_used};
        issue_scores(q);
        issue_dv(dout);
        ptx::wgmma_wait<1>(s);
        exponentiate(q);
        ptx::wgmma_wait<0>(dv);
        sync_and_release(shared.dout_pipe, dout);
        round_operand<Element>(p_operand, s);
      }

      // dv of the last tile
      release_keys(shared);
      const DoutRing dout{num_used++};
      issue_dv(dout);
      ptx::wgmma_wait<0>(dv);
      sync_and_release(shared.dout_pipe, dout);
    }
    store_gradient<Config>(params, items.rows(), owner.first_row, dv, params.dv, params.dv_strides, params.head_dim_v);
  }
}

template <typename Config>
__device__ inline void own_dk(const DkDvKernelParams& params, WideDkDvSharedStorage<Config>& shared) {
  using Element = typename Config::Element;
  using QRing = RingUse<Config::kStagesQ>;
  using DoutRing = RingUse<Config::kStagesDout>;
  const Owner<Config> owner(shared);
  OwnRows<Config, Config::kKeptColumns> v(shared.v, 0);

  uint32_t num_used = 0;  // query tiles, over all items
  uint32_t kv_parity = 0;
  for (ItemWalk<Config::kBlockN, KeyWorkTable> items(params.table); items.next();) {
    const int num_tiles = items.tiles().num_tiles;
    float dk[Config::kHeadDim / 2] = {};

    if (num_tiles > 0) {
      float dp[Config::kBlockM / 2];
      uint32_t ds_operand[Config::kBlockM / 4];
      const auto issue_dp = [&](DoutRing dout) {
        wait_full(shared.dout_pipe, dout);
        v.issue_transposed_scores(dp, owner.dout(dout));
      };
      const auto issue_dk = [&](QRing q) {
        wait_full(shared.q_pipe, q);
        issue_column_mma<Element>(dk, ds_operand, owner.q(q));
      };
      // Turns dp into the operand of the next MMA.
      const auto differentiate = [&](DoutRing dout) {
        const PRing p{dout.count};
        wait_full(shared.p_pipe, p);
        differentiate_columns(dp, OwnP(shared, p), shared.dout_stats[dout.stage()]);
        sync_and_release(shared.p_pipe, p);
        sync_and_release(shared.dout_pipe, dout);
        round_operand<Element>(ds_operand, dp);
      };

      // Values into registers, and ds of the first tile
      wait_full(shared.kv_pipe, kv_parity);
      kv_parity ^= 1;
      v.load(owner.first_row, params.head_dim_v);
      sync_and_arrive_as_warp(shared.kv_kept);
      issue_dp(DoutRing{num_used});
      ptx::wgmma_wait<0>(dp);
      differentiate(DoutRing{num_used});

      // dk of a tile, and dp of the next
      for (int tile = 1; tile < num_tiles; ++tile) {
        const QRing q{num_used};
        const DoutRing dout{++num_used};
        issue_dk(q);
        issue_dp(dout);
        ptx::wgmma_wait<1>(dk);
        sync_and_release(shared.q_pipe, q);
        ptx::wgmma_wait<0>(dp);
        differentiate(dout);
      }

      // dk of the last tile
      release_keys(shared);
      const QRing q{num_used++};
      issue_dk(q);
      ptx::wgmma_wait<0>(dk);
      sync_and_release(shared.q_pipe, q);
      scale_all(dk, params.softmax_scale);
    }
    store_gradient<Config>(params, items.rows(), owner.first_row, dk, params.dk, params.dk_strides, params.head_dim);
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    hopper_wide_dk_dv_kernel(const __grid_constant__ DkDvKernelParams params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  WideDkDvSharedStorage<Config>& shared = *reinterpret_cast<WideDkDvSharedStorage<Config>*>(memory);

  clear_missing_input_slabs<Config>(params, shared);
  const auto prepare = [&] {
    prefetch_input_maps(params);
    init_input_barriers<Config>(shared, Config::kConsumers * kWarpgroup / 32);
    init_p_barriers(shared);
    ptx::mbarrier_fence_init();
  };
  const auto produce_as_warp = [&](int warp) {
    if (warp == 0 && ptx::elect_one()) produce_queries<Config>(params, shared);
  };
  const auto consume_as = [&](int consumer) {
    if (consumer == 0) {
      own_dv(params, shared);
    } else {
      own_dk(params, shared);
    }
  };
  run_roles<Config>(prepare, produce_as_warp, consume_as);
}

}  // namespace mixed_attention::cuda::hopper
