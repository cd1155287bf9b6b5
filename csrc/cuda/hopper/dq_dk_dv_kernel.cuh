// All gradients of wide heads on Hopper: persistent blocks of one producer and two consumer warpgroups that own dk and
// dv of their keys, and add up dq in global memory in whichever order its parts come.
//
// Items, producer and transposed scores are those of dk_dv_kernel.cuh. dk, dv and two tiles of scores leave no
// registers for a third warpgroup, so that the two compute dqᵀ = kᵀ dsᵀ as well, each half of its rows, which are
// columns of dq. For that they exchange ds through shared memory; what they multiply is that of the tile before, handed
// over long ago, so that they may drift apart by a step, and one's exponentials run under the other's products.
//
// In the step for tile t, dp runs under the exponentials of t, dv += p dout under the gradients of its scores, and
// dk += ds q while ds is handed over, with dq of tile t - 1 behind it. At the end of a step no product is under way,
// which the compiler needs.
//
// Who signals whom: *_full of the inputs is completed by the copy engine (one arrival of the producer and the bytes),
// *_empty by one arrival of every consumer warp; for ds see ds_exchange.cuh. Items that nobody reads take part in no
// barrier.
#pragma once

#include <cstdint>

#include "cuda/hopper/add_sums.cuh"
#include "cuda/hopper/bwd_config.h"
#include "cuda/hopper/bwd_params.h"
#include "cuda/hopper/bwd_scores.cuh"
#include "cuda/hopper/ds_exchange.cuh"
#include "cuda/hopper/own_keys.cuh"
#include "cuda/hopper/products.cuh"
#include "cuda/hopper/query_producer.cuh"
#include "cuda/hopper/ring.cuh"
#include "cuda/hopper/store_rows.cuh"
#include "cuda/ptx/bulk_reduce.cuh"
#include "cuda/ptx/elect.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/setmaxnreg.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace mixed_attention::cuda::hopper {

template <typename Config>
__device__ inline void consume(const DkDvKernelParams& params, DqDkDvSharedStorage<Config>& shared, int consumer) {
  using Element = typename Config::Element;
  using Operand = ptx::SlabOperand<Config::kRowBytes>;
  using QRing = RingUse<Config::kStagesQ>;
  using DoutRing = RingUse<Config::kStagesDout>;
  using DsRing = RingUse<Config::kStagesDs>;
  constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN, kHeadDim = Config::kHeadDim;
  const int thread = threadIdx.x % kWarpgroup;
  const int lane = threadIdx.x % 32;
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32 % 4, 0);
  const int first_row = consumer * kWarpgroupRows + warp * kWarpRows;  // of this warp in the tile
  const int barrier = 1 + consumer;                                    // named barrier of this warpgroup

  const Operand k = Operand::make(shared.k).advance(consumer * kWarpgroupRows * Config::kRowBytes);
  const Operand v = Operand::make(shared.v).advance(consumer * kWarpgroupRows * Config::kRowBytes);
  const Operand k_columns = Operand::make(shared.k).advance(consumer * Config::kSlabBytesN);
  const Operand q_ring = Operand::make(shared.q, Config::kSlabBytesM);
  const Operand dout_ring = Operand::make(shared.dout, Config::kSlabBytesM);
  const ptx::Operand ds_ring = ptx::Operand::make(shared.exchange.ds);
  float* staging = shared.staging[consumer];

  const auto issue_transposed_scores = [&](float (&result)[kBlockM / 2], Operand keys, Operand queries) {
    issue_row_products<Element, kHeadDim, Config::kSlabBytesN, Config::kSlabBytesM>(result, keys, queries);
  };
  const auto issue_dq = [&](float (&result)[kBlockM / 2], DsRing use) {
    issue_transposed_products<Element, kBlockN>(result, k_columns, ds_ring.advance(use.stage() * Config::kScoreBytes));
  };
  const auto wait_for_ds = [&](DsRing use) {
    ptx::mbarrier_wait(shared.exchange.ds_full[use.stage()], use.full_parity());
  };
  const auto release = [&](ptx::Mbarrier& empty) {
    if (lane == 0) ptx::mbarrier_arrive(empty);
  };

  uint32_t num_used = 0;  // query tiles, over all items
  uint32_t kv_parity = 0;
  for (KeyItems<Config> item(params.table); item.next();) {
    const int num_tiles = item.tiles().num_tiles;
    const int row_begin = item.row_begin + first_row;
    const int num_rows = item.tiles().row_end - row_begin;
    const OwnKeys<Config::kIsMasked> own_keys(params, item.batch, row_begin, num_rows);
    float dk[kHeadDim / 2] = {}, dv[kHeadDim / 2] = {};

    if (num_tiles > 0) {
      const int64_t first_tile = (int64_t{item.batch} * params.table.num_heads + item.head) * params.stats.num_tiles;
      QueryTileIterator queries(params.table, item.tiles(), 0);
      const auto add_dq = [&](const float (&dq)[kBlockM / 2]) {
        add_sums<1>(staging, dq, barrier, [&] {
          return params.dq_sums.sums + (first_tile + queries.next().index) * Config::kDqTileFloats +
                 consumer * Config::kDqPartFloats;
        });
      };
      ptx::mbarrier_wait(shared.kv_full, kv_parity);
      kv_parity ^= 1;

      // The first step's dq is not used: a product that is issued in some steps only would make the compiler wait for
      // each.
      for (int tile = 0; tile < num_tiles; ++tile, ++num_used) {
        const QRing q{num_used};
        const DoutRing dout{num_used};
        const DsRing previous{num_used - (tile > 0)};
        const Operand q_tile = q_ring.advance(q.stage() * Config::kTileBytesM);
        const Operand dout_tile = dout_ring.advance(dout.stage() * Config::kTileBytesM);
        float s[kBlockM / 2], dp[kBlockM / 2], dq[kBlockM / 2];
        uint32_t p_operand[kBlockM / 4], ds_operand[kBlockM / 4];

        ptx::mbarrier_wait(shared.q_full[q.stage()], q.full_parity());
        issue_transposed_scores(s, k, q_tile);
        ptx::mbarrier_wait(shared.dout_full[dout.stage()], dout.full_parity());
        issue_transposed_scores(dp, v, dout_tile);
        ptx::wgmma_wait<1>(s);

        weigh_columns(s, params.softmax_scale_log2, shared.lse_log2[q.stage()]);
        round_operand<Element>(p_operand, s);
        issue_column_products<Element>(dv, p_operand, dout_tile);
        ptx::wgmma_wait<1>(dp);

        differentiate_columns(dp, s, shared.delta[dout.stage()]);
        ptx::wgmma_wait<0>(dv);
        release(shared.dout_empty[dout.stage()]);
        round_operand<Element>(ds_operand, dp);
        issue_column_products<Element>(dk, ds_operand, q_tile);
        hand_over(shared.exchange, num_used, ds_operand, first_row, own_keys);
        if (tile > 0) wait_for_ds(previous);
        issue_dq(dq, previous);
        ptx::wgmma_wait<1>(dk);
        release(shared.q_empty[q.stage()]);
        ptx::wgmma_wait<0>(dq);
        if (tile > 0) {
          release(shared.exchange.ds_empty[previous.stage()]);
          add_dq(dq);
        }
      }

      const DsRing last{num_used - 1};
      float dq[kBlockM / 2];
      wait_for_ds(last);
      issue_dq(dq, last);
      ptx::wgmma_wait<0>(dq);
      release(shared.kv_empty);
      release(shared.exchange.ds_empty[last.stage()]);
      add_dq(dq);
      scale_all(dk, params.softmax_scale);
      // The results leave where dq did.
      if (thread == 0) ptx::bulk_wait_read<0>();
      ptx::named_barrier_sync(barrier, kWarpgroup);
    }

    const auto store = [&](float (&grad)[kHeadDim / 2], void* tensor, const Strides& strides) {
      if constexpr (Config::kIsMasked) clear_other_keys(grad, own_keys);
      Element* target = static_cast<Element*>(tensor) + item.batch * strides.batch + row_begin * strides.row +
                        item.head * strides.head;
      store_rows<Element, kHeadDim>(reinterpret_cast<Element*>(staging) + warp * kWarpRows * kHeadDim, grad, target,
                                    strides.row, num_rows, params.head_dim);
    };
    store(dv, params.dv, params.dv_strides);
    store(dk, params.dk, params.dk_strides);
  }
  if (thread == 0) ptx::bulk_wait<0>();
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    hopper_dq_dk_dv_kernel(const __grid_constant__ DkDvKernelParams params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  DqDkDvSharedStorage<Config>& shared = *reinterpret_cast<DqDkDvSharedStorage<Config>*>(memory);

  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = Config::kConsumers * kWarpgroup / 32;
    prefetch_input_maps(params);
    init_input_barriers<Config>(shared, kConsumerWarps);
    init_barriers(shared.exchange, kConsumerWarps);
    ptx::mbarrier_fence_init();
  }
  __syncthreads();

  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / kWarpgroup, 0);
  if (warpgroup == 0) {
    ptx::release_registers<Config::kProducerRegisters>();
    if (threadIdx.x / 32 == 0 && ptx::elect_one()) produce_queries<Config>(params, shared);
  } else {
    ptx::acquire_registers<Config::kConsumerRegisters>();
    consume(params, shared, warpgroup - 1);
  }
}

}  // namespace mixed_attention::cuda::hopper
