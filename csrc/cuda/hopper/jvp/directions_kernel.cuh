// The forward and three tangents of it on Hopper, of directions in which queries alone move: they share scores, weights
// and the output. Roles and rings are those of jvp/kernel.cuh; items do not overlap.
//
// A consumer has one direction's tangents of scores at a time. While those of a direction are multiplied, and weighed,
// the direction before adds to its sum:
//
//   s, x of direction 0      beside  out += p v and direction 2's sum += h v, of the tile before
//   x of direction 1         beside  direction 0's sum += h v
//   x of direction 2         beside  direction 1's sum += h v
#pragma once

#include <cstdint>

#include "cuda/hopper/fwd/epilogue.cuh"
#include "cuda/hopper/fwd/mma.cuh"
#include "cuda/hopper/fwd/overflow.cuh"
#include "cuda/hopper/fwd/repair.cuh"
#include "cuda/hopper/fwd/softmax.cuh"
#include "cuda/hopper/jvp/directions_config.h"
#include "cuda/hopper/jvp/epilogue.cuh"
#include "cuda/hopper/jvp/params.h"
#include "cuda/hopper/jvp/run_tangents.cuh"
#include "cuda/hopper/jvp/softmax.cuh"
#include "cuda/hopper/plan/work_items.cuh"
#include "cuda/hopper/tile/load_tile.cuh"
#include "cuda/hopper/tile/mma.cuh"
#include "cuda/hopper/tile/named_barriers.h"
#include "cuda/hopper/tile/ring.cuh"
#include "cuda/ptx/lane.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace mixed_attention::cuda::hopper {

template <typename Config>
__device__ inline void produce_directions(const DirectionsKernelParams& params, DirectionsSharedStorage<Config>& shared,
                                          uint32_t& num_loaded, RingUse<Config::kQueryBuffers>& q_use) {
  using Ring = RingUse<Config::kStages>;
  for (ItemWalk<Config::kBlockM> items(params.table); items.next_with_keys(); ++q_use.count) {
    const TileShare share = items.share();
    const ItemRows queries = items.rows();
    const auto load_q = [&](int place, const CUtensorMap& map, ptx::Mbarrier& full, int batch_step) {
      load_rows<Config::kBlockM, Config::kHeadDim>(shared.q[q_use.stage()][place], map, full, queries.row_begin,
                                                   queries.head, queries.batch * batch_step);
    };
    const auto load_key_tile = [&](typename Config::Element* buffer, const CUtensorMap& map, ptx::Mbarrier& full,
                                   KeyTile tile, int batch_step) {
      load_clipped_rows<Config::kBlockN, Config::kHeadDim>(buffer, map, full, tile.row_begin, tile.num_rows,
                                                           queries.head, queries.batch * batch_step);
    };

    // Queries with their tangents
    ptx::Mbarrier& q_full = begin_copy(shared.q_pipe, q_use, Config::kQueryBytes);
    load_q(0, params.q, q_full, params.q_batch_step);
#pragma unroll
    for (int t = 0; t < Config::kDirections; ++t) load_q(1 + t, params.q_dot[t], q_full, params.q_dot_batch_step);
    // Keys and values
    KeyTileIterator<Config::kBlockN> keys(items, share.begin);
    for (int i = share.begin; i < share.end; ++i, ++num_loaded) {
      const KeyTile tile = keys.next();
      const Ring use{num_loaded};
      load_key_tile(shared.k[use.stage()], params.k, begin_copy(shared.k_pipe, use, Config::kTileBytesN), tile,
                    params.k_batch_step);
      load_key_tile(shared.v[use.stage()], params.v, begin_copy(shared.v_pipe, use, Config::kTileBytesN), tile,
                    params.v_batch_step);
    }
  }
}

// A consumer's MMAs, with their operands and accumulators.
template <typename Config>
struct DirectionsMma {
  using Element = typename Config::Element;
  using Operand = ptx::Operand;

  Operand q, k, v;                  // the first buffers of their rings, of q its rows of this consumer
  float s[Config::kBlockN / 2];     // scores, then p
  float x[Config::kBlockN / 2];     // of one direction: tangents of scores but for their scale, then h
  uint32_t p[Config::kBlockN / 4];  // of the tile before
  uint32_t h[Config::kBlockN / 4];  // of the direction before
  float out[Config::kHeadDim / 2];  // sums of p v
  float out_dot[Config::kDirections][Config::kHeadDim / 2];  // sums of h v

  __device__ DirectionsMma(DirectionsSharedStorage<Config>& shared, int consumer)
      : q(Operand::make(shared.q).advance(consumer * kWarpgroupRows * kRowBytes)),
        k(Operand::make(shared.k)),
        v(Operand::make(shared.v)) {}

  // place: 0 of q, 1 on of its tangents. One batch.
  __device__ void issue_rows(float (&d)[Config::kBlockN / 2], int q_stage, int place, int k_stage) {
    issue_row_mma<Element, Config::kHeadDim, Config::kTileBytesM, Config::kTileBytesN>(
        d, q.advance(q_stage * Config::kQueryBytes + place * Config::kTileBytesM),
        k.advance(k_stage * Config::kTileBytesN));
  }

  __device__ void issue_tangent(int direction, int v_stage) {
    issue_column_mma<Element>(out_dot[direction], h, v.advance(v_stage * Config::kTileBytesN));
  }

  // The last direction's, and the output's: one batch.
  __device__ void issue_last(int v_stage) {
    const Operand tile = v.advance(v_stage * Config::kTileBytesN);
    ptx::wgmma_fence();
    add_column_mma<Element>(out_dot[Config::kDirections - 1], h, tile, false);
    add_column_mma<Element>(out, p, tile, false);
    ptx::wgmma_commit();
  }

  __device__ void clear_sums() {
    clear(out);
#pragma unroll
    for (int t = 0; t < Config::kDirections; ++t) clear(out_dot[t]);
  }
};

// Writes a finished item, or, in a second walk, replaces what is not finite of it. Sums become results.
template <typename Config, typename Load>
__device__ inline void store_directions(const DirectionsKernelParams& params, DirectionsSharedStorage<Config>& shared,
                                        const ItemRows& tile, int first_row, DirectionsMma<Config>& mma,
                                        OnlineSoftmax softmax, const Load& load_tangents, const RowBases& bases,
                                        bool repairs) {
  using Element = typename Config::Element;
  const int lane = threadIdx.x % 32;
  const int row = tile.row_begin + first_row + lane / 4;
  const bool exists[2] = {row < tile.row_end, row + 8 < tile.row_end};
  const int64_t number = (int64_t{tile.batch} * params.table.num_heads + tile.head) * params.seqlen_q + row;
  const auto store = [&](void* data, const Strides& strides, const float (&result)[Config::kHeadDim / 2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Element* place = row_of_output<Element>(data, strides, tile, row) + 8 * i * strides.row;
      if (!repairs) {
        store_row(place, params.head_dim_v, result, i, 1, exists[i]);
      } else if (exists[i]) {
        replace_row(place, params.head_dim_v, result, i, 1);
      }
    }
  };
  const auto store_number = [&](float* numbers, int i, float value) {
    if (!repairs && exists[i] && lane % 4 == 0) numbers[number + 8 * i] = value;
  };
  softmax.finish();
  const RowNumbers inverse = inverse_of_rows(softmax);
  scale_rows(mma.out, inverse.of_row);
  if (params.out != nullptr) {
    store(params.out, params.out_strides, mma.out);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const RowLse lse = softmax.template lse<WithTangents<Element>>(i, bases);
      store_number(params.lse, i, log_sum_exp(lse, params.softmax_scale));
    }
  }
#pragma unroll
  for (int t = 0; t < Config::kDirections; ++t) {
    const RowNumbers lse_dot = finish_tangent(mma.out_dot[t], mma.out, inverse, load_tangents(t));
    if constexpr (kMayOverflow<Config>) note_overflow(shared, mma.out_dot[t], exists);
    store(static_cast<Element*>(params.out_dot) + t * params.out_dot_step, params.out_dot_strides, mma.out_dot[t]);
#pragma unroll
    for (int i = 0; i < 2; ++i) store_number(params.lse_dot + t * params.lse_dot_step, i, lse_dot.of_row[i]);
  }
}

template <typename Config>
__device__ inline void consume_directions(const DirectionsKernelParams& params, DirectionsSharedStorage<Config>& shared,
                                          int consumer) {
  using Numbers = WithTangents<typename Config::Element>;
  constexpr int kDirections = Config::kDirections;
  // Numbers that would take registers through the MMAs are computed where they are used.
  const auto own_thread = [] { return ptx::thread_anew() - kWarpgroup; };  // among those of consumers
  const auto first_row = [&] { return own_thread() / 32 * kWarpRows; };    // of this warp in the tile
  const auto bases_of = [&](bool has_all) {
    return RowBases{shared.bases + first_row() + ptx::lane_anew() / 4, has_all};
  };
  const auto ask = [&](bool asks) {
    return ptx::named_barrier_any(vote_barrier(Config::kConsumers) + own_thread() / kWarpgroup, kWarpgroup, asks);
  };
  const float scale_log2[2] = {params.softmax_scale_log2, params.softmax_scale_log2};

  // Ring uses and registers; what tangents have summed lies in shared memory
  RingUse<Config::kQueryBuffers> q_use{0};
  RingUse<Config::kStages> use{0};  // of keys and of values
  DirectionsMma<Config> mma(shared, consumer);
  OnlineSoftmax softmax;
  const auto own_tangents = [&](int t) -> float4& { return shared.tangents[t][own_thread()]; };
  const auto load_tangents = [&](int t) {
    const float4 state = own_tangents(t);
    TangentSums tangents;
    tangents.mean[0] = state.x;
    tangents.mean[1] = state.y;
    tangents.sum[0] = state.z;
    tangents.sum[1] = state.w;
    return tangents;
  };
  const auto store_tangents = [&](int t, const TangentSums& tangents) {
    own_tangents(t) = make_float4(tangents.mean[0], tangents.mean[1], tangents.sum[0], tangents.sum[1]);
  };

  // The first walk, and a second one after an overflow
  for (bool repairs = false;; repairs = true) {
    ItemWalk<Config::kBlockM> items(params.table);
    for (; items.next_with_keys(); ++q_use.count) {
      const TileShare share = items.share();
      const auto finish_scores = [&](int tile) {
        if (tile < share.num_partial) mask_columns(mma.s, items.ranges()[tile].tail);
      };
      // Sums start
      mma.clear_sums();
#pragma unroll
      for (int t = 0; t < kDirections; ++t) {
        TangentSums tangents;
        tangents.start();
        store_tangents(t, tangents);
      }
      wait_full(shared.q_pipe, q_use);
      for (int tile = share.begin; tile < share.end; ++tile, ++use.count) {
        // Direction 0
        const bool is_first = tile == share.begin;
        const RingUse<Config::kStages> before{use.count - 1};
        const auto issue_scores = [&] {
          mma.issue_rows(mma.s, q_use.stage(), 0, use.stage());
          mma.issue_rows(mma.x, q_use.stage(), 1, use.stage());
        };
        wait_full(shared.k_pipe, use);
        issue_scores();
        TangentSums tangents = load_tangents(0);
        if (is_first) {
          ptx::wgmma_wait<0>(mma.s, mma.x);
          finish_scores(tile);
          softmax.start<Numbers, 0>(mma.s, scale_log2, bases_of(repairs));
          softmax.settle<Numbers>();
          tangents.weigh(mma.x, mma.s, params.softmax_scale);
        } else {
          mma.issue_last(before.stage());
          ptx::wgmma_wait<2>(mma.s);
          finish_scores(tile);
          softmax.exponentiate<0>(mma.s, scale_log2);
          ptx::wgmma_wait<1>(mma.x);
          tangents.weigh(mma.x, mma.s, params.softmax_scale);
          const bool asks = softmax.overflows<Numbers>() || !tangents.is_finite();
          const bool is_overflow = ask(asks);
          ptx::wgmma_wait<0>(mma.out, mma.out_dot[kDirections - 1], mma.s, mma.x);
          release(shared.v_pipe, before);
          if (is_overflow) {
            // Scores once more, under raised bases
            float factor[2];
            issue_scores();
            ptx::wgmma_wait<0>(mma.s, mma.x);
            finish_scores(tile);
            softmax.raise<Numbers, 0>(mma.s, scale_log2, factor, bases_of(repairs));
            softmax.settle<Numbers>();
            scale_rows(mma.out, factor);
            tangents.scale(factor);
#pragma unroll
            for (int t = 0; t < kDirections; ++t) {
              scale_rows(mma.out_dot[t], factor);
              if (t == 0) continue;
              TangentSums others = load_tangents(t);
              others.scale(factor);
              store_tangents(t, others);
            }
            tangents.weigh(mma.x, mma.s, params.softmax_scale);
          }
        }
        const auto add_tile = [&](int t) {
          tangents.add_tile(softmax, [&](const float (&change)[2]) {
            add_rows(mma.x, mma.s, change);
            add_rows(mma.out_dot[t], mma.out, change);
          });
          store_tangents(t, tangents);
        };
        add_tile(0);
        round_operand<typename Config::Element>(mma.h, mma.x);
        wait_full(shared.v_pipe, use);
        // The others, each beside the one before
#pragma unroll
        for (int t = 1; t < kDirections; ++t) {
          mma.issue_rows(mma.x, q_use.stage(), 1 + t, use.stage());
          mma.issue_tangent(t - 1, use.stage());
          tangents = load_tangents(t);
          ptx::wgmma_wait<1>(mma.x);
          tangents.weigh(mma.x, mma.s, params.softmax_scale);
          add_tile(t);
          ptx::wgmma_wait<0>(mma.out_dot[t - 1], mma.x);
          round_operand<typename Config::Element>(mma.h, mma.x);
        }
        release(shared.k_pipe, use);
        softmax.add_tile();
        round_operand<typename Config::Element>(mma.p, mma.s);
      }
      // Last MMAs, and the results
      release(shared.q_pipe, q_use);
      const RingUse<Config::kStages> last{use.count - 1};
      mma.issue_last(last.stage());
      ptx::wgmma_wait<0>(mma.out, mma.out_dot[kDirections - 1]);
      release(shared.v_pipe, last);
      store_directions(params, shared, items.rows(), first_row(), mma, softmax, load_tangents, bases_of(repairs),
                       repairs);
    }
    if (repairs) return;
    // Items without keys
    for (bool is_left = items.item < params.table.num_items; is_left; is_left = items.next()) {
      mma.clear_sums();
      const auto none = [](int) { return TangentSums{}; };
      store_directions(params, shared, items.rows(), first_row(), mma, OnlineSoftmax{}, none, bases_of(repairs), false);
    }
    finish_items(shared);
    if (!must_repair(shared)) return;
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks)
    hopper_attention_jvp_directions_kernel(const __grid_constant__ DirectionsKernelParams params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  DirectionsSharedStorage<Config>& shared = *reinterpret_cast<DirectionsSharedStorage<Config>*>(memory);

  const auto prefetch = [&] {
    ptx::prefetch_tensor_map(params.q);
    ptx::prefetch_tensor_map(params.k);
    ptx::prefetch_tensor_map(params.v);
    for (const CUtensorMap& map : params.q_dot) ptx::prefetch_tensor_map(map);
  };
  const auto produce = [&](auto&... counts) { produce_directions(params, shared, counts...); };
  run_tangents(shared, prefetch, produce, [&](int consumer) { consume_directions(params, shared, consumer); });
}

}  // namespace mixed_attention::cuda::hopper
