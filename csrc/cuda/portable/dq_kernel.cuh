// dq: a thread block owns queries and streams keys.
#pragma once

#include "cuda/portable/block_context.cuh"
#include "cuda/portable/bwd_arguments.cuh"
#include "cuda/portable/config.h"
#include "cuda/portable/scores.cuh"
#include "cuda/portable/store_grad.cuh"
#include "cuda/portable/tensor_core.cuh"

namespace mixed_attention::cuda::portable {

template <Arithmetic kArithmetic, int kHeadDim>
struct DqShared {
  static constexpr Tile kTile = dq_tile(kArithmetic, kHeadDim);
  using Element = typename MmaOf<kArithmetic>::Element;

  SharedTile<Element, kTile.rows, kHeadDim> q, dout;  // q: and dq, at the end
  SharedTile<Element, kTile.block_rows, kHeadDim> k[kTile.stages], v[kTile.stages];
};

template <Arithmetic kArithmetic, int kHeadDim>
__global__ void __launch_bounds__(dq_tile(kArithmetic, kHeadDim).num_threads(), dq_tile(kArithmetic, kHeadDim).blocks)
    portable_dq_kernel(const __grid_constant__ BwdArguments args, const __grid_constant__ InlineWork in_parameters) {
  using Mma = MmaOf<kArithmetic>;
  using Shared = DqShared<kArithmetic, kHeadDim>;
  using Element = typename Mma::Element;
  constexpr Tile kTile = Shared::kTile;
  constexpr int kThreads = kTile.num_threads(), kTilesM = kTile.warp_rows / 16, kTilesN = kTile.block_rows / 8;
  extern __shared__ __align__(16) char shared_memory[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory);

  // Who we are
  const BwdParams& params = args.params;
  const BlockContext<Element, BwdArguments> context(args, in_parameters, kTile.rows);
  const WorkItem& item = context.item;
  const auto k = context.rows(params.k, params.k_strides, params.head_dim);
  const auto v = context.rows(params.v, params.v_strides, params.head_dim_v);
  const bool* mask = context.mask();
  const int64_t batch_head = context.batch_head();
  const int warp_row = threadIdx.x / 32 * kTile.warp_rows;
  const int thread_row = warp_row + threadIdx.x % 32 / 4;

  // The queries, their output gradients, and the first block of keys and values
  BlockWalk<kTile.block_rows> walk(context.work, item, args.work.num_splits);
  using Streamed = SharedTile<Element, kTile.block_rows, kHeadDim>;
  const TileLoader<kThreads, Streamed> keys(shared.k, k, mask), values(shared.v, v, mask);
  const auto load_next = [&](int stage) {
    const Block block = walk.block();
    keys.load(stage, block.row_begin, block.num_rows);
    values.load(stage, block.row_begin, block.num_rows);
  };
  load_tile<kThreads>(shared.q, context.rows(params.q, params.q_strides, params.head_dim), item.row_begin,
                      item.num_rows);
  load_tile<kThreads>(shared.dout, context.rows(params.dout, params.dout_strides, params.head_dim_v), item.row_begin,
                      item.num_rows);
  if (!walk.done()) load_next(0);

  // Statistics of the thread's rows
  const int64_t first_row = batch_head * params.seqlen_q + item.row_begin + thread_row;
  float lse_log2[2 * kTilesM], delta[2 * kTilesM];
  bool has_reference = false;
#pragma unroll
  for (int i = 0; i < 2 * kTilesM; ++i) {
    const bool is_row = thread_row + 8 * i < item.num_rows;
    lse_log2[i] = is_row ? args.lse_log2[first_row + 8 * i] : INFINITY;
    delta[i] = is_row ? args.delta[first_row + 8 * i] : 0;
    has_reference |= is_row && args.references[first_row + 8 * i].score != 0;
  }
  has_reference = __any_sync(0xFFFFFFFF, has_reference);

  const LaneTile lane_q(shared.q);
  float dq[kTilesM][kHeadDim / 8][4] = {};
  for (int stage = 0; !walk.done(); stage = (stage + 1) % kTile.stages) {
    ptx::cp_async_wait_all();
    __syncthreads();
    const Block block = walk.block();
    walk.advance();

    // Scores, and dp
    float s[kTilesM][kTilesN][4] = {}, dp[kTilesM][kTilesN][4] = {};
    multiply_rows<Mma>(s, lane_q, warp_row, lane_q.at(shared.k[stage]));
    if (has_reference) {
      relate_rows<Mma::kLosesInfinities>(s, args.references + first_row, item.num_rows - thread_row);
    }
    multiply_rows<Mma>(dp, lane_q.at(shared.dout), warp_row, lane_q.at(shared.v[stage]));
    // Behind the MMAs, whose last results take a while.
    if (kTile.stages == 2 && !walk.done()) load_next(stage ^ 1);
    if (args.dropout.seed != nullptr) {
      const Dropout dropout(args.dropout, static_cast<int>(batch_head));
      const WorkRange& range = walk.range_of(block);
      drop_columns(dp, dropout, item.row_begin + thread_row, range.range_index, block.row_begin - range.begin);
    }
    // ds
    const bool all_visible = block.num_rows == kTile.block_rows && mask == nullptr;
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int col = 8 * n + threadIdx.x % 4 * 2 + e;
        // Keys behind the block's end have the score 0 here, whose p may even be infinite.
        const bool visible = all_visible || (col < block.num_rows && (mask == nullptr || mask[block.row_begin + col]));
#pragma unroll
        for (int i = 0; i < 2 * kTilesM; ++i) {
          float& score = s[i / 2][n][i % 2 * 2 + e];
          const float p = p_of<Mma>(score, args.scale_log2, lse_log2[i]);
          score = visible ? p * (dp[i / 2][n][i % 2 * 2 + e] - delta[i]) : 0.0f;
        }
      }
    }
    // dq
    multiply_scores<Mma>(dq, s, lane_q.at(shared.k[stage]));
    if (kTile.stages == 1 && !walk.done()) {
      __syncthreads();
      load_next(0);
    }
  }

  // The way out
  ptx::cp_async_wait_all();  // of the queries, where there was no key
  __syncthreads();
  float* partial = args.partial_dq;
  if (partial != nullptr) partial += context.split_batch_head(batch_head) * params.seqlen_q * params.head_dim;
  store_grad<kTile.warp_rows>(dq, args.softmax_scale, partial, shared.q,
                              context.rows(params.dq, params.dq_strides, params.head_dim), warp_row, 0, item);
}

}  // namespace mixed_attention::cuda::portable
