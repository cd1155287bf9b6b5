// dq of out and its tangents, and the gradient of q's tangent: a thread block owns queries and streams keys.
#pragma once

#include "cuda/portable/bwd_jvp_arguments.cuh"

namespace mixed_attention::cuda::portable {

template <Arithmetic kArithmetic, int kHeadDim>
using DqJvpShared = BwdJvpShared<QuerySide, KeySide, kArithmetic, kHeadDim>;

template <Arithmetic kArithmetic, int kHeadDim>
__global__ void __launch_bounds__(bwd_jvp_tile(kArithmetic, kHeadDim).num_threads(),
                                  bwd_jvp_tile(kArithmetic, kHeadDim).blocks)
    portable_dq_jvp_kernel(const __grid_constant__ BwdJvpArguments args,
                           const __grid_constant__ InlineWork in_parameters) {
  using Mma = MmaOf<kArithmetic>;
  using Shared = DqJvpShared<kArithmetic, kHeadDim>;
  using Element = typename Mma::Element;
  constexpr Tile kTile = Shared::kTile;
  constexpr int kThreads = kTile.num_threads(), kTilesM = kTile.warp_rows / 16, kTilesN = kTile.block_rows / 8;
  extern __shared__ __align__(16) char shared_memory[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory);

  // Who we are
  const BwdArguments& bwd = args.bwd;
  const BwdParams& params = bwd.params;
  const Tangents& tangents = args.tangents;
  const BlockContext<Element, BwdArguments> context(bwd, in_parameters, kTile.rows);
  const WorkItem& item = context.item;
  const bool* mask = context.mask();
  const int64_t batch_head = context.batch_head();
  const int warp_row = threadIdx.x / 32 * kTile.warp_rows;
  const int thread_row = warp_row + threadIdx.x % 32 / 4;

  // The queries' side, and the first block of the keys'
  BlockWalk<kTile.block_rows> walk(context.work, item, bwd.work.num_splits);
  const auto load_next = [&](int stage) {
    const Block block = walk.block();
    load_side<kThreads>(shared.streamed[stage], context, args, block.row_begin, block.num_rows, mask);
  };
  load_side<kThreads>(shared.owned, context, args, item.row_begin, item.num_rows);
  if (!walk.done()) load_next(0);

  // What is known of the thread's rows
  const int64_t first_row = batch_head * params.seqlen_q + item.row_begin + thread_row;
  float lse_log2[2 * kTilesM], mu[2 * kTilesM], eps[2 * kTilesM], gamma[2 * kTilesM];
  bool has_reference = false;
#pragma unroll
  for (int i = 0; i < 2 * kTilesM; ++i) {
    const bool is_row = thread_row + 8 * i < item.num_rows;
    const int64_t row = is_row ? first_row + 8 * i : 0;
    lse_log2[i] = is_row ? bwd.lse_log2[row] : INFINITY;
    mu[i] = is_row ? args.mu[row] : 0;
    eps[i] = is_row ? args.eps[row] : 0;
    gamma[i] = is_row ? bwd.delta[row] : 0;
    has_reference |= is_row && bwd.references[row].score != 0;
  }
  has_reference = __any_sync(0xFFFFFFFF, has_reference);
  const bool drops = bwd.dropout.seed != nullptr;

  // The walk over the keys
  const LaneTile lane_q(shared.owned.q);
  float dq[kTilesM][kHeadDim / 8][4] = {}, dq_dot[kTilesM][kHeadDim / 8][4] = {};
  for (int stage = 0; !walk.done(); stage = (stage + 1) % kTile.stages) {
    ptx::cp_async_wait_all();
    __syncthreads();
    const Block block = walk.block();
    walk.advance();
    const auto& streamed = shared.streamed[stage];

    // Scores, and the other products of rows
    float p[kTilesM][kTilesN][4] = {}, z[kTilesM][kTilesN][4] = {};
    float e[kTilesM][kTilesN][4] = {}, x[kTilesM][kTilesN][4] = {};
    const auto multiply = [&](auto& result, const auto& queries, const auto& keys) {
      multiply_rows<Mma>(result, lane_q.at(queries), warp_row, lane_q.at(keys));
    };
    multiply_sides(args, shared.owned, streamed, p, z, e, x, multiply, [&] {
      if (has_reference) {
        relate_rows<Mma::kLosesInfinities>(p, bwd.references + first_row, item.num_rows - thread_row);
      }
    });
    // Behind the MMAs, whose last results take a while.
    if (kTile.stages == 2 && !walk.done()) load_next(stage ^ 1);

    // p, and its dropout
    const bool all_visible = block.num_rows == kTile.block_rows && mask == nullptr;
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int col = 8 * n + threadIdx.x % 4 * 2 + c;
        // Keys behind the block's end have the score 0 here, whose p may even be infinite.
        const bool visible = all_visible || (col < block.num_rows && (mask == nullptr || mask[block.row_begin + col]));
#pragma unroll
        for (int i = 0; i < 2 * kTilesM; ++i) {
          float& score = p[i / 2][n][i % 2 * 2 + c];
          const float value = p_of<Mma>(score, bwd.scale_log2, lse_log2[i]);
          score = visible ? value : 0;
        }
      }
    }
    if (drops) {
      const WorkRange& range = walk.range_of(block);
      mark_dropped_columns(p, Dropout(bwd.dropout, static_cast<int>(batch_head)), item.row_begin + thread_row,
                           range.range_index, block.row_begin - range.begin);
      drop_marked(e, p, bwd.dropout.inverse_keep_probability);
      drop_marked(x, p, bwd.dropout.inverse_keep_probability);
    }
    // Gradients of scores
#pragma unroll
    for (int i = 0; i < 2 * kTilesM; ++i) {
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
        for (int c = i % 2 * 2; c < i % 2 * 2 + 2; ++c) {
          const int m = i / 2;
          const PairGradients pair(p[m][n][c], e[m][n][c], x[m][n][c], z[m][n][c], bwd.softmax_scale, mu[i], eps[i],
                                   gamma[i]);
          e[m][n][c] = pair.g;
          x[m][n][c] = pair.ds;
        }
      }
    }
    // dq, and the gradient of q's tangent
    multiply_scores<Mma>(dq, x, lane_q.at(streamed.k));
    if (tangents.k != nullptr) multiply_scores<Mma>(dq, e, lane_q.at(streamed.k_dot));
    if (args.dq_dot != nullptr) multiply_scores<Mma>(dq_dot, e, lane_q.at(streamed.k));
    if (kTile.stages == 1 && !walk.done()) {
      __syncthreads();
      load_next(0);
    }
  }

  // The way out
  ptx::cp_async_wait_all();  // of the queries, where there was no key
  __syncthreads();
  const auto store = [&](auto& grad, float* partial, auto& staging, void* target, const Strides& strides) {
    if (partial != nullptr) partial += context.split_batch_head(batch_head) * params.seqlen_q * params.head_dim;
    store_grad<kTile.warp_rows>(grad, bwd.softmax_scale, partial, staging,
                                context.rows(target, strides, params.head_dim), warp_row, 0, item);
  };
  store(dq, bwd.partial_dq, shared.owned.q, params.dq, params.dq_strides);
  if (args.dq_dot != nullptr) store(dq_dot, args.partial_dq_dot, shared.owned.q_dot, args.dq_dot, args.dq_dot_strides);
}

}  // namespace mixed_attention::cuda::portable
