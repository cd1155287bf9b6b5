// The gradients of out and its tangents on Hopper, in two kernels of one shape: persistent blocks of one producer and
// two consumer warpgroups of 64 rows that own what they write, so that nothing is added atomically.
//
// With mu, eps and gamma numbers of each query (portable/bwd_jvp_arguments.cuh has the formulas), a tile's products are
//
//   s = a c'ᵀ, z = b cᵀ + a dᵀ, e = y vᵀ, x = y2 vᵀ + y v'ᵀ     p = exp2(s - lse), h = scale z - mu,
//   g = p (e - eps), ds = p (x - gamma) + h g
//
// where queries own: dq += ds k + g k' and dq' += g k; where keys own, whose scores are transposed: dk += ds q + g q'
// and dv += (p h) y + p y2. Tensors are named by their place on a side, q, q', y, y2 or k, k', v, v', which makes the
// products of both the same ones.
//
// What is not there is zeros in shared memory, written once; as zero times infinity is not zero, a product of scores
// with such a tile takes zeros for its other side as well.
#pragma once

#include <cstdint>

#include "cuda/common/row_reference.cuh"
#include "cuda/hopper/bwd/scores.cuh"
#include "cuda/hopper/bwd_jvp/config.h"
#include "cuda/hopper/bwd_jvp/mma.cuh"
#include "cuda/hopper/bwd_jvp/pairs.cuh"
#include "cuda/hopper/bwd_jvp/params.h"
#include "cuda/hopper/fwd/epilogue.cuh"
#include "cuda/hopper/fwd/softmax.cuh"
#include "cuda/hopper/plan/work_items.cuh"
#include "cuda/hopper/tile/load_tile.cuh"
#include "cuda/hopper/tile/named_barriers.h"
#include "cuda/hopper/tile/ring.cuh"
#include "cuda/hopper/tile/run_roles.cuh"
#include "cuda/hopper/tile/store_rows.cuh"
#include "cuda/ptx/elect.cuh"
#include "cuda/ptx/fence.cuh"
#include "cuda/ptx/lane.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace mixed_attention::cuda::hopper {

template <typename Config>
__device__ inline void produce_sides(const BwdJvpKernelParams& params, BwdJvpSharedStorage<Config>& shared) {
  const auto bytes_of = [](const SideMap(&side)[kSideTensors], int bytes) {
    int sum = 0;
#pragma unroll
    for (int i = 0; i < kSideTensors; ++i) sum += side[i].exists ? bytes : 0;
    return sum;
  };
  RingUse<Config::kStages> use{0};
  uint32_t owned_parity = 1;
  for (ItemWalk<Config::kBlockM> items(params.table); items.next_with_keys(); owned_parity ^= 1) {
    const TileShare share = items.share();
    const ItemRows rows = items.rows();
    ptx::Mbarrier& owned_full =
        begin_copy(shared.owned_pipe, owned_parity, bytes_of(params.owned, Config::kTileBytesM));
#pragma unroll
    for (int i = 0; i < kSideTensors; ++i) {
      const SideMap& side = params.owned[i];
      if (!side.exists) continue;
      load_rows<Config::kBlockM, Config::kHeadDim>(shared.owned[i], side.map, owned_full, rows.row_begin, rows.head,
                                                   rows.batch * side.batch_step);
    }
    KeyTileIterator<Config::kBlockN> tiles(items, share.begin);
    for (int tile = share.begin; tile < share.end; ++tile, ++use.count) {
      const KeyTile streamed = tiles.next();
      ptx::Mbarrier& full = begin_copy(shared.streamed_pipe, use, bytes_of(params.streamed, Config::kTileBytesN));
#pragma unroll
      for (int i = 0; i < kSideTensors; ++i) {
        const SideMap& side = params.streamed[i];
        if (!side.exists) continue;
        load_clipped_rows<Config::kBlockN, Config::kHeadDim>(shared.streamed[use.stage()][i], side.map, full,
                                                             streamed.row_begin, streamed.num_rows, rows.head,
                                                             rows.batch * side.batch_step);
      }
    }
  }
}

// Reads the numbers of the queries of every tile that streams by, by kColumnWarps beside the producer.
template <typename Config>
__device__ inline void produce_columns(const BwdJvpKernelParams& params, BwdJvpSharedStorage<Config>& shared) {
  RingUse<Config::kStages> use{0};
  for (ItemWalk<Config::kBlockM> items(params.table); items.next_with_keys();) {
    KeyTileIterator<Config::kBlockN> tiles(items);
    for (int num_left = items.tiles().num_tiles; num_left > 0; --num_left, ++use.count) {
      const KeyTile queries = tiles.next();
      // Computed anew for every tile: registers are few.
      const ItemRows rows = items.rows();
      const int64_t first_query = (int64_t{rows.batch} * params.table.num_heads + rows.head) * params.seqlen_q;
      write_columns(shared.columns[use.stage()], params.rows, first_query + queries.row_begin, queries.num_rows,
                    [&] { wait_empty(shared.streamed_pipe, use); });
      sync_and_arrive_as_warp(shared.streamed_pipe.full[use.stage()]);
    }
  }
}

template <typename Config>
__device__ inline void consume_sides(const BwdJvpKernelParams& params, BwdJvpSharedStorage<Config>& shared,
                                     int consumer) {
  using Element = typename Config::Element;
  constexpr bool kOwnsKeys = Config::kOwnsKeys;
  constexpr int kBlockN = Config::kBlockN, kHeadDim = Config::kHeadDim;
  // The first of a thread's rows in the tile, computed where it is used: it would take a register through the MMAs.
  const auto own_row = [] { return (ptx::thread_anew() - kWarpgroup) / 32 * kWarpRows + ptx::lane_anew() / 4; };
  const bool has_references = *params.rows.has_references != 0;

  // Consumer 0's first turn comes from the last one.
  const int own_turn = kTurnBarrier + consumer;
  const int next_turn = kTurnBarrier + (consumer + 1) % Config::kConsumers;
  if (consumer == Config::kConsumers - 1) ptx::named_barrier_arrive(next_turn, 2 * kWarpgroup);

  SideMma<Config> mma(params, shared, consumer);
  RingUse<Config::kStages> use{0};
  uint32_t owned_parity = 0;
  for (ItemWalk<Config::kBlockM> items(params.table); items.next();) {
    clear(mma.first);
    clear(mma.second);
    const TileShare share = items.share();

    if (share.begin < share.end) {
      // The numbers of its sequence's first query.
      const auto first_query = [&] {
        const ItemRows rows = items.rows();
        return (int64_t{rows.batch} * params.table.num_heads + rows.head) * params.seqlen_q;
      };
      NumbersOfRows of_rows;
      if constexpr (!kOwnsKeys) {
        const int row = items.rows().row_begin + own_row();
        of_rows.read(params.rows, first_query() + row, items.rows().row_end - row);
      }
      KeyTileIterator<kBlockN> tiles(items, share.begin);
      KeyTile streamed = tiles.next();
      // p of a tile, under its other products.
      const auto weigh = [&](int tile) {
        if (has_references) {
          const ItemRows rows = items.rows();
          const RowReference* const references = params.rows.references + first_query();
          const int first = kOwnsKeys ? streamed.row_begin + ptx::lane_anew() % 4 * 2 : rows.row_begin + own_row();
          const int end = kOwnsKeys ? streamed.row_begin + streamed.num_rows : rows.row_end;
#pragma unroll
          for (int i = 0; i < kBlockN / 2; ++i) {
            const int row = first + (kOwnsKeys ? 8 * (i / 4) + i % 2 : 8 * row_of(i));
            if (row < end) mma.s[i] = relative_score(mma.s[i], references[row]);
          }
        }
        if (tile < share.num_partial) mask_columns(mma.s, items.ranges()[tile].tail);
        if constexpr (kOwnsKeys) {
          ColumnStats<kBlockN> lse_log2;
          lse_log2.load(shared.columns[use.stage()].lse_log2);
          exponentiate_pairs(mma.s, lse_log2, params.softmax_scale_log2);
        } else {
          exponentiate_pairs(mma.s, of_rows.lse_log2, params.softmax_scale_log2);
        }
        hold_p(mma.s, ptx::shared_address(&shared));
        mma.wait_for_tangents();
      };
      const auto take_operands = [&] {
        const auto differentiate = [&](const auto& numbers) {
          differentiate_pairs<Config::kHasFourth>(mma.s, mma.z, mma.e, mma.x, numbers, params.softmax_scale);
        };
        if constexpr (kOwnsKeys) {
          differentiate(NumbersOfColumns(shared.columns[use.stage()]));
        } else {
          differentiate(of_rows);
        }
        mma.take_operands();
      };

      ptx::mbarrier_wait(shared.owned_pipe.full, owned_parity);
      owned_parity ^= 1;
      mma.load(shared, consumer * kWarpgroupRows + ptx::thread_anew() / 32 % 4 * kWarpRows);
      wait_full(shared.streamed_pipe, use);
      ptx::wgmma_fence();
      mma.issue_scores(use);
      mma.issue_tangents(use);
      ptx::wgmma_wait<1>(mma.s);
      weigh(share.begin);
      for (int tile = share.begin + 1; tile < share.end; ++tile) {
        const RingUse<Config::kStages> next{use.count + 1};
        take_operands();
        streamed = tiles.next();
        wait_full(shared.streamed_pipe, next);
        ptx::named_barrier_sync(own_turn, 2 * kWarpgroup);
        ptx::wgmma_fence();
        mma.issue_gradients(use);
        mma.issue_scores(next);
        mma.template wait_for_gradients<1>();
        release(shared.streamed_pipe, use);
        use = next;
        ptx::wgmma_fence();
        mma.issue_tangents(use);
        ptx::named_barrier_arrive(next_turn, 2 * kWarpgroup);
        ptx::wgmma_wait<1>(mma.s);
        weigh(tile);
      }
      take_operands();
      ptx::wgmma_fence();
      mma.issue_gradients(use);
      mma.template wait_for_gradients<0>();
      release(shared.streamed_pipe, use);
      ++use.count;
      release(shared.owned_pipe);
    }

    const auto store = [&](const float (&grad)[kHeadDim / 2], const SideGrad& target) {
      if (target.data == nullptr) return;
      const ItemRows rows = items.rows();
      const int row = rows.row_begin + own_row();
      Element* place = static_cast<Element*>(target.data) + rows.batch * target.strides.batch +
                       rows.head * target.strides.head + row * target.strides.row;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        store_row(place + 8 * i * target.strides.row, target.num_columns, grad, i, target.factor,
                  row + 8 * i < rows.row_end);
      }
    };
    store(mma.first, params.first);
    if constexpr (Config::kHasSecondGradient) store(mma.second, params.second);
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    hopper_attention_bwd_jvp_kernel(const __grid_constant__ BwdJvpKernelParams params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  BwdJvpSharedStorage<Config>& shared = *reinterpret_cast<BwdJvpSharedStorage<Config>*>(memory);

  // Zeros for what is not there: they stay, as no copy comes.
  const auto fill = [](auto& tile) {
    uint4* const words = reinterpret_cast<uint4*>(&tile);
    for (int i = threadIdx.x; i < static_cast<int>(sizeof(tile) / sizeof(uint4)); i += Config::kThreads) {
      words[i] = uint4{};
    }
  };
  for (int i = 0; i < kSideTensors; ++i) {
    if (!params.owned[i].exists) fill(shared.owned[i]);
    for (int stage = 0; stage < Config::kStages; ++stage) {
      if (!params.streamed[i].exists) fill(shared.streamed[stage][i]);
    }
  }
  ptx::fence_async_shared();
  const auto prepare = [&] {
    constexpr int kConsumerWarps = Config::kConsumers * kWarpgroup / 32;
    for (int i = 0; i < kSideTensors; ++i) {
      if (params.owned[i].exists) ptx::prefetch_tensor_map(params.owned[i].map);
      if (params.streamed[i].exists) ptx::prefetch_tensor_map(params.streamed[i].map);
    }
    init_pipe(shared.owned_pipe, 1, kConsumerWarps);
    init_pipe(shared.streamed_pipe, 1 + (Config::kOwnsKeys ? kColumnWarps : 0), kConsumerWarps);
    ptx::mbarrier_fence_init();
  };
  const auto produce = [&](int warp) {
    if (warp == 0 && ptx::elect_one()) produce_sides(params, shared);
    if constexpr (Config::kOwnsKeys) {
      if (0 < warp && warp <= kColumnWarps) produce_columns(params, shared);
    }
  };
  run_roles<Config>(prepare, produce, [&](int consumer) { consume_sides(params, shared, consumer); });
}

}  // namespace mixed_attention::cuda::hopper
