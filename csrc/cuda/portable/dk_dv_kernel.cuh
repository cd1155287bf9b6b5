// dk and dv: a thread block owns keys and streams queries. Scores are transposed here: rows are keys. A warp has some
// of the keys to itself, or shares them (Tile::sharing): then each sharer sums some columns of dk and dv over all
// queries of a block, but computes the scores of some queries only, and takes the others' from shared memory.
//
// Beside that it may add dsᵀ k, its keys' share of dq, to dq_accum.
#pragma once

#include "ceil_div.h"
#include "cuda/portable/block_context.cuh"
#include "cuda/portable/bwd_arguments.cuh"
#include "cuda/portable/config.h"
#include "cuda/portable/dropout_marks.cuh"
#include "cuda/portable/scores.cuh"
#include "cuda/portable/store_grad.cuh"
#include "cuda/portable/tensor_core.cuh"
#include "cuda/ptx/named_barrier.cuh"

namespace mixed_attention::cuda::portable {

enum class Grads { kAll, kKeyAndValue, kKey, kValue };

// Transposed scores of a warp become p. lse_log2: of the scores' queries, in shared memory.
template <class Mma, int kTilesM, int kTilesN>
__device__ void exponentiate(float (&s)[kTilesM][kTilesN][4], const float* lse_log2, float scale_log2) {
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
    const float2 lse = *reinterpret_cast<const float2*>(&lse_log2[8 * n + threadIdx.x % 4 * 2]);
#pragma unroll
    for (int i = 0; i < 2 * kTilesM; ++i) {
      float* pair = &s[i / 2][n][i % 2 * 2];
      pair[0] = p_of<Mma>(pair[0], scale_log2, lse.x);
      pair[1] = p_of<Mma>(pair[1], scale_log2, lse.y);
    }
  }
}

// dp becomes ds. delta: of the scores' queries, in shared memory.
template <int kTilesM, int kTilesN>
__device__ void to_ds(float (&dp)[kTilesM][kTilesN][4], const float (&p)[kTilesM][kTilesN][4], const float* delta) {
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
    const float2 means = *reinterpret_cast<const float2*>(&delta[8 * n + threadIdx.x % 4 * 2]);
#pragma unroll
    for (int i = 0; i < 2 * kTilesM; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = dp[i / 2][n][i % 2 * 2 + e];
        score = fabsf(p[i / 2][n][i % 2 * 2 + e]) * (score - (e == 0 ? means.x : means.y));
      }
    }
  }
}

// Bit i of rows stands for the thread's row i: two for each tile of 16.
template <int kTilesM, int kTilesN>
__device__ void zero_rows(float (&c)[kTilesM][kTilesN][4], unsigned rows) {
#pragma unroll
  for (int i = 0; i < 2 * kTilesM; ++i) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
      if (rows >> i & 1) c[i / 2][n][i % 2 * 2] = c[i / 2][n][i % 2 * 2 + 1] = 0;
    }
  }
}

template <Arithmetic kArithmetic, int kHeadDim, Grads kGrads>
struct DkDvShared {
  static constexpr Tile kTile = dk_dv_tile(kArithmetic, kHeadDim);
  using Element = typename MmaOf<kArithmetic>::Element;
  struct Nothing {};

  SharedTile<Element, kTile.rows, kHeadDim> k, v;  // and dk, dv, at the end
  SharedTile<Element, kTile.block_rows, kHeadDim> q[kTile.stages], dout[kTile.stages];
  float lse_log2[kTile.stages][kTile.block_rows], delta[kTile.stages][kTile.block_rows];
  // ds for dq. Where warps share keys, each takes p and ds, by turns, of all the block's queries from here.
  [[no_unique_address]] std::conditional_t<kGrads == Grads::kAll || (kTile.sharing > 1),
                                           SharedTile<Element, kTile.rows, kTile.block_rows>, Nothing> scores;
};

// Adds dsᵀ k, the share of the block's keys, to dq: num_rows rows from row_begin on. Each warp takes 16 or 32 queries
// and an equal share of the columns.
template <class Mma, int kThreads, class SharedDs, class Keys>
__device__ void add_dq(const DqAccum& accum, int64_t row_begin, int num_rows, const SharedDs& ds, const Keys& k) {
  constexpr int kCols = Keys::kCols, kTilesM = SharedDs::kCols >= 64 ? 2 : 1;
  constexpr int kRowGroups = SharedDs::kCols / 16 / kTilesM, kWarpsPerGroup = kThreads / 32 / kRowGroups;
  // Columns are loaded 16 at a time; where they do not go round, half of the warps stands by.
  constexpr int kColGroups = kCols / 16 % kWarpsPerGroup == 0 ? kWarpsPerGroup : kWarpsPerGroup / 2;
  constexpr int kTilesN = kCols / 8 / kColGroups;
  static_assert(kTilesN % 2 == 0 && kTilesN * 8 * kColGroups == kCols, "warps share the columns in pairs of tiles");
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = warp % kRowGroups * 16 * kTilesM, col = warp / kRowGroups * kTilesN * 8;
  if (kColGroups < kWarpsPerGroup && col >= kCols) return;
  // A few columns at a time: dk and dv leave few registers.
  constexpr int kMostTiles = 4 * kTilesM;
  constexpr int kTilesAtOnce = kTilesN <= kMostTiles ? kTilesN : kTilesN % kMostTiles == 0 ? kMostTiles : 2;
#pragma unroll 1
  for (int first = col; first < col + kTilesN * 8; first += kTilesAtOnce * 8) {
    float dq[kTilesM][kTilesAtOnce][4] = {};
    const auto load_ds = [&](int m, int step) { return Mma::load_a_by_depth(ds, row + 16 * m, step); };
    multiply_columns<Mma>(dq, load_ds, k, first);
    float* const place = accum.place(row_begin + row + lane / 4, first, lane % 4);
    const auto add = [&]<bool kAll>() {
#pragma unroll
      for (int i = 0; i < 2 * kTilesM; ++i) {
        if (!kAll && row + lane / 4 + 8 * i >= num_rows) continue;
        float* const row_place = ptx::keep(place + 8 * i * accum.num_cols);
#pragma unroll
        for (int n = 0; n < kTilesAtOnce; ++n) {
          if (!kAll && first + 8 * n >= accum.num_cols) continue;
          DqAccum::add(row_place + n * DqAccum::kBlock, &dq[i / 2][n][i % 2 * 2]);
        }
      }
    };
    // A check for each tile costs more than its addition.
    if (num_rows == SharedDs::kCols && first + 8 * kTilesAtOnce <= accum.num_cols) {
      add.template operator()<true>();
    } else {
      add.template operator()<false>();
    }
  }
}

// Bit i: a thread's row i lies behind the tile's end or is blocked by the mask. What comes of its zeroed values is
// nobody's gradient.
template <int kRows>
__device__ unsigned hidden_keys(const WorkItem& item, int thread_row, const bool* mask) {
  unsigned hidden = 0;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = thread_row + 8 * i;
    if (row >= item.num_rows || (mask != nullptr && !mask[item.row_begin + row])) hidden |= 1u << i;
  }
  return hidden;
}

template <Arithmetic kArithmetic, int kHeadDim, Grads kGrads>
__global__ void __launch_bounds__(dk_dv_tile(kArithmetic, kHeadDim).num_threads(),
                                  dk_dv_tile(kArithmetic, kHeadDim).blocks)
    portable_dk_dv_kernel(const __grid_constant__ BwdArguments args, const __grid_constant__ InlineWork in_parameters) {
  using Mma = MmaOf<kArithmetic>;
  using Shared = DkDvShared<kArithmetic, kHeadDim, kGrads>;
  using Element = typename Mma::Element;
  constexpr Tile kTile = Shared::kTile;
  constexpr bool kWantsDk = kGrads != Grads::kValue, kWantsDv = kGrads != Grads::kKey, kAddsDq = kGrads == Grads::kAll;
  constexpr bool kShares = kTile.sharing > 1;
  constexpr int kThreads = kTile.num_threads(), kTilesM = kTile.warp_rows / 16, kWarpCols = kHeadDim / kTile.sharing;
  constexpr int kScoreRows = kTile.score_rows(), kTurns = kTile.block_rows / kTile.sharing / kScoreRows;
  // NOTE: only dq wants rows of ds that are hidden cleared. Without the branch, though, ptxas spills at other
  // head_dims.
  constexpr bool kBranchesOnHidden = kAddsDq || kHeadDim != 128;
  static_assert(!kShares || (kTurns == 1 && is_16_bit(kArithmetic)), "fp32 operands by depth want another order");
  extern __shared__ __align__(16) char shared_memory[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory);

  // Who we are
  const BwdParams& params = args.params;
  const BlockContext<Element, BwdArguments> context(args, in_parameters, kTile.rows);
  const WorkItem& item = context.item;
  const auto q = context.rows(params.q, params.q_strides, params.head_dim);
  const auto dout = context.rows(params.dout, params.dout_strides, params.head_dim_v);
  const bool* mask = context.mask();
  const int64_t batch_head = context.batch_head();
  const int64_t first_query = batch_head * params.seqlen_q;  // of lse_log2, delta and dq_accum
  // A warp's keys; among the warps that share them, its part of the gradients' columns and of a block's queries
  const int warp = threadIdx.x / 32, sharer = warp % kTile.sharing;
  const int warp_row = warp / kTile.sharing * kTile.warp_rows, warp_col = ptx::keep(sharer * kWarpCols);
  const int thread_row = warp_row + threadIdx.x % 32 / 4;
  const auto sync_sharers = [&] { ptx::named_barrier_sync(1 + warp / kTile.sharing, 32 * kTile.sharing); };

  // The keys and values, and the first block of queries and output gradients. Rows behind the block's end are zero
  // throughout: their p comes out as 1, their gradients as 0.
  BlockWalk<kTile.block_rows> walk(context.work, item, args.work.num_splits);
  using Streamed = SharedTile<Element, kTile.block_rows, kHeadDim>;
  const TileLoader<kThreads, Streamed> queries(shared.q, q), douts(shared.dout, dout);
  const auto load_next = [&](int stage) {
    const Block block = walk.block();
    queries.load(stage, block.row_begin, block.num_rows);
    douts.load(stage, block.row_begin, block.num_rows);
    static_assert(kThreads >= kTile.block_rows, "each of a block's queries has a thread");
    if (threadIdx.x < kTile.block_rows) {
      const int bytes = threadIdx.x < block.num_rows ? 4 : 0;
      const int64_t row = first_query + (bytes ? block.row_begin + threadIdx.x : 0);
      ptx::cp_async_4(&shared.lse_log2[stage][threadIdx.x], args.lse_log2 + row, bytes);
      ptx::cp_async_4(&shared.delta[stage][threadIdx.x], args.delta + row, bytes);
    }
  };
  load_tile<kThreads>(shared.k, context.rows(params.k, params.k_strides, params.head_dim), item.row_begin,
                      item.num_rows, mask);
  load_tile<kThreads>(shared.v, context.rows(params.v, params.v_strides, params.head_dim_v), item.row_begin,
                      item.num_rows, mask);
  if (!walk.done()) load_next(0);

  const unsigned hidden = hidden_keys<2 * kTilesM>(item, thread_row, mask);
  const bool some_hidden = item.num_rows < kTile.rows || mask != nullptr;
  const bool drops = args.dropout.seed != nullptr;
  // NOTE: to ask for each block whether one of its queries has a reference costs all calls a few percent.
  const bool some_references = *args.has_references != 0;

  // The walk over the queries
  const LaneTile lane_k(shared.k);
  float dk[kWantsDk ? kTilesM : 1][kWarpCols / 8][4] = {}, dv[kWantsDv ? kTilesM : 1][kWarpCols / 8][4] = {};
  for (int stage = 0; !walk.done(); stage = (stage + 1) % kTile.stages) {
    ptx::cp_async_wait_all();
    __syncthreads();
    const Block block = walk.block();
    walk.advance();
    if (kTile.stages == 2 && !walk.done()) load_next(stage ^ 1);
    const auto lane_q = lane_k.at(shared.q[stage]);
    const auto lane_dout = lane_k.at(shared.dout[stage]);

    // A gradient's sum takes up a warp's scores of some queries, or, from shared memory, those of all sharers.
    const auto accumulate = [&](auto& grad, const auto& scores, const auto& tile, int query) {
      if constexpr (kShares) {
        sync_sharers();
        const auto load = [&](int m, int k) { return load_a<Mma>(shared.scores, warp_row + 16 * m, k); };
        multiply_columns<Mma>(grad, load, tile, warp_col);
      } else {
        multiply_scores<Mma>(grad, scores, tile, query);
      }
    };
    const int num_turns = kTurns == 1 ? 1 : ceil_div(block.num_rows, kScoreRows);
#pragma unroll 1
    for (int turn = 0; turn < num_turns; ++turn) {
      // Scores, and dp
      const int query = (turn * kTile.sharing + sharer) * kScoreRows;
      float p[kTilesM][kScoreRows / 8][4] = {}, ds[kTilesM][kScoreRows / 8][4] = {};
      multiply_rows<Mma>(p, lane_k, warp_row, lane_q, query);
      if (some_references) {
        relate_columns<Mma::kLosesInfinities>(p, args.references + first_query + block.row_begin + query,
                                              block.num_rows - query);
      }
      if constexpr (!Mma::kLosesInfinities) {
        if (block.num_rows < kTile.block_rows) clear_columns(p, block.num_rows - query);
      }
      if constexpr (kWantsDk) multiply_rows<Mma>(ds, lane_k.at(shared.v), warp_row, lane_dout, query);
      // p and ds. The exponentials run under the MMAs of dp: nothing may stand between them.
      exponentiate<Mma>(p, shared.lse_log2[stage] + query, args.scale_log2);
      if (drops || (kBranchesOnHidden && some_hidden)) {
        if (drops) {
          const WorkRange& range = walk.range_of(block);
          const int key =
              item.row_begin + thread_row - context.work.segments[item.segment].row_begin + range.range_offset;
          mark_dropped(p, Dropout(args.dropout, static_cast<int>(batch_head)), block.row_begin + query,
                       range.range_index, key);
          if constexpr (kWantsDk) drop_marked(ds, p, args.dropout.inverse_keep_probability);
        }
        if constexpr (kWantsDk) to_ds(ds, p, shared.delta[stage] + query);
        if (drops) zero_dropped(p);
        if (kAddsDq && some_hidden) zero_rows(ds, hidden);
      } else if constexpr (kWantsDk) {
        to_ds(ds, p, shared.delta[stage] + query);
      }
      // dv and dk
      const auto add_to_dv = [&] {
        if constexpr (kShares) put_accumulators(shared.scores, warp_row, query, p);
        accumulate(dv, p, lane_dout, query);
      };
      // ds stays in shared memory for dq: p is handed over before it. Where nothing is, dk first spills less.
      if constexpr (kWantsDv && kShares) add_to_dv();
      if constexpr (kWantsDk) {
        if constexpr (kShares) sync_sharers();  // p has been read
        if constexpr (kAddsDq || kShares) put_accumulators(shared.scores, warp_row, query, ds);
        accumulate(dk, ds, lane_q, query);
      }
      if constexpr (kWantsDv && !kShares) add_to_dv();
    }
    // All of ds is there, and nobody reads the queries any more.
    if (kAddsDq || kTile.stages == 1) __syncthreads();
    if (kTile.stages == 1 && !walk.done()) load_next(0);
    // dq
    if constexpr (kAddsDq) {
      add_dq<Mma, kThreads>(args.dq_accum, first_query + block.row_begin, block.num_rows, shared.scores, lane_k);
    }
  }

  // The way out. Blocked keys get no gradient.
  if (some_hidden) {
    if constexpr (kWantsDk) zero_rows(dk, hidden);
    if constexpr (kWantsDv) zero_rows(dv, hidden);
  }
  ptx::cp_async_wait_all();  // of the keys, where there was no query
  __syncthreads();
  const int64_t split_batch_head = context.split_batch_head(batch_head);
  const auto partial_of = [&](float* partial, int64_t num_cols) {
    return partial == nullptr ? nullptr : partial + split_batch_head * params.seqlen_k * num_cols;
  };
  if constexpr (kWantsDk) {
    store_grad<kTile.warp_rows>(dk, args.softmax_scale, partial_of(args.partial_dk, params.head_dim), shared.k,
                                context.rows(params.dk, params.dk_strides, params.head_dim), warp_row, warp_col, item);
  }
  if constexpr (kWantsDv) {
    const float factor = args.dropout.seed == nullptr ? 1.0f : args.dropout.inverse_keep_probability;
    store_grad<kTile.warp_rows>(dv, factor, partial_of(args.partial_dv, params.head_dim_v), shared.v,
                                context.rows(params.dv, params.dv_strides, params.head_dim_v), warp_row, warp_col,
                                item);
  }
}

}  // namespace mixed_attention::cuda::portable
