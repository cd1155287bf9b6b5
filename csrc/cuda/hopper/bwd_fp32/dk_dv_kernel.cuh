// Gradients of keys and values on Hopper in fp32, from MMAs of fp16 limbs: persistent blocks of one producer and two
// consumer warpgroups that own what they write. Gradients of queries are another kernel's (dq_kernel.cuh).
//
// A work item of a block is a tile of kBlockN key rows of one batch_head. The producer, a single thread, copies its
// keys and values and then, tile by tile, the queries that read them, with their output gradients and what else is
// known of them. Each consumer owns 64 of the key rows and goes through the transposed scores, in which keys are rows:
// s = k qᵀ, p = exp2(s - lse), dv += p dout, dp = v doutᵀ, ds = p (dp - delta), dk += ds q. As rows of s are rows of dk
// and dv, p and ds are operands of their MMAs as they come out, but for being split into limbs.
//
// Tensor cores cut sums off: each MMA for dv or dk starts a sum of its own, which is added up here, where additions
// round. The two take turns in one set of registers. Rows of a factor have row_scales of their own: those of q and dout
// are multiplied into ds and p, over whose columns the MMAs sum.
//
// In the step for tile t, p and its limbs are computed under dp, ds under p dout, the limbs of ds under s of tile t +
// 1. At the end of a step no MMA is in flight, which the compiler needs.
//
// Who signals whom: *_full is completed by TMA (one arrival of the producer and the bytes), *_empty by one arrival of
// every consumer warp. Items that nobody reads take part in no barrier.
#pragma once

#include <cstdint>

#include "cuda/hopper/bwd/query_producer.cuh"
#include "cuda/hopper/bwd/rare_items.cuh"
#include "cuda/hopper/bwd/scores.cuh"
#include "cuda/hopper/bwd_fp32/config.h"
#include "cuda/hopper/bwd_fp32/scores.cuh"
#include "cuda/hopper/plan/work_items.cuh"
#include "cuda/hopper/split_fp16/half_mma.cuh"
#include "cuda/hopper/split_fp16/row_scales.cuh"
#include "cuda/hopper/tile/fragment_values.cuh"
#include "cuda/hopper/tile/ring.cuh"
#include "cuda/hopper/tile/run_roles.cuh"
#include "cuda/hopper/tile/store_rows.cuh"
#include "cuda/ptx/elect.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace mixed_attention::cuda::hopper {

// True if this thread sees a query with a reference; each of a warpgroup's threads looks at some of the tiles.
__device__ inline bool sees_reference(const DoutNumbers* tiles, int num_tiles) {
  bool has_one = false;
#pragma unroll 4
  for (int tile = threadIdx.x % kWarpgroup; tile < num_tiles; tile += kWarpgroup) {
    has_one |= tiles[tile].has_reference != 0;
  }
  return has_one;
}

template <typename Config>
__device__ inline void consume(const Fp32DkDvKernelParams& params, Fp32DkDvSharedStorage<Config>& shared,
                               int consumer) {
  using Ring = RingUse<Config::kStages>;
  constexpr int kBlockM = Config::kBlockM, kHeadDim = Config::kHeadDim;
  const int lane = threadIdx.x % 32;
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32 % 4, 0);
  const int first_row = consumer * kWarpgroupRows + warp * kWarpRows;  // of this warp in the tile

  const ptx::Operand k = ptx::Operand::make(shared.k).advance(consumer * kWarpgroupRows * kRowBytes);
  const ptx::Operand v = ptx::Operand::make(shared.v).advance(consumer * kWarpgroupRows * kRowBytes);
  const ptx::Operand q_ring = ptx::Operand::make(shared.q);
  const ptx::Operand dout_ring = ptx::Operand::make(shared.dout);

  const auto tile_of = [](ptx::Operand ring, Ring use) { return ring.advance(use.stage() * Config::kTileBytesM); };
  const auto issue_transposed_scores = [](float (&result)[kBlockM / 2], ptx::Operand keys, ptx::Operand queries) {
    issue_half_row_mma<Config::kLimbs, Config::kLimbBytesN, Config::kLimbBytesM>(result, keys, queries);
  };

  Ring use{0};  // of query tiles, over all items
  uint32_t kv_parity = 0;
  for (KeyItems<Config> item(params.table); item.next();) {
    const int num_tiles = item.tiles().num_tiles;
    const int row_begin = item.row_begin + first_row;
    const int num_rows = item.tiles().row_end - row_begin;
    float dk[kHeadDim / 2] = {}, dv[kHeadDim / 2] = {};

    if (num_tiles > 0) {
      // row_scales of the thread's two rows
      const auto own_row_scales = [&](const float* scales, int batch_step) {
        const float* row_scales =
            row_scales_of_head(scales, item, batch_step, params.table.num_heads, params.inputs.seqlen_k);
        RowNumbers own{};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = lane / 4 + 8 * i;
          if (row < num_rows) own.of_row[i] = row_scales[row_begin + row];
        }
        return own;
      };
      RowNumbers k_scales = own_row_scales(params.inputs.k_scales, params.k_batch_step);
      const RowNumbers v_scales = own_row_scales(params.inputs.v_scales, params.v_batch_step);
      scale_all(k_scales.of_row, params.softmax_scale_log2);

      float s[kBlockM / 2], dp[kBlockM / 2], sum[kHeadDim / 2] = {};
      HalfOperand<Config::kLimbs, kBlockM / 4> operand;
      RowLift lift{};
      const int64_t batch_head = int64_t{item.batch} * params.table.num_heads + item.head;
      bool is_rare = sees_reference(params.stats.dout + batch_head * params.stats.num_tiles, params.stats.num_tiles);
      // Keys and values of the item
      wait_full(shared.kv_pipe, kv_parity);
      kv_parity ^= 1;
      // Infinities are in the last limb.
      const __half* k_rows = shared.k + ((Config::kLimbs - 1) * Config::kBlockN + first_row) * kHeadDim;
      is_rare = is_rare_item(consumer, sees_infinity<__half, kRowBytes>(k_rows) || is_rare);
      // Scores of the first tile
      wait_full(shared.q_pipe, use);
      issue_transposed_scores(s, k, tile_of(q_ring, use));
      ptx::wgmma_wait<0>(s);

      // The first step adds zeros to dk, the last one's scores of a next tile are not used: an MMA that is issued in
      // some steps only would make the compiler wait for each. kRelates: whether scores may have to, for which the
      // others' steps shall not wait.
      const auto go_through_tiles = [&]<bool kRelates>() {
        for (int tile = 0; tile < num_tiles; ++tile) {
          const Ring next{use.count + (tile + 1 < num_tiles)};
          const int stage = use.stage();
          // NOTE: ptxas would hold the 16 descriptors of keys and values through the loop, and spill others for them.
          // It computes them in each step if they may differ.
          const auto anew = [&](ptx::Operand operand) { return ptx::Operand{operand.low + (use.count >> 31)}; };
          const ptx::Operand q_tile = tile_of(q_ring, use), dout_tile = tile_of(dout_ring, use);
          const ColumnNumbers lse_log2(shared.q_stats[stage].lse_log2), q_scales(shared.q_stats[stage].row_scales);
          const ColumnNumbers delta(shared.dout_stats[stage].delta), dout_factors(shared.dout_stats[stage].factors);

          wait_full(shared.dout_pipe, use);
          issue_transposed_scores(dp, anew(v), dout_tile);
          add_rows(dk, sum, lift.inverse);
          if constexpr (kRelates) {
            if (const RowReference* own = shared.dout_stats[stage].references) {
              relate(
                  s, [&](int i) { return own[8 * (i / 4) + 2 * (lane % 4) + i % 2]; }, q_scales, k_scales,
                  params.softmax_scale_log2);
            }
          }
          // p, and dv of this tile
          exponentiate(s, q_scales, k_scales, lse_log2);
          split_operand(operand, s, dout_factors);
          issue_half_column_mma<Config::kLimbBytesM>(sum, operand, dout_tile);
          ptx::wgmma_wait<1>(dp);

          // ds under the MMA of dv
          const float dout_scale = shared.dout_stats[stage].row_scale;
          const RowNumbers dp_scales{{v_scales.of_row[0] * dout_scale, v_scales.of_row[1] * dout_scale}};
          differentiate(dp, s, dp_scales, dout_factors, delta, q_scales);
          wait_full(shared.q_pipe, next);
          issue_transposed_scores(s, anew(k), tile_of(q_ring, next));
          ptx::wgmma_wait<1>(sum);
          release(shared.dout_pipe, use);
          add_rows(dv, sum, {{dout_scale, dout_scale}});

          // dk of this tile, to be added in the next step
          lift = RowLift::of(dp);
          split_operand(operand, dp, lift.factor);
          issue_half_column_mma<Config::kLimbBytesM>(sum, operand, q_tile);
          ptx::wgmma_wait<0>(s, sum);
          release(shared.q_pipe, use);
          ++use.count;
        }
      };
      if (is_rare) {
        go_through_tiles.template operator()<true>();
      } else {
        go_through_tiles.template operator()<false>();
      }

      release(shared.kv_pipe);
      add_rows(dk, sum, lift.inverse);
      scale_all(dk, params.softmax_scale);
    }

    // Stores of dv and dk
    const auto store = [&](const float (&gradient)[kHeadDim / 2], void* tensor, const Strides& strides,
                           int num_columns) {
      float* target =
          static_cast<float*>(tensor) + item.batch * strides.batch + row_begin * strides.row + item.head * strides.head;
      store_rows_directly(gradient, target, strides.row, num_rows, num_columns);
    };
    store(dv, params.dv, params.dv_strides, params.head_dim_v);
    store(dk, params.dk, params.dk_strides, params.head_dim);
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    hopper_fp32_dk_dv_kernel(const __grid_constant__ Fp32DkDvKernelParams params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  Fp32DkDvSharedStorage<Config>& shared = *reinterpret_cast<Fp32DkDvSharedStorage<Config>*>(memory);

  clear_missing_input_slabs<Config>(params, shared);
  const auto prepare = [&] {
    prefetch_input_maps(params);
    init_input_barriers<Config>(shared, Config::kConsumers * kWarpgroup / 32);
    ptx::mbarrier_fence_init();
  };
  const auto produce_as_warp = [&](int warp) {
    if (warp == 0 && ptx::elect_one()) produce_queries<Config>(params, shared);
  };
  run_roles<Config>(prepare, produce_as_warp, [&](int consumer) { consume(params, shared, consumer); });
}

}  // namespace mixed_attention::cuda::hopper
