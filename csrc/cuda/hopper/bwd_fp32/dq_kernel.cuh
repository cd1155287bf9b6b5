// Gradients of queries on Hopper in fp32, from MMAs of fp16 limbs: persistent blocks of two producers and two consumer
// warpgroups that own what they write.
//
// A work item of a block is a tile of kBlockM query rows of one batch_head. One producer, a single thread, copies its
// queries and output gradients and then its key and value tiles into rings of kStages buffers; the other one, a warp,
// brings the row_scales of these tiles' rows, which lie at any address. Each consumer owns 64 of the query rows and
// computes, tile by tile, s = q kᵀ, p = exp2(s - lse), dp = dout vᵀ, ds = p (dp - delta) and dq += ds k.
//
// Tensor cores cut sums off: each MMA for dq starts a sum of its own, which is added up here, where additions round.
// Rows of a factor have row_scales of their own: those of k are multiplied into ds, over whose columns dq sums.
//
// In the step for tile j, p is computed under dp, the limbs of ds under s of tile j + 1. At the end of a step no MMA is
// in flight, which the compiler needs.
//
// Who signals whom: *_full is completed by TMA (one arrival of its producer and the bytes; k_full also by one of the
// other producer), *_empty by one arrival of every consumer warp. Items without keys take part in no barrier.
#pragma once

#include <cstdint>
#include <numbers>

#include "cuda/hopper/bwd/key_producer.cuh"
#include "cuda/hopper/bwd/scores.cuh"
#include "cuda/hopper/bwd_fp32/config.h"
#include "cuda/hopper/bwd_fp32/scores.cuh"
#include "cuda/hopper/fwd/softmax.cuh"
#include "cuda/hopper/plan/work_items.cuh"
#include "cuda/hopper/split_fp16/half_mma.cuh"
#include "cuda/hopper/split_fp16/row_scales.cuh"
#include "cuda/hopper/tile/fragment_values.cuh"
#include "cuda/hopper/tile/named_barriers.h"
#include "cuda/hopper/tile/ring.cuh"
#include "cuda/hopper/tile/run_roles.cuh"
#include "cuda/hopper/tile/store_rows.cuh"
#include "cuda/ptx/elect.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace mixed_attention::cuda::hopper {

// Past the end of a tile the row_scales of keys are one, as scores there become -inf, and those of values zero.
template <typename Config>
__device__ inline void produce_row_scales(const Fp32DqKernelParams& params, Fp32DqSharedStorage<Config>& shared) {
  constexpr int kBlockN = Config::kBlockN;
  const int lane = threadIdx.x % 32;
  RingUse<Config::kStages> use{0};  // of key tiles, over all items
  for (QueryItems<Config> item(params.table); item.next();) {
    const int num_tiles = item.tiles().num_tiles;
    if (num_tiles == 0) continue;

    const auto row_scales_of = [&](const float* scales, int batch_step) {
      return row_scales_of_head(scales, item, batch_step, params.table.num_heads, params.inputs.seqlen_k);
    };
    const float* k_scales = row_scales_of(params.inputs.k_scales, params.k_batch_step);
    const float* v_scales = row_scales_of(params.inputs.v_scales, params.v_batch_step);
    KeyTileIterator<kBlockN> keys(item);
    for (int i = 0; i < num_tiles; ++i, ++use.count) {
      const KeyTile tile = keys.next();
      const int stage = use.stage();
      wait_empty(shared.k_pipe, use);
#pragma unroll
      for (int column = lane; column < kBlockN; column += 32) {
        const bool exists = column < tile.num_rows;
        shared.k_scales[stage][column] = exists ? k_scales[tile.row_begin + column] : 1;
        shared.v_scales[stage][column] = exists ? v_scales[tile.row_begin + column] : 0;
      }
      sync_and_arrive_as_warp(shared.k_pipe.full[stage]);
    }
  }
}

template <typename Config>
__device__ inline void consume(const Fp32DqKernelParams& params, Fp32DqSharedStorage<Config>& shared, int consumer) {
  using Ring = RingUse<Config::kStages>;
  constexpr int kBlockN = Config::kBlockN, kHeadDim = Config::kHeadDim;
  const int lane = threadIdx.x % 32;
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32 % 4, 0);
  const int first_row = consumer * kWarpgroupRows + warp * kWarpRows;  // of this warp in the tile

  const ptx::Operand q = ptx::Operand::make(shared.q).advance(consumer * kWarpgroupRows * kRowBytes);
  const ptx::Operand dout = ptx::Operand::make(shared.dout).advance(consumer * kWarpgroupRows * kRowBytes);
  const ptx::Operand k_ring = ptx::Operand::make(shared.k);
  const ptx::Operand v_ring = ptx::Operand::make(shared.v);

  const auto tile_of = [](ptx::Operand ring, Ring use) { return ring.advance(use.stage() * Config::kTileBytesN); };
  const auto issue_scores = [](float (&result)[kBlockN / 2], ptx::Operand queries, ptx::Operand keys) {
    issue_half_row_mma<Config::kLimbs, Config::kLimbBytesM, Config::kLimbBytesN>(result, queries, keys);
  };

  Ring use{0};  // of key tiles, over all items
  uint32_t q_parity = 0;
  for (QueryItems<Config> item(params.table); item.next();) {
    const int num_tiles = item.tiles().num_tiles;
    const int row_begin = item.row_begin + first_row;
    const int num_rows = item.tiles().row_end - row_begin;
    float dq[kHeadDim / 2] = {};

    if (num_tiles > 0) {
      // Statistics and row_scales of the thread's two rows
      RowNumbers lse_log2{}, delta{}, q_scales{}, dout_scales{};
      bool has_reference[2] = {};
      const int64_t stats = (int64_t{item.batch} * params.table.num_heads + item.head) * params.seqlen_q;
      const auto row_scales_of = [&](const float* scales, int batch_step) {
        return row_scales_of_head(scales, item, batch_step, params.table.num_heads, params.seqlen_q);
      };
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = row_begin + lane / 4 + 8 * i;
        if (row < item.tiles().row_end) {
          const float lse = params.lse[stats + row];
          // +inf makes p zero in a row whose scores are all -inf.
          lse_log2.of_row[i] = lse == -INFINITY ? INFINITY : lse * std::numbers::log2e_v<float>;
          if (lse != -INFINITY && needs_reference(lse_log2.of_row[i])) {
            has_reference[i] = true;
            lse_log2.of_row[i] = params.references[stats + row].sum_log2;
          }
          delta.of_row[i] = params.delta[stats + row];
          q_scales.of_row[i] =
              row_scales_of(params.inputs.q_scales, params.q_batch_step)[row] * params.softmax_scale_log2;
          dout_scales.of_row[i] = row_scales_of(params.inputs.dout_scales, params.dout_batch_step)[row];
        }
      }
      // A warpgroup multiplies together.
      const bool relates =
          ptx::named_barrier_any(kRelatesBarrier + consumer, kWarpgroup, has_reference[0] || has_reference[1]);

      float s[kBlockN / 2], dp[kBlockN / 2], sum[kHeadDim / 2] = {};
      HalfOperand<Config::kLimbs, kBlockN / 4> operand;
      RowLift lift{};
      // Scores of the first tile
      wait_full(shared.q_pipe, q_parity);
      q_parity ^= 1;
      wait_full(shared.k_pipe, use);
      issue_scores(s, q, tile_of(k_ring, use));
      ptx::wgmma_wait<0>(s);

      // The first step adds zeros to dq, the last one's scores of a next tile are not used: an MMA that is issued in
      // some steps only would make the compiler wait for each. kRelates: whether a query may have a reference.
      const auto go_through_tiles = [&]<bool kRelates>() {
        for (int tile = 0; tile < num_tiles; ++tile) {
          const Ring next{use.count + (tile + 1 < num_tiles)};
          const int stage = use.stage();
          const ColumnNumbers k_scales(shared.k_scales[stage]), v_scales(shared.v_scales[stage]);

          wait_full(shared.v_pipe, use);
          issue_scores(dp, dout, tile_of(v_ring, use));
          add_rows(dq, sum, lift.inverse);
          if (tile < item.tiles().num_partial) {
            mask_columns(s, item.ranges()[tile].tail);
          }
          if constexpr (kRelates) {
            const RowReference* own = params.references + stats + row_begin + lane / 4;
            const auto reference_of = [&](int i) {
              return has_reference[row_of(i)] ? own[8 * row_of(i)] : RowReference{0, -INFINITY, 0};
            };
            relate(s, reference_of, k_scales, q_scales, params.softmax_scale_log2);
          }
          // p under dp
          exponentiate(s, k_scales, q_scales, lse_log2);
          hold_p(s, ptx::shared_address(&shared.q_pipe));
          ptx::wgmma_wait<0>(dp);
          release(shared.v_pipe, use);

          // ds, and s of the next tile
          differentiate(dp, s, dout_scales, v_scales, delta, k_scales);
          wait_full(shared.k_pipe, next);
          issue_scores(s, q, tile_of(k_ring, next));
          // dq of this tile, to be added in the next step
          lift = RowLift::of(dp);
          split_operand(operand, dp, lift.factor);
          issue_half_column_mma<Config::kLimbBytesN>(sum, operand, tile_of(k_ring, use));
          ptx::wgmma_wait<0>(s, sum);
          release(shared.k_pipe, use);
          ++use.count;
        }
      };
      if (relates) {
        go_through_tiles.template operator()<true>();
      } else {
        go_through_tiles.template operator()<false>();
      }

      release(shared.q_pipe);
      add_rows(dq, sum, lift.inverse);
      scale_all(dq, params.softmax_scale);
    }

    // Store of dq
    float* target = static_cast<float*>(params.dq) + item.batch * params.dq_strides.batch +
                    row_begin * params.dq_strides.row + item.head * params.dq_strides.head;
    store_rows_directly(dq, target, params.dq_strides.row, num_rows, params.head_dim);
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    hopper_fp32_dq_kernel(const __grid_constant__ Fp32DqKernelParams params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  Fp32DqSharedStorage<Config>& shared = *reinterpret_cast<Fp32DqSharedStorage<Config>*>(memory);

  clear_missing_input_slabs<Config>(params, shared);
  const auto prepare = [&] {
    prefetch_input_maps(params);
    init_key_barriers<Config>(shared, 2);
  };
  const auto produce_as_warp = [&](int warp) {
    if (warp == 0 && ptx::elect_one()) {
      produce_keys<Config>(params, shared);
    } else if (warp == 1) {
      produce_row_scales(params, shared);
    }
  };
  run_roles<Config>(prepare, produce_as_warp, [&](int consumer) { consume(params, shared, consumer); });
}

}  // namespace mixed_attention::cuda::hopper
