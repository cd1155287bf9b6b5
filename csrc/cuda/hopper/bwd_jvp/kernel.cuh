// The gradients of out and its tangents on Hopper, in two kernels of one shape: persistent blocks of one producer and
// two consumer warpgroups of 64 rows that own what they write, so that nothing is added atomically. Double backward has
// a third one of the same shape, which owns dk and dv and adds to dq by a third warpgroup (dq_adder.cuh).
//
// With mu, eps and gamma numbers of each query (portable/bwd_jvp_arguments.cuh has the formulas), a tile's products are
//
//   s = a c'ᵀ, z = b cᵀ + a dᵀ, e = y vᵀ, x = y2 vᵀ + y v'ᵀ     p = exp2(s - lse), h = scale z - mu,
//   g = p (e - eps), ds = p (x - gamma) + h g
//
// where queries own: dq += ds k + g k' and dq' += g k; where keys own, whose scores are transposed: dk += ds q + g q'
// and dv += (p h) y + p y2. Tensors are named by their place on a side, q, q', y, y2 or k, k', v, v', which makes the
// products of both the same ones (mma.cuh).
//
// In the step for a tile, or for half of one, what the step before adds to the gradients and the scores of this one are
// issued together, z, e and x as soon as the operands of the former are free, and exponentials run under these. At the
// end of a step no MMA is in flight, which the compiler needs. The consumers take turns at issuing.
//
// Who signals whom: full by TMA (one arrival of the producer and the bytes) and, where keys own, by the warps that
// write the numbers of queries; empty by one arrival of every warp that reads.
#pragma once

#include <cstdint>

#include "cuda/common/row_reference.cuh"
#include "cuda/hopper/bwd/own_keys.cuh"
#include "cuda/hopper/bwd/scores.cuh"
#include "cuda/hopper/bwd_jvp/config.h"
#include "cuda/hopper/bwd_jvp/dq_adder.cuh"
#include "cuda/hopper/bwd_jvp/items.cuh"
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
#include "cuda/ptx/keep.cuh"
#include "cuda/ptx/lane.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace mixed_attention::cuda::hopper {

template <typename Config>
__device__ inline void produce_sides(const BwdJvpKernelParams<Config>& params, BwdJvpSharedStorage<Config>& shared) {
  const auto bytes_of = [](const SideMap(&side)[kSideTensors], int bytes) {
    int sum = 0;
#pragma unroll
    for (int i = 0; i < kSideTensors; ++i) sum += side[i].exists ? bytes : 0;
    return sum;
  };
  RingUse<Config::kStages> use{0};
  uint32_t owned_parity = 1;
  for (SideItems<Config> items(params.table); items.next_with_keys(); owned_parity ^= 1) {
    const ItemRows rows = items.rows();
    // Rows that own
    ptx::Mbarrier& owned_full =
        begin_copy(shared.owned_pipe, owned_parity, bytes_of(params.owned, Config::kTileBytesM));
#pragma unroll
    for (int i = 0; i < kSideTensors; i += Config::kOwnedStep) {
      const SideMap& side = params.owned[i];
      if (!side.exists) continue;
      auto* const buffer = shared.owned[i / Config::kOwnedStep];
      const int batch = rows.batch * side.batch_step;
      if constexpr (Config::kAddsDq) {  // what lies behind the keys would reach dq
        load_clipped_rows<Config::kBlockM, Config::kHeadDim>(buffer, side.map, owned_full, rows.row_begin,
                                                             min(Config::kBlockM, rows.row_end - rows.row_begin),
                                                             rows.head, batch);
      } else {
        load_rows<Config::kBlockM, Config::kHeadDim>(buffer, side.map, owned_full, rows.row_begin, rows.head, batch);
      }
    }
    // Rows that stream
    auto tiles = tiles_of<Config>(items);
    for (int num_left = items.tiles().num_tiles; num_left > 0; --num_left, ++use.count) {
      const auto streamed = tiles.next();
      ptx::Mbarrier& full = begin_copy(shared.streamed_pipe, use, bytes_of(params.streamed, Config::kTileBytesN));
#pragma unroll
      for (int i = 0; i < Config::kStreamedTensors; ++i) {
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
__device__ inline void produce_columns(const BwdJvpKernelParams<Config>& params, BwdJvpSharedStorage<Config>& shared) {
  RingUse<Config::kStages> use{0};
  for (SideItems<Config> items(params.table); items.next_with_keys();) {
    auto tiles = tiles_of<Config>(items);
    for (int num_left = items.tiles().num_tiles; num_left > 0; --num_left, ++use.count) {
      const auto queries = tiles.next();
      // The sequence is found anew for every tile, as registers are few.
      const ItemRows rows = items.rows();
      write_columns(shared.columns[use.stage()], params.rows, first_query_of(params, rows), rows, queries.row_begin,
                    queries.num_rows, [&] { wait_empty(shared.streamed_pipe, use); });
      sync_and_arrive_as_warp(shared.streamed_pipe.full[use.stage()]);
    }
  }
}

template <typename Config>
__device__ inline void consume_sides(const BwdJvpKernelParams<Config>& params, BwdJvpSharedStorage<Config>& shared,
                                     int consumer) {
  using Element = typename Config::Element;
  constexpr bool kOwnsKeys = Config::kOwnsKeys;
  constexpr int kStepRows = Config::kStepRows, kHeadDim = Config::kHeadDim;
  // The first of a warp's rows in the tile, and of a thread's, computed where they are used: they would take registers
  // through the MMAs.
  const auto warp_row = [] { return (ptx::thread_anew() - kWarpgroup) / 32 * kWarpRows; };
  const auto own_row = [&] { return warp_row() + ptx::lane_anew() / 4; };
  const bool has_references = !kOwnsKeys && *params.rows.has_references != 0;  // columns have theirs in shared memory

  // Barriers are named anew where they are used, likewise. Consumer 0's first turn comes from the last one.
  const auto take_turn = [&] { ptx::named_barrier_sync(kTurnBarrier + ptx::keep(consumer), 2 * kWarpgroup); };
  const auto pass_turn = [&] {
    ptx::named_barrier_arrive(kTurnBarrier + (ptx::keep(consumer) + 1) % Config::kConsumers, 2 * kWarpgroup);
  };
  if (consumer == Config::kConsumers - 1) pass_turn();

  SideMma<Config> mma(params, shared, consumer);
  Step<Config> step{0};
  uint32_t owned_parity = 0;
  for (SideItems<Config> items(params.table); items.next();) {
    clear(mma.first);
    clear(mma.second);

    if (const int num_tiles = items.tiles().num_tiles; num_tiles > 0) {
      // Numbers of the thread's two queries
      NumbersOfRows of_rows;
      if constexpr (!kOwnsKeys) {
        const ItemRows rows = items.rows();
        const int row = rows.row_begin + own_row();
        of_rows.read(params.rows, first_query_of(params, rows) + row, rows.row_end - row);
      }
      const auto columns = [&]() -> const ColumnNumbersOfTile& { return shared.columns[step.use().stage()]; };
      // p of the rows of a step, under their other products.
      const auto weigh = [&]([[maybe_unused]] int tile) {
        if constexpr (kOwnsKeys) {
          const int first_column = step.first_row(), num_columns = columns().num_rows - first_column;
          if (columns().has_references != 0) {
            const int64_t query = first_query_of(params, items.rows()) + columns().row_begin + first_column;
            relate_existing_columns(mma.s, params.rows.references + query, num_columns);
          }
          if (num_columns < kStepRows) mask_columns(mma.s, num_columns);
          ColumnStats<kStepRows> lse_log2;
          lse_log2.load(columns().lse_log2 + first_column);
          exponentiate_pairs(mma.s, lse_log2, params.softmax_scale_log2);
        } else {
          if (has_references) {
            const ItemRows rows = items.rows();
            const int row = rows.row_begin + own_row();
            relate_existing_rows(mma.s, params.rows.references + first_query_of(params, rows) + row,
                                 rows.row_end - row);
          }
          if (tile < items.tiles().num_partial) mask_columns(mma.s, items.ranges()[tile].tail);
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
          differentiate(NumbersOfColumns<kStepRows>(columns(), step.first_row()));
        } else {
          differentiate(of_rows);
        }
        mma.take_operands();
        if constexpr (Config::kAddsDq) wait_for_room(shared.dq_exchange, step);
      };
      const auto hand_over_factors = [&] {
        if constexpr (Config::kAddsDq) {
          hand_over(shared.dq_exchange, step, mma, warp_row(), OwnKeys<false>(columns().num_owned - warp_row()));
        }
      };

      // Products of the first step
      ptx::mbarrier_wait(shared.owned_pipe.full, owned_parity);
      owned_parity ^= 1;
      mma.load(shared, warp_row());
      wait_full(shared.streamed_pipe, step.use());
      ptx::wgmma_fence();
      mma.issue_scores(step);
      mma.issue_tangents(step);
      mma.template wait_for_scores<1>();
      weigh(0);
      // Gradients of a step, and scores of the next
      for (int i = 1; i < num_tiles * step.kPerTile; ++i) {
        const Step<Config> next{step.count + 1};
        take_operands();
        wait_full(shared.streamed_pipe, next.use());
        take_turn();
        ptx::wgmma_fence();
        mma.issue_gradients(step);
        mma.issue_scores(next);
        hand_over_factors();
        mma.template wait_for_gradients<1>();
        if (step.is_last_of_tile()) release(shared.streamed_pipe, step.use());
        step = next;
        ptx::wgmma_fence();
        mma.issue_tangents(step);
        pass_turn();
        mma.template wait_for_scores<1>();
        weigh(i);
      }
      // Gradients of the last step
      take_operands();
      ptx::wgmma_fence();
      mma.issue_gradients(step);
      hand_over_factors();
      mma.template wait_for_gradients<0>();
      release(shared.streamed_pipe, step.use());
      ++step.count;
      release(shared.owned_pipe);
    }

    // Store of the gradients
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
    hopper_attention_bwd_jvp_kernel(const __grid_constant__ BwdJvpKernelParams<Config> params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  BwdJvpSharedStorage<Config>& shared = *reinterpret_cast<BwdJvpSharedStorage<Config>*>(memory);

  // Zeros for what is not there: they stay, as no copy comes.
  const auto fill = [](auto& tile) {
    uint4* const words = reinterpret_cast<uint4*>(&tile);
    for (int i = threadIdx.x; i < static_cast<int>(sizeof(tile) / sizeof(uint4)); i += Config::kThreads) {
      words[i] = uint4{};
    }
  };
  for (int i = 0; i < kSideTensors; i += Config::kOwnedStep) {
    if (!params.owned[i].exists) fill(shared.owned[i / Config::kOwnedStep]);
  }
  for (int i = 0; i < Config::kStreamedTensors; ++i) {
    if (params.streamed[i].exists) continue;
    for (int stage = 0; stage < Config::kStages; ++stage) fill(shared.streamed[stage][i]);
  }
  ptx::fence_async_shared();
  // Barriers, and who does what
  const auto prepare = [&] {
    constexpr int kConsumerWarps = Config::kConsumers * kWarpgroup / 32;
    for (int i = 0; i < kSideTensors; ++i) {
      if (params.owned[i].exists) ptx::prefetch_tensor_map(params.owned[i].map);
      if (params.streamed[i].exists) ptx::prefetch_tensor_map(params.streamed[i].map);
    }
    init_pipe(shared.owned_pipe, 1, kConsumerWarps + (Config::kAddsDq ? kWarpgroup / 32 : 0));
    init_pipe(shared.streamed_pipe, 1 + (Config::kOwnsKeys ? kColumnWarps : 0), kConsumerWarps);
    if constexpr (Config::kAddsDq) init_pipe(shared.dq_exchange.pipe, kConsumerWarps, kWarpgroup / 32);
    ptx::mbarrier_fence_init();
  };
  const auto produce = [&](int warp) {
    if (warp == 0 && ptx::elect_one()) produce_sides(params, shared);
    if constexpr (Config::kOwnsKeys) {
      if (0 < warp && warp <= kColumnWarps) produce_columns(params, shared);
    }
  };
  const auto consume = [&](int consumer) { consume_sides(params, shared, consumer); };
  if constexpr (Config::kAddsDq) {
    run_roles<Config>(prepare, produce, consume, [&] { add_dq(params, shared); });
  } else {
    run_roles<Config>(prepare, produce, consume);
  }
}

}  // namespace mixed_attention::cuda::hopper
