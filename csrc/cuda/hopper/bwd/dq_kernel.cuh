// Gradients of queries on Hopper: persistent blocks of one producer and two consumer warpgroups that own what they
// write, so that nothing is added atomically.
//
// A work item of a block is a tile of kBlockM query rows of one batch_head. The producer, a single thread, copies its
// queries and output gradients and then its key and value tiles into rings of kStages buffers. Each consumer owns 64 of
// the rows and computes, tile by tile, s = q kᵀ, p = exp2(s - lse), dp = dout vᵀ, ds = p (dp - delta) and dq += ds k.
//
// dq += ds k of tile j - 1 is issued together with s of tile j, and the exponentials of j run under dp of j. At the end
// of a step no MMA is in flight, which the compiler needs.
//
// Who signals whom: *_full is completed by TMA (one arrival of the producer and the bytes; under a mask k_full also by
// one of the thread that brings its bits), *_empty by one arrival of every consumer warp. Items without keys take part
// in no barrier.
#pragma once

#include <cstdint>
#include <numbers>

#include "cuda/hopper/bwd/config.h"
#include "cuda/hopper/bwd/key_producer.cuh"
#include "cuda/hopper/bwd/params.h"
#include "cuda/hopper/bwd/scores.cuh"
#include "cuda/hopper/mask/key_bits.cuh"
#include "cuda/hopper/plan/work_items.cuh"
#include "cuda/hopper/tile/mma.cuh"
#include "cuda/hopper/tile/ring.cuh"
#include "cuda/hopper/tile/run_roles.cuh"
#include "cuda/hopper/tile/store_rows.cuh"
#include "cuda/ptx/elect.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace mixed_attention::cuda::hopper {

// Under a mask a second thread follows the first and brings the bits of the key tiles.
template <typename Config>
__device__ inline void produce_key_bits(const DqKernelParams& params, DqSharedStorage<Config>& shared) {
  RingUse<Config::kStagesK> use{0};
  for (QueryItems<Config> item(params.table); item.next();) {
    const int num_tiles = item.tiles().num_tiles;
    if (num_tiles == 0) continue;

    const uint32_t* key_mask_bits = params.key_mask_bits + int64_t{item.batch} * params.key_mask_step;
    KeyTileIterator<Config::kBlockN> keys(item);
    for (int i = 0; i < num_tiles; ++i, ++use.count) {
      wait_empty(shared.k_pipe, use);
      gather_key_bits(shared.key_bits[use.stage()], key_mask_bits, keys.next());
      ptx::mbarrier_arrive(shared.k_pipe.full[use.stage()]);
    }
  }
}

template <typename Config>
__device__ inline void consume(const DqKernelParams& params, DqSharedStorage<Config>& shared, int consumer) {
  using Element = typename Config::Element;
  using Operand = ptx::SlabOperand<Config::kRowBytes>;
  using KRing = RingUse<Config::kStagesK>;
  using VRing = RingUse<Config::kStagesV>;
  constexpr int kBlockN = Config::kBlockN, kHeadDim = Config::kHeadDim;
  const int lane = threadIdx.x % 32;
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32 % 4, 0);
  const int first_row = consumer * kWarpgroupRows + warp * kWarpRows;  // of this warp in the tile

  // Operands and rings
  const Operand q = Operand::make(shared.q).advance(consumer * kWarpgroupRows * Config::kRowBytes);
  const Operand dout = Operand::make(shared.dout).advance(consumer * kWarpgroupRows * Config::kRowBytes);
  const Operand k_ring = Operand::make(shared.k, Config::kSlabBytesN);
  const Operand v_ring = Operand::make(shared.v, Config::kSlabBytesN);

  const auto tile_of = [](Operand ring, auto use) { return ring.advance(use.stage() * Config::kTileBytesN); };
  // NOTE: ptxas would hold the descriptors of wide rows of queries and output gradients through the loop, and spill. It
  // computes them in each step if they may differ.
  const auto issue_scores = [&](float (&result)[kBlockN / 2], Operand queries, Operand keys, uint32_t count) {
    if constexpr (is_wide(kHeadDim)) queries.low += count >> 31;
    issue_row_mma<Element, kHeadDim, Config::kSlabBytesM, Config::kSlabBytesN>(result, queries, keys);
  };

  uint32_t num_used = 0;  // key tiles, over all items
  uint32_t q_parity = 0;
  for (QueryItems<Config> item(params.table); item.next();) {
    const int num_tiles = item.tiles().num_tiles;
    const int row_begin = item.row_begin + first_row;
    const int num_rows = item.tiles().row_end - row_begin;
    float dq[kHeadDim / 2] = {};

    if (num_tiles > 0) {
      // Statistics of the thread's two rows
      float lse_log2[2] = {}, delta[2] = {};
      bool has_reference = false;
      const int64_t stats = (int64_t{item.batch} * params.table.num_heads + item.head) * params.seqlen_q + row_begin;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = lane / 4 + 8 * i;
        if (row < num_rows) {
          lse_log2[i] = params.lse[stats + row] * std::numbers::log2e_v<float>;
          if (needs_reference(lse_log2[i])) {
            has_reference = true;
            lse_log2[i] = params.references[stats + row].sum_log2;
          }
          // p is 0 in a row that sees no key: exp2(-inf - inf).
          if (lse_log2[i] == -INFINITY) lse_log2[i] = INFINITY;
          delta[i] = params.delta[stats + row];
        }
      }
      has_reference = __any_sync(0xffffffff, has_reference);

      float s[kBlockN / 2], dp[kBlockN / 2];
      uint32_t ds_operand[kBlockN / 4];
      // From scores in flight to the operand of the next MMA.
      const auto differentiate = [&](int tile, KRing k) {
        const VRing v{k.count};
        wait_full(shared.v_pipe, v);
        issue_scores(dp, dout, tile_of(v_ring, v), v.count);
        ptx::wgmma_wait<1>(s);
        if constexpr (Config::kIsMasked) {
          mask_keys(s, shared.key_bits[k.stage()]);
        } else if (tile < item.tiles().num_partial) {
          mask_columns(s, item.ranges()[tile].tail);
        }
        if (has_reference) relate_rows(s, params.references + stats + lane / 4);
        exponentiate_rows(s, params.softmax_scale_log2, lse_log2);
        hold_p(s, ptx::shared_address(&shared));
        ptx::wgmma_wait<0>(dp);
        release(shared.v_pipe, v);
        differentiate_rows(dp, s, delta);
        round_operand<Element>(ds_operand, dp);
      };

      // The first tile has no older MMA to run beside.
      KRing k{num_used};
      wait_full(shared.q_pipe, q_parity);
      q_parity ^= 1;
      wait_full(shared.k_pipe, k);
      issue_scores(s, q, tile_of(k_ring, k), k.count);
      differentiate(0, k);

      // dq of a tile, and s of the next
      for (int tile = 1; tile < num_tiles; ++tile) {
        const KRing previous = k;
        k = KRing{++num_used};
        issue_column_mma<Element>(dq, ds_operand, tile_of(k_ring, previous));
        wait_full(shared.k_pipe, k);
        issue_scores(s, q, tile_of(k_ring, k), k.count);
        ptx::wgmma_wait<1>(dq);
        release(shared.k_pipe, previous);
        differentiate(tile, k);
      }

      // dq of the last tile
      release(shared.q_pipe);
      issue_column_mma<Element>(dq, ds_operand, tile_of(k_ring, k));
      ptx::wgmma_wait<0>(dq);
      release(shared.k_pipe, k);
      ++num_used;
      scale_all(dq, params.softmax_scale);
    }

    // Store of dq
    Element* target = static_cast<Element*>(params.dq) + item.batch * params.dq_strides.batch +
                      row_begin * params.dq_strides.row + item.head * params.dq_strides.head;
    if constexpr (Config::kIsStaged) {
      store_rows<Element, kHeadDim>(shared.staging.rows[consumer * kWarpgroup / 32 + warp], dq, target,
                                    params.dq_strides.row, num_rows, params.head_dim);
    } else {
      store_rows_directly(dq, target, params.dq_strides.row, num_rows, params.head_dim);
    }
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1) hopper_dq_kernel(const __grid_constant__ DqKernelParams params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  DqSharedStorage<Config>& shared = *reinterpret_cast<DqSharedStorage<Config>*>(memory);

  clear_missing_input_slabs<Config>(params, shared);
  const auto prepare = [&] {
    prefetch_input_maps(params);
    init_key_barriers<Config>(shared, Config::kIsMasked ? 2 : 1);
  };
  const auto produce_as_warp = [&](int warp) {
    if (warp == 0 && ptx::elect_one()) {
      produce_keys<Config>(params, shared);
    } else if (Config::kIsMasked && warp == 1 && ptx::elect_one()) {
      produce_key_bits(params, shared);
    }
  };
  run_roles<Config>(prepare, produce_as_warp, [&](int consumer) { consume(params, shared, consumer); });
}

}  // namespace mixed_attention::cuda::hopper
