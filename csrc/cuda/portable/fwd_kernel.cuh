// Forward. One thread block computes the output of one tile of queries of one head, or a split of it where the walk
// over the keys is split; a warp has 16 or 32 of the rows to itself. Keys and values stream through shared memory by
// asynchronous copies, a block ahead, or, with one buffer each, while the other is multiplied.
#pragma once

#include "cuda/common/log_sum_exp.cuh"
#include "cuda/portable/config.h"
#include "cuda/portable/repair_rows.cuh"
#include "cuda/portable/scores.cuh"
#include "cuda/portable/softmax.cuh"
#include "cuda/portable/tensor_core.cuh"
#include "cuda/portable/tile_iterator.cuh"

namespace mixed_attention::cuda::portable {

struct FwdArguments {
  FwdParams params;
  DeviceWork work;
  DropoutParams dropout;
  float scale;         // softmax_scale
  float scale_log2;    // the same times log2(e), above 0
  bool aligned;        // rows of q, k, v and out start at multiples of 16 bytes
  float* partial_out;  // (splits, batch_size, num_heads, seqlen_q, head_dim_v); null without splits
  RowLse* row_lses;    // (splits, batch_size, num_heads, seqlen_q), likewise
};

template <Arithmetic kArithmetic, int kHeadDim>
struct FwdShared {
  static constexpr Tile kTile = fwd_tile(kArithmetic, kHeadDim);
  using Element = typename MmaOf<kArithmetic>::Element;

  SharedTile<Element, kTile.rows, kHeadDim> q;  // and out, at the end
  SharedTile<Element, kTile.block_rows, kHeadDim> k[kTile.stages], v[kTile.stages];
};

template <Arithmetic kArithmetic, int kHeadDim>
__global__ void __launch_bounds__(fwd_tile(kArithmetic, kHeadDim).num_threads(), fwd_tile(kArithmetic, kHeadDim).blocks)
    portable_fwd_kernel(const __grid_constant__ FwdArguments args, const __grid_constant__ InlineWork in_parameters) {
  using Mma = MmaOf<kArithmetic>;
  using Shared = FwdShared<kArithmetic, kHeadDim>;
  using Element = typename Mma::Element;
  constexpr Tile kTile = Shared::kTile;
  constexpr int kThreads = kTile.num_threads(), kTilesM = kTile.warp_rows / 16;
  extern __shared__ __align__(16) char shared_memory[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory);

  // Who we are
  const FwdParams& params = args.params;
  const WorkView work = view(args.work, in_parameters);
  const WorkItem item = locate(args.work, work, blockIdx.x, kTile.rows, params.num_heads);
  const auto q = rows_of<Element>(params.q, params.q_strides, item.batch, item.head, params.head_dim, args.aligned);
  const auto k = rows_of<Element>(params.k, params.k_strides, item.batch, item.head, params.head_dim, args.aligned);
  const auto v = rows_of<Element>(params.v, params.v_strides, item.batch, item.head, params.head_dim_v, args.aligned);
  const bool* mask = params.key_padding_mask;
  if (mask != nullptr) mask += item.batch * params.key_padding_mask_batch_stride;
  const bool drops = args.dropout.seed != nullptr;
  const int warp_row = threadIdx.x / 32 * kTile.warp_rows;
  const int thread_row = warp_row + threadIdx.x % 32 / 4;

  float out[kTilesM][kHeadDim / 8][4] = {};
  WarpSoftmax<kTilesM> softmax;

  // The queries and the first block of keys
  BlockWalk<kTile.block_rows> walk(work, item, args.work.num_splits);
  constexpr bool kTwoStages = kTile.stages == 2;
  using Streamed = SharedTile<Element, kTile.block_rows, kHeadDim>;
  const TileLoader<kThreads, Streamed> keys(shared.k, k, mask), values(shared.v, v, mask);
  const auto load = [&](const auto& loader, int stage) {
    const Block block = walk.block();
    loader.load(stage, block.row_begin, block.num_rows);
  };
  load_tile<kThreads>(shared.q, q, item.row_begin, item.num_rows);
  if (!walk.done()) {
    load(keys, 0);
    if (kTwoStages) load(values, 0);
  }

  const LaneTile lane_q(shared.q);
  for (int stage = 0; !walk.done(); stage = (stage + 1) % kTile.stages) {
    // This block has arrived, and nobody reads the other buffer any more: the next block may go there. With one stage
    // only the keys have: values come during the MMAs of s, the next keys during those of p.
    ptx::cp_async_wait_all();
    __syncthreads();
    const Block block = walk.block();
    if (!kTwoStages) load(values, 0);
    walk.advance();

    // Scores
    float s[kTilesM][kTile.block_rows / 8][4] = {};
    multiply_rows<Mma>(s, lane_q, warp_row, lane_q.at(shared.k[stage]));
    if (!kTwoStages) {
      ptx::cp_async_wait_all();
      __syncthreads();
    }
    // Behind the MMAs, whose last results take a while.
    if (!walk.done()) {
      const int next = kTwoStages ? stage ^ 1 : 0;
      load(keys, next);
      if (kTwoStages) load(values, next);
    }
    if (mask != nullptr || block.num_rows < kTile.block_rows) {
      mask_columns(s, block.num_rows, mask == nullptr ? nullptr : mask + block.row_begin);
    }
    // p, and the output
    softmax.raise_softmax_bases(s, out, args.scale_log2);
    if (is_16_bit(kArithmetic) && !drops) {
      // Exponentials of a depth step run under the MMAs of the step before: nothing may stand between them.
      const auto exponentiate = [&](int first) {
        softmax.template exponentiate<Mma::kDepth / 8>(s, first, args.scale_log2);
      };
      multiply_scores<Mma>(out, s, lane_q.at(shared.v[stage]), 0, exponentiate);
    } else {
      softmax.template exponentiate<kTile.block_rows / 8>(s, 0, args.scale_log2);
      if (drops) {
        // What is kept gets its factor with the output: fp16 might not hold it times p, which is up to 256 here.
        const DropoutParams marks{args.dropout.seed, args.dropout.threshold, 1.0f};
        const Dropout dropout(marks, item.batch * params.num_heads + item.head);
        const WorkRange& range = walk.range_of(block);
        drop_columns(s, dropout, item.row_begin + thread_row, range.range_index, block.row_begin - range.begin);
      }
      multiply_scores<Mma>(out, s, lane_q.at(shared.v[stage]));
    }
  }

  // The end of the sums
  RowLse row_lses[2 * kTilesM];
  softmax.finish(out, row_lses, drops ? args.dropout.inverse_keep_probability : 1.0f);

  // Log-sum-exps, by the first of the four lanes that share a row
  const bool is_split = args.work.num_splits > 1;
  const int64_t batch_head = static_cast<int64_t>(item.batch) * params.num_heads + item.head;
  const int64_t split_batch_head = batch_head + static_cast<int64_t>(item.split) * params.batch_size * params.num_heads;
#pragma unroll
  for (int i = 0; i < 2 * kTilesM; ++i) {
    const int row = thread_row + 8 * i;
    if (threadIdx.x % 4 != 0 || row >= item.num_rows) continue;
    if (is_split) {
      args.row_lses[split_batch_head * params.seqlen_q + item.row_begin + row] = row_lses[i];
    } else {
      static_cast<float*>(params.lse)[batch_head * params.seqlen_q + item.row_begin + row] =
          log_sum_exp(row_lses[i], args.scale);
    }
  }

  // The output: through shared memory, for whole rows to be written at a time. A warp meets only its own rows there.
  const int num_rows = min(kTile.warp_rows, item.num_rows - warp_row), first_row = item.row_begin + warp_row;
  // Weighted sums of fp16 do not overflow, and its infinities are not lost.
  unsigned repairs = kArithmetic == Arithmetic::kFloat16 ? 0 : rows_to_repair(out, row_lses, num_rows);
  const auto o =
      rows_of<Element>(params.out, params.out_strides, item.batch, item.head, params.head_dim_v, args.aligned);
  const int64_t split_row = split_batch_head * params.seqlen_q + first_row;
  float* const partial_out = args.partial_out + split_row * params.head_dim_v;
  if (is_split) {
    store_fp32(partial_out, params.head_dim_v, num_rows, 0, out);
  } else {
    ptx::cp_async_wait_all();  // of the queries, where there was no key
    __syncthreads();
    put_accumulators(shared.q, warp_row, 0, out);
    __syncwarp();
    store_rows<kTile.warp_rows, kHeadDim>(shared.q, warp_row, 0, o, first_row, num_rows);
  }

  const auto store_repaired = [&](int row, const auto& plain, const RowLse& row_lse, float factor) {
    if (is_split) {
      plain.store(partial_out + static_cast<int64_t>(row) * params.head_dim_v, factor);
      if (threadIdx.x % 32 == 0) args.row_lses[split_row + row] = row_lse;
    } else {
      plain.store(o.row(first_row + row), factor);
      float* const lse = static_cast<float*>(params.lse) + batch_head * params.seqlen_q;
      if (threadIdx.x % 32 == 0) lse[first_row + row] = log_sum_exp(row_lse, args.scale);
    }
  };
  repair_rows<kTile.block_rows, kHeadDim>(repairs, args, work, item, static_cast<int>(batch_head), mask, q, k, v,
                                          first_row, store_repaired);
}

}  // namespace mixed_attention::cuda::portable
