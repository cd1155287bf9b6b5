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
#include "cuda/hopper/bwd_jvp/params.h"
#include "cuda/hopper/fwd/epilogue.cuh"
#include "cuda/hopper/fwd/softmax.cuh"
#include "cuda/hopper/plan/work_items.cuh"
#include "cuda/hopper/tile/fragment_values.cuh"
#include "cuda/hopper/tile/load_tile.cuh"
#include "cuda/hopper/tile/mma.cuh"
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

// The numbers of a thread's two queries, or of the columns of a tile of queries.
struct NumbersOfRows {
  RowNumbers lse_log2, mu, eps, gamma;
};

struct NumbersOfColumns {
  ColumnNumbers lse_log2, mu, eps, gamma;

  __device__ explicit NumbersOfColumns(const ColumnNumbersOfTile& tile)
      : lse_log2(tile.lse_log2), mu(tile.mu), eps(tile.eps), gamma(tile.gamma) {}
};

template <int kCount, typename Numbers>
__device__ inline void exponentiate_pairs(float (&s)[kCount], const Numbers& numbers, float scale_log2) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) s[i] = ptx::exp2(fmaf(s[i], scale_log2, -numbers.lse_log2[i]));
}

// Makes of products what they are multiplied as: x becomes ds, e becomes g, z becomes p h.
template <int kCount, typename Numbers>
__device__ inline void differentiate_pairs(const float (&p)[kCount], float (&z)[kCount], float (&e)[kCount],
                                           float (&x)[kCount], const Numbers& numbers, float scale) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float h = fmaf(z[i], scale, -numbers.mu[i]);
    const float g = p[i] * (e[i] - numbers.eps[i]);
    x[i] = fmaf(h, g, p[i] * (x[i] - numbers.gamma[i]));
    e[i] = g;
    z[i] = p[i] * h;
  }
}

// Products of the tensors `pair` and the one behind it of both sides, crosswise. kOwned, kStreamed: which side may have
// the one behind. multiply(d, owned, streamed, overwrites) issues one.
template <bool kOwned, bool kStreamed, int kCount, typename Multiply>
__device__ inline void multiply_pair(const BwdJvpKernelParams& params, float (&d)[kCount], int pair,
                                     const Multiply& multiply) {
  if constexpr (kOwned && kStreamed) {
    multiply(d, pair + 1, params.owned[pair + 1].exists ? pair : pair + 1, true);
    multiply(d, params.streamed[pair + 1].exists ? pair : pair + 1, pair + 1, false);
  } else if constexpr (kOwned) {
    multiply(d, pair + 1, pair, true);
  } else if constexpr (kStreamed) {
    multiply(d, pair, pair + 1, true);
  }
}

template <typename Config>
__device__ inline void consume_sides(const BwdJvpKernelParams& params, BwdJvpSharedStorage<Config>& shared,
                                     int consumer) {
  using Element = typename Config::Element;
  using Operand = ptx::Operand;
  constexpr bool kOwnsKeys = Config::kOwnsKeys;
  constexpr int kBlockN = Config::kBlockN, kHeadDim = Config::kHeadDim;
  // The first of a thread's rows in the tile, computed where it is used: it would take a register through the MMAs.
  const auto own_row = [] { return (ptx::thread_anew() - kWarpgroup) / 32 * kWarpRows + ptx::lane_anew() / 4; };
  const Operand owned_side = Operand::make(shared.owned).advance(consumer * kWarpgroupRows * kRowBytes);
  const Operand streamed_ring = Operand::make(shared.streamed);
  const bool has_references = *params.rows.has_references != 0;

  RingUse<Config::kStages> use{0};
  uint32_t owned_parity = 0;
  for (ItemWalk<Config::kBlockM> items(params.table); items.next();) {
    float first[kHeadDim / 2] = {}, second[kHeadDim / 2] = {};
    const TileShare share = items.share();
    // The numbers of its sequence's first query.
    const auto first_query = [&] {
      const ItemRows rows = items.rows();
      return (int64_t{rows.batch} * params.table.num_heads + rows.head) * params.seqlen_q;
    };

    if (share.begin < share.end) {
      NumbersOfRows of_rows;
      if constexpr (!kOwnsKeys) {
        const ItemRows rows = items.rows();
        const int64_t queries = first_query();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = rows.row_begin + own_row() + 8 * i;
          const bool exists = row < rows.row_end;
          of_rows.lse_log2.of_row[i] = exists ? params.rows.lse_log2[queries + row] : INFINITY;
          of_rows.mu.of_row[i] = exists ? params.rows.mu[queries + row] : 0;
          of_rows.eps.of_row[i] = exists ? params.rows.eps[queries + row] : 0;
          of_rows.gamma.of_row[i] = exists ? params.rows.gamma[queries + row] : 0;
        }
      }
      KeyTileIterator<kBlockN> tiles(items, share.begin);
      ptx::mbarrier_wait(shared.owned_pipe.full, owned_parity);
      owned_parity ^= 1;
      for (int tile = share.begin; tile < share.end; ++tile, ++use.count) {
        const KeyTile streamed = tiles.next();
        // The columns' numbers, by as many threads; they come while products are on their way.
        ColumnNumbersOfTile& columns = shared.columns[consumer][use.count % 2];
        float number[2];
        if constexpr (kOwnsKeys) {
          const int column = threadIdx.x % kBlockN, half = threadIdx.x / kBlockN % 2;
          const bool exists = column < streamed.num_rows;
          const int64_t query = first_query() + streamed.row_begin + (exists ? column : 0);
          const float a = half == 0 ? params.rows.lse_log2[query] : params.rows.eps[query];
          const float b = half == 0 ? params.rows.mu[query] : params.rows.gamma[query];
          number[0] = exists ? a : 0;
          number[1] = exists ? b : 0;
        }

        float s[kBlockN / 2], z[kBlockN / 2], e[kBlockN / 2], x[kBlockN / 2];
        if constexpr (!Config::kOwnsFourth && !Config::kStreamsFourth) clear(x);
        const auto owned = [&](int i) { return owned_side.advance(i * Config::kTileBytesM); };
        const auto tile_of = [&](int i) {
          return streamed_ring.advance((use.stage() * kSideTensors + i) * Config::kTileBytesN);
        };
        const auto multiply = [&](float (&d)[kBlockN / 2], int a, int b, bool overwrites) {
          add_row_mma<Element, kHeadDim, Config::kTileBytesM, Config::kTileBytesN>(d, owned(a), tile_of(b), overwrites);
        };
        wait_full(shared.streamed_pipe, use);
        ptx::wgmma_fence();
        multiply(s, 0, 0, true);
        ptx::wgmma_commit();
        multiply_pair<Config::kOwnsSecond, Config::kStreamsSecond>(params, z, 0, multiply);
        multiply(e, 2, 2, true);
        multiply_pair<Config::kOwnsFourth, Config::kStreamsFourth>(params, x, 2, multiply);
        ptx::wgmma_commit();
        if constexpr (kOwnsKeys) {
          const int column = threadIdx.x % kBlockN, half = threadIdx.x / kBlockN % 2;
          (half == 0 ? columns.lse_log2 : columns.eps)[column] = number[0];
          (half == 0 ? columns.mu : columns.gamma)[column] = number[1];
          ptx::named_barrier_sync(kTurnBarrier + consumer, kWarpgroup);
        }
        ptx::wgmma_wait<1>(s);
        if (has_references) {
          const ItemRows rows = items.rows();
          const RowReference* const references = params.rows.references + first_query();
          const int first = kOwnsKeys ? streamed.row_begin + ptx::lane_anew() % 4 * 2 : rows.row_begin + own_row();
          const int end = kOwnsKeys ? streamed.row_begin + streamed.num_rows : rows.row_end;
#pragma unroll
          for (int i = 0; i < kBlockN / 2; ++i) {
            const int row = first + (kOwnsKeys ? 8 * (i / 4) + i % 2 : 8 * row_of(i));
            if (row < end) s[i] = relative_score(s[i], references[row]);
          }
        }
        if (tile < share.num_partial) mask_columns(s, items.ranges()[tile].tail);
        const auto differentiate = [&](const auto& numbers) {
          exponentiate_pairs(s, numbers, params.softmax_scale_log2);
          hold_p(s, ptx::shared_address(&shared));
          if constexpr (Config::kOwnsFourth || Config::kStreamsFourth) {
            ptx::wgmma_wait<0>(z, e, x);
          } else {
            ptx::wgmma_wait<0>(z, e);
          }
          differentiate_pairs(s, z, e, x, numbers, params.softmax_scale);
        };
        if constexpr (kOwnsKeys) {
          differentiate(NumbersOfColumns(columns));
        } else {
          differentiate(of_rows);
        }
        uint32_t ds[kBlockN / 4], g[kBlockN / 4];
        round_operand<Element>(ds, x);
        round_operand<Element>(g, e);
        if constexpr (kOwnsKeys) {
          uint32_t p[kBlockN / 4], ph[kBlockN / 4];
          round_operand<Element>(p, s);
          round_operand<Element>(ph, z);
          ptx::wgmma_fence();
          add_column_mma<Element>(first, ds, tile_of(0), false);
          add_column_mma<Element>(first, g, tile_of(1), false);
          add_column_mma<Element>(second, ph, tile_of(2), false);
          if constexpr (Config::kStreamsFourth) add_column_mma<Element>(second, p, tile_of(3), false);
        } else {
          ptx::wgmma_fence();
          add_column_mma<Element>(first, ds, tile_of(0), false);
          if constexpr (Config::kStreamsSecond) add_column_mma<Element>(first, g, tile_of(1), false);
          add_column_mma<Element>(second, g, tile_of(0), false);
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>(first, second);
        release(shared.streamed_pipe, use);
      }
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
    store(first, params.first);
    store(second, params.second);
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
    init_pipe(shared.streamed_pipe, 1, kConsumerWarps);
    ptx::mbarrier_fence_init();
  };
  const auto produce = [&](int warp) {
    if (warp == 0 && ptx::elect_one()) produce_sides(params, shared);
  };
  run_roles<Config>(prepare, produce, [&](int consumer) { consume_sides(params, shared, consumer); });
}

}  // namespace mixed_attention::cuda::hopper
