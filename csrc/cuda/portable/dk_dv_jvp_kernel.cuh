// dk and dv of out and its tangents: a thread block owns keys and streams queries. Scores are transposed here: rows are
// keys, of which a warp has 16 to itself.
#pragma once

#include "cuda/portable/bwd_jvp_arguments.cuh"
#include "cuda/portable/dk_dv_kernel.cuh"

namespace mixed_attention::cuda::portable {

// What is known of each query.
template <int kRows>
struct QueriesNumbers {
  float lse_log2[kRows], mu[kRows], eps[kRows], gamma[kRows];
};

template <Arithmetic kArithmetic, int kHeadDim>
struct DkDvJvpShared : BwdJvpShared<KeySide, QuerySide, kArithmetic, kHeadDim> {
  static constexpr Tile kTile = bwd_jvp_tile(kArithmetic, kHeadDim);

  QueriesNumbers<kTile.block_rows> numbers[kTile.stages];
};

template <Arithmetic kArithmetic, int kHeadDim>
__global__ void __launch_bounds__(bwd_jvp_tile(kArithmetic, kHeadDim).num_threads(),
                                  bwd_jvp_tile(kArithmetic, kHeadDim).blocks)
    portable_dk_dv_jvp_kernel(const __grid_constant__ BwdJvpArguments args,
                              const __grid_constant__ InlineWork in_parameters) {
  using Mma = MmaOf<kArithmetic>;
  using Shared = DkDvJvpShared<kArithmetic, kHeadDim>;
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
  const int64_t first_query = batch_head * params.seqlen_q;
  const int warp_row = threadIdx.x / 32 * kTile.warp_rows;
  const int thread_row = warp_row + threadIdx.x % 32 / 4;

  // The keys' side, and the first block of the queries'. Rows behind the block's end are zero throughout: their p comes
  // out as 1, their gradients as 0.
  BlockWalk<kTile.block_rows> walk(context.work, item, bwd.work.num_splits);
  const auto load_next = [&](int stage) {
    const Block block = walk.block();
    load_side<kThreads>(shared.streamed[stage], context, args, block.row_begin, block.num_rows);
    static_assert(kThreads >= kTile.block_rows, "each of a block's queries has a thread");
    if (threadIdx.x < kTile.block_rows) {
      const int bytes = threadIdx.x < block.num_rows ? 4 : 0;
      const int64_t row = first_query + (bytes ? block.row_begin + threadIdx.x : 0);
      auto& numbers = shared.numbers[stage];
      ptx::cp_async_4(&numbers.lse_log2[threadIdx.x], bwd.lse_log2 + row, bytes);
      ptx::cp_async_4(&numbers.mu[threadIdx.x], args.mu + row, bytes);
      ptx::cp_async_4(&numbers.eps[threadIdx.x], args.eps + row, bytes);
      ptx::cp_async_4(&numbers.gamma[threadIdx.x], bwd.delta + row, bytes);
    }
  };
  load_side<kThreads>(shared.owned, context, args, item.row_begin, item.num_rows, mask);
  if (!walk.done()) load_next(0);

  const unsigned hidden = hidden_keys<2 * kTilesM>(item, thread_row, mask);
  const bool drops = bwd.dropout.seed != nullptr;
  const bool moves_scores = tangents.q != nullptr || tangents.k != nullptr;  // else all z are 0
  const bool some_references = *bwd.has_references != 0;

  // The walk over the queries
  const LaneTile lane_k(shared.owned.k);
  float dk[kTilesM][kHeadDim / 8][4] = {}, dv[kTilesM][kHeadDim / 8][4] = {};
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
      multiply_rows<Mma>(result, lane_k.at(keys), warp_row, lane_k.at(queries));
    };
    multiply_sides(args, streamed, shared.owned, p, z, e, x, multiply, [&] {
      if (some_references) {
        relate_columns<Mma::kLosesInfinities>(p, bwd.references + first_query + block.row_begin, block.num_rows);
      }
      if constexpr (!Mma::kLosesInfinities) {
        if (block.num_rows < kTile.block_rows) clear_columns(p, block.num_rows);
      }
    });
    // Behind the MMAs, whose last results take a while.
    if (kTile.stages == 2 && !walk.done()) load_next(stage ^ 1);

    // p, and its dropout
    const auto& numbers = shared.numbers[stage];
    exponentiate<Mma>(p, numbers.lse_log2, bwd.scale_log2);
    if (drops) {
      const WorkRange& range = walk.range_of(block);
      const int key = item.row_begin + thread_row - context.work.segments[item.segment].row_begin + range.range_offset;
      mark_dropped(p, Dropout(bwd.dropout, static_cast<int>(batch_head)), block.row_begin, range.range_index, key);
      drop_marked(e, p, bwd.dropout.inverse_keep_probability);
      drop_marked(x, p, bwd.dropout.inverse_keep_probability);
    }
    // Gradients of scores
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int col = 8 * n + threadIdx.x % 4 * 2 + c;
        const float mu = numbers.mu[col], eps = numbers.eps[col], gamma = numbers.gamma[col];
#pragma unroll
        for (int i = 0; i < 2 * kTilesM; ++i) {
          const int m = i / 2, place = i % 2 * 2 + c;
          const PairGradients pair(p[m][n][place], e[m][n][place], x[m][n][place], z[m][n][place], bwd.softmax_scale,
                                   mu, eps, gamma);
          e[m][n][place] = pair.g;
          x[m][n][place] = pair.ds;
          z[m][n][place] = pair.pz;
        }
      }
    }
    if (drops) {
      zero_where_dropped(z, p);
      zero_dropped(p);
    }
    // dk and dv
    multiply_scores<Mma>(dk, x, lane_k.at(streamed.q));
    if (tangents.q != nullptr) multiply_scores<Mma>(dk, e, lane_k.at(streamed.q_dot));
    if (moves_scores) multiply_scores<Mma>(dv, z, lane_k.at(streamed.dout_dot));
    if (params.dout != nullptr) multiply_scores<Mma>(dv, p, lane_k.at(streamed.dout));
    if (kTile.stages == 1 && !walk.done()) {
      __syncthreads();
      load_next(0);
    }
  }

  // The way out. Blocked keys get no gradient.
  zero_rows(dk, hidden);
  zero_rows(dv, hidden);
  ptx::cp_async_wait_all();  // of the keys, where there was no query
  __syncthreads();
  const auto store = [&](auto& grad, float factor, float* partial, auto& staging, const auto& target) {
    if (partial != nullptr) partial += context.split_batch_head(batch_head) * params.seqlen_k * target.num_cols;
    store_grad<kTile.warp_rows>(grad, factor, partial, staging, target, warp_row, 0, item);
  };
  store(dk, bwd.softmax_scale, bwd.partial_dk, shared.owned.k,
        context.rows(params.dk, params.dk_strides, params.head_dim));
  store(dv, drops ? bwd.dropout.inverse_keep_probability : 1.0f, bwd.partial_dv, shared.owned.v,
        context.rows(params.dv, params.dv_strides, params.head_dim_v));
}

}  // namespace mixed_attention::cuda::portable
