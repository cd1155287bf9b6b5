// Tangents of the forward. One thread block owns a tile of queries of one head; a warp has 16 rows to itself. For
// a row, with s' the tangents of its scores and any number c,
//
//   h = p (s' - c)     r = sum of h     a = sum of (h v + p v')     lse' = r / l + c     out' = a / l - (r / l) out
//
// with l the sum of p. c is the row's mean of s' so far, taken anew with every block that weighs more than an eighth of
// those before: so neither a part that all s' of a row share cancels in rounded sums, nor the s' of a key that has
// nearly all of the weight. Dropout's factors are on h and p in a, and in out, but not in r and l.
//
// p and the output are computed as the forward does it, also where they are known: that takes the MMAs of p with v, and
// none of what large log-sum-exps would want. So the kernel can write both, instead of a forward before it.
#pragma once

#include "cuda/common/log_sum_exp.cuh"
#include "cuda/portable/block_context.cuh"
#include "cuda/portable/config.h"
#include "cuda/portable/dropout_marks.cuh"
#include "cuda/portable/repair_rows.cuh"
#include "cuda/portable/scores.cuh"
#include "cuda/portable/softmax.cuh"
#include "cuda/portable/tangent_config.h"
#include "cuda/portable/tensor_core.cuh"
#include "derivatives_params.h"

namespace mixed_attention::cuda::portable {

struct JvpArguments {
  JvpParams params;
  DeviceWork work;
  DropoutParams dropout;
  float scale_log2;  // softmax_scale times log2(e), above 0
  float scale;       // softmax_scale
  bool aligned;      // rows of all tensors start at multiples of 16 bytes
};

// Over the four lanes that share a row.
__device__ inline float sum_of_quad(float x) {
  x += __shfl_xor_sync(0xFFFFFFFF, x, 1);
  return x + __shfl_xor_sync(0xFFFFFFFF, x, 2);
}

// The tangents of one direction.
template <int kTilesM, int kTilesOut>
struct MovingRows {
  float out[kTilesM][kTilesOut][4] = {};  // a
  float mean[2 * kTilesM] = {};           // c
  float sum[2 * kTilesM] = {};            // r, of this lane's columns

  // For rows of which bit i of `moves` is set, from here on s' count from their mean so far, this block included.
  // mass_before: what p came to before it, of this lane's columns. x: s' but for the scale.
  template <int kTilesN>
  __device__ void move_means(unsigned moves, const float (&mass_before)[2 * kTilesM],
                             const float (&p)[kTilesM][kTilesN][4], const float (&x)[kTilesM][kTilesN][4], float scale,
                             const float (&primal_out)[kTilesM][kTilesOut][4]) {
#pragma unroll
    for (int row = 0; row < 2 * kTilesM; ++row) {
      const int m = row / 2, e = row % 2 * 2;
      float mass = 0, tangent = 0;
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
        const float first = fabsf(p[m][n][e]), second = fabsf(p[m][n][e + 1]);
        mass += first + second;
        tangent = fmaf(first, x[m][n][e], fmaf(second, x[m][n][e + 1], tangent));
      }
      const float before = sum_of_quad(mass_before[row]);
      const float total = fmaf(before, mean[row], sum_of_quad(fmaf(tangent, scale, sum[row])));
      const float moved = total / (before + sum_of_quad(mass));
      if (!(moves >> row & 1) || !isfinite(moved)) continue;
      const float change = mean[row] - moved;
      mean[row] = moved;
      sum[row] = fmaf(change, mass_before[row], sum[row]);
      if (before == 0) continue;
#pragma unroll
      for (int n = 0; n < kTilesOut; ++n) {
        out[m][n][e] = fmaf(change, primal_out[m][n][e], out[m][n][e]);
        out[m][n][e + 1] = fmaf(change, primal_out[m][n][e + 1], out[m][n][e + 1]);
      }
    }
  }

  // x becomes h.
  template <int kTilesN>
  __device__ void weigh(float (&x)[kTilesM][kTilesN][4], const float (&p)[kTilesM][kTilesN][4], float scale) {
#pragma unroll
    for (int row = 0; row < 2 * kTilesM; ++row) {
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
        for (int e = row % 2 * 2; e < row % 2 * 2 + 2; ++e) {
          float& number = x[row / 2][n][e];
          number = fabsf(p[row / 2][n][e]) * fmaf(number, scale, -mean[row]);
          sum[row] += number;
        }
      }
    }
  }
};

template <Arithmetic kArithmetic, int kHeadDim, Moving kMoving>
struct JvpShared {
  static constexpr Tile kTile = jvp_tile(kArithmetic, kHeadDim, kMoving);
  static constexpr int kMovingStages = kMoving == Moving::kAll ? kTile.stages : 0;
  using Element = typename MmaOf<kArithmetic>::Element;
  using Owned = SharedTile<Element, kTile.rows, kHeadDim>;
  using Streamed = SharedTile<Element, kTile.block_rows, kHeadDim>;

  Owned q;  // and results, at the end
  Owned q_dot[directions_of(kMoving)];
  Streamed k[kTile.stages], v[kTile.stages];
  Streamed k_dot[kMovingStages], v_dot[kMovingStages];
};

template <Arithmetic kArithmetic, int kHeadDim, Moving kMoving>
__global__ void __launch_bounds__(jvp_tile(kArithmetic, kHeadDim, kMoving).num_threads(),
                                  jvp_tile(kArithmetic, kHeadDim, kMoving).blocks)
    portable_jvp_kernel(const __grid_constant__ JvpArguments args, const __grid_constant__ InlineWork in_parameters) {
  using Mma = MmaOf<kArithmetic>;
  using Shared = JvpShared<kArithmetic, kHeadDim, kMoving>;
  using Element = typename Mma::Element;
  constexpr Tile kTile = Shared::kTile;
  constexpr bool kMovesKeys = kMoving == Moving::kAll;
  constexpr int kDirections = directions_of(kMoving);
  constexpr int kThreads = kTile.num_threads(), kTilesM = kTile.warp_rows / 16, kTilesN = kTile.block_rows / 8;
  extern __shared__ __align__(16) char shared_memory[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory);

  // Who we are
  const JvpParams& params = args.params;
  const Tangents& tangents = params.tangents;
  const BlockContext<Element, JvpArguments> context(args, in_parameters, kTile.rows);
  const WorkItem& item = context.item;
  const bool* mask = context.mask();
  const auto q = context.rows(params.q, params.q_strides, params.head_dim);
  const bool drops = args.dropout.seed != nullptr;
  const bool moves_k = kMovesKeys && tangents.k != nullptr, moves_v = kMovesKeys && tangents.v != nullptr;
  const int warp_row = threadIdx.x / 32 * kTile.warp_rows;
  const int thread_row = warp_row + threadIdx.x % 32 / 4;

  float out[kTilesM][kHeadDim / 8][4] = {};
  MovingRows<kTilesM, kHeadDim / 8> moving[kDirections];
  WarpSoftmax<kTilesM> softmax;

  // The queries with their tangents, and the first block of keys and values
  BlockWalk<kTile.block_rows> walk(context.work, item, args.work.num_splits);
  using Loader = TileLoader<kThreads, typename Shared::Streamed>;
  const Loader keys(shared.k, context.rows(params.k, params.k_strides, params.head_dim), mask);
  const Loader values(shared.v, context.rows(params.v, params.v_strides, params.head_dim_v), mask);
  const auto load_next = [&](int stage) {
    const Block block = walk.block();
    keys.load(stage, block.row_begin, block.num_rows);
    values.load(stage, block.row_begin, block.num_rows);
    if constexpr (kMovesKeys) {
      const auto load = [&](auto* tiles, const void* tensor, const Strides& strides, int64_t num_cols) {
        load_tile<kThreads>(tiles[stage], context.rows(tensor, strides, num_cols), block.row_begin, block.num_rows,
                            mask);
      };
      if (moves_k) load(shared.k_dot, tangents.k, tangents.k_strides, params.head_dim);
      if (moves_v) load(shared.v_dot, tangents.v, tangents.v_strides, params.head_dim_v);
    }
  };
  load_tile<kThreads>(shared.q, q, item.row_begin, item.num_rows);
#pragma unroll
  for (int t = 0; t < kDirections; ++t) {
    if (tangents.q == nullptr || t >= tangents.count) continue;
    const auto* each = static_cast<const Element*>(tangents.q) + t * tangents.q_step;
    const auto q_dot = context.rows(each, tangents.q_strides, params.head_dim);
    load_tile<kThreads>(shared.q_dot[t], q_dot, item.row_begin, item.num_rows);
  }
  if (!walk.done()) load_next(0);

  // The walk over the keys
  const LaneTile lane_q(shared.q);
  for (int stage = 0; !walk.done(); stage = (stage + 1) % kTile.stages) {
    ptx::cp_async_wait_all();
    __syncthreads();
    const Block block = walk.block();
    walk.advance();

    // Scores, and p
    float p[kTilesM][kTilesN][4] = {};
    multiply_rows<Mma>(p, lane_q, warp_row, lane_q.at(shared.k[stage]));
    // Behind the MMAs, whose last results take a while.
    if (kTile.stages == 2 && !walk.done()) load_next(stage ^ 1);
    if (mask != nullptr || block.num_rows < kTile.block_rows) {
      mask_columns(p, block.num_rows, mask == nullptr ? nullptr : mask + block.row_begin);
    }
    softmax.raise_softmax_bases(p, args.scale_log2, [&](int row, float factor) {
      scale_row(out, row, factor);
#pragma unroll
      for (int t = 0; t < kDirections; ++t) {
        scale_row(moving[t].out, row, factor);
        moving[t].sum[row] *= factor;
      }
    });
    float mass_before[2 * kTilesM];
#pragma unroll
    for (int row = 0; row < 2 * kTilesM; ++row) mass_before[row] = softmax.sum_of(row);
    softmax.template exponentiate<kTilesN>(p, 0, args.scale_log2);
    // Rows whose mean moves
    unsigned moves = 0;  // bit i: the mean of this thread's row i moves, by what any of the row's four lanes says
#pragma unroll
    for (int row = 0; row < 2 * kTilesM; ++row) {
      if (softmax.sum_of(row) > 1.125f * mass_before[row]) moves |= 1u << row;
    }
    moves |= __shfl_xor_sync(0xFFFFFFFF, moves, 1);
    moves |= __shfl_xor_sync(0xFFFFFFFF, moves, 2);
    if (drops) {
      const Dropout dropout(args.dropout, static_cast<int>(context.batch_head()));
      const WorkRange& range = walk.range_of(block);
      mark_dropped_columns(p, dropout, item.row_begin + thread_row, range.range_index, block.row_begin - range.begin);
    }
    const bool some_move = __any_sync(0xFFFFFFFF, moves != 0);

    // Tangents of scores, h, and the sums of every direction
#pragma unroll
    for (int t = 0; t < kDirections; ++t) {
      if (t >= tangents.count || (tangents.q == nullptr && !moves_k)) continue;
      float x[kTilesM][kTilesN][4] = {};
      if (tangents.q != nullptr) {
        multiply_rows<Mma>(x, lane_q.at(shared.q_dot[t]), warp_row, lane_q.at(shared.k[stage]));
      }
      if constexpr (kMovesKeys) {
        if (moves_k) multiply_rows<Mma>(x, lane_q, warp_row, lane_q.at(shared.k_dot[stage]));
      }
      if (some_move) moving[t].move_means(moves, mass_before, p, x, args.scale, out);
      moving[t].weigh(x, p, args.scale);
      if (drops) zero_where_dropped(x, p);
      multiply_scores<Mma>(moving[t].out, x, lane_q.at(shared.v[stage]));
    }
    if (drops) zero_dropped(p);
    if constexpr (kMovesKeys) {
      if (moves_v) multiply_scores<Mma>(moving[0].out, p, lane_q.at(shared.v_dot[stage]));
    }
    // Last, because a mean that moves wants the sums without this block.
    multiply_scores<Mma>(out, p, lane_q.at(shared.v[stage]));
    if (kTile.stages == 1 && !walk.done()) {
      __syncthreads();
      load_next(0);
    }
  }

  // The forward's rows
  float mass[2 * kTilesM];
#pragma unroll
  for (int i = 0; i < 2 * kTilesM; ++i) mass[i] = sum_of_quad(softmax.sum_of(i));
  RowLse row_lses[2 * kTilesM];
  const float factor = drops ? args.dropout.inverse_keep_probability : 1.0f;
  softmax.finish(out, row_lses, factor);

  const int num_rows = min(kTile.warp_rows, item.num_rows - warp_row), first_row = item.row_begin + warp_row;
  const bool writes_primal = !params.lse_is_known;
  unsigned repairs = 0;
  if (kArithmetic != Arithmetic::kFloat16 && writes_primal) repairs = rows_to_repair(out, row_lses, num_rows);

  // The way out
  ptx::cp_async_wait_all();  // of the queries, where there was no key
  __syncthreads();
  const int64_t first_number = context.batch_head() * params.seqlen_q + item.row_begin;
  // Rows through shared memory, to be written whole. A warp meets only its own rows there.
  const auto store = [&](const auto& sums, const auto& target) {
    __syncwarp();
    put_accumulators(shared.q, warp_row, 0, sums);
    __syncwarp();
    store_rows<kTile.warp_rows, kHeadDim>(shared.q, warp_row, 0, target, first_row, num_rows);
  };
  // A number of each row, by the first of the four lanes that share it.
  const auto store_numbers = [&](void* numbers, int64_t first, const auto& number_of) {
#pragma unroll
    for (int i = 0; i < 2 * kTilesM; ++i) {
      const int row = thread_row + 8 * i;
      const float number = number_of(i);
      if (threadIdx.x % 4 == 0 && row < item.num_rows) static_cast<float*>(numbers)[first + row] = number;
    }
  };
  const auto o = context.rows(params.out, params.out_strides, params.head_dim_v);
  if (writes_primal) {
    store(out, o);
    store_numbers(params.lse, first_number, [&](int i) { return log_sum_exp(row_lses[i], args.scale); });
  }
  // Tangents of output and log-sum-exp
#pragma unroll
  for (int t = 0; t < kDirections; ++t) {
    if (t >= tangents.count) continue;
    auto& each = moving[t];
    float shift[2 * kTilesM];
#pragma unroll
    for (int i = 0; i < 2 * kTilesM; ++i) {
      const bool is_empty = mass[i] == 0;
      const float sum = sum_of_quad(each.sum[i]);
      shift[i] = is_empty ? 0 : sum / mass[i];
      const float inverse = factor / mass[i];
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
        for (int e = i % 2 * 2; e < i % 2 * 2 + 2; ++e) {
          float& number = each.out[i / 2][n][e];
          number = is_empty ? 0 : fmaf(number, inverse, -shift[i] * out[i / 2][n][e]);
        }
      }
    }
    auto* const out_dot = static_cast<Element*>(params.out_dot) + t * params.out_dot_step;
    store(each.out, context.rows(out_dot, params.out_dot_strides, params.head_dim_v));
    store_numbers(params.lse_dot, t * params.lse_dot_step + first_number,
                  [&](int i) { return mass[i] == 0 ? 0.0f : shift[i] + each.mean[i]; });
  }

  // Rows that overflowed, once more
  const auto store_repaired = [&](int row, const auto& plain, const RowLse& row_lse, float factor) {
    plain.store(o.row(first_row + row), factor);
    float* const lse = static_cast<float*>(params.lse) + first_number + warp_row;
    if (threadIdx.x % 32 == 0) lse[row] = log_sum_exp(row_lse, args.scale);
  };
  repair_rows<kTile.block_rows, kHeadDim>(repairs, args, context.work, item, static_cast<int>(context.batch_head()),
                                          mask, q, context.rows(params.k, params.k_strides, params.head_dim),
                                          context.rows(params.v, params.v_strides, params.head_dim_v), first_row,
                                          store_repaired);
}

}  // namespace mixed_attention::cuda::portable
