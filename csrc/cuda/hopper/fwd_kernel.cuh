// Attention forward on Hopper: persistent blocks of one producer and two or three consumer warpgroups.
//
// An item of a block is a tile of kBlockM query rows of one head. The producer, a single thread, copies its queries and
// then its key and value tiles into rings of kStages buffers. Each consumer owns 64 of the rows and computes, tile by
// tile, s = q k^T, the online softmax of s into weights p, and o += p v, with s, p and o in registers.
//
// Two overlaps keep the tensor cores busy. Within a warpgroup, s of tile j is issued together with o += p v of tile
// j - 1, and the softmax of j runs under the latter. Between warpgroups, a ring of named barriers makes them issue
// their products in turn, so that the softmax of one lies under the products of the others.
//
// Who signals whom: *_full is completed by the copy engine (one arrival of the producer and the bytes), *_empty by one
// arrival of every consumer warp. Items without keys take part in no barrier.
#pragma once

#include <cstdint>

#include "cuda/hopper/config.h"
#include "cuda/hopper/fwd_params.h"
#include "cuda/hopper/load_tile.cuh"
#include "cuda/hopper/products.cuh"
#include "cuda/hopper/ring.cuh"
#include "cuda/hopper/softmax.cuh"
#include "cuda/hopper/store_rows.cuh"
#include "cuda/hopper/work_items.cuh"
#include "cuda/ptx/elect.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/setmaxnreg.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace mixed_attention::cuda::hopper {

template <typename Config>
__device__ inline void init_barriers(FwdSharedStorage<Config>& shared) {
  constexpr int kConsumerWarps = Config::kConsumers * kWarpgroup / 32;
  ptx::mbarrier_init(shared.q_full, 1);
  ptx::mbarrier_init(shared.q_empty, kConsumerWarps);
  for (int stage = 0; stage < Config::kStages; ++stage) {
    ptx::mbarrier_init(shared.k_full[stage], 1);
    ptx::mbarrier_init(shared.k_empty[stage], kConsumerWarps);
    ptx::mbarrier_init(shared.v_full[stage], 1);
    ptx::mbarrier_init(shared.v_empty[stage], kConsumerWarps);
  }
  ptx::mbarrier_fence_init();
}

template <typename Config>
__device__ inline void produce(const FwdKernelParams& params, FwdSharedStorage<Config>& shared) {
  using Ring = RingUse<Config::kStages>;
  uint32_t num_loaded = 0;  // key tiles, over all items
  uint32_t q_parity = 1;
  for (WorkItems<Config::kBlockM> item(params.table); item.next();) {
    const int num_tiles = item.tiles().num_tiles;
    if (num_tiles == 0) continue;

    const auto load_key_tile = [&](typename Config::Element* buffer, const CUtensorMap& map, ptx::Mbarrier& full,
                                   KeyTile tile, int batch_step) {
      ptx::mbarrier_arrive_expect(full, Config::kTileBytesN);
      load_clipped_rows<Config::kBlockN, Config::kHeadDim>(buffer, map, full, tile.row_begin, tile.num_rows, item.head,
                                                           item.batch * batch_step);
    };
    const auto load_k = [&](KeyTile tile, Ring use) {
      ptx::mbarrier_wait(shared.k_empty[use.stage()], use.empty_parity());
      load_key_tile(shared.k[use.stage()], params.k, shared.k_full[use.stage()], tile, params.k_batch_step);
    };
    const auto load_v = [&](KeyTile tile, Ring use) {
      ptx::mbarrier_wait(shared.v_empty[use.stage()], use.empty_parity());
      load_key_tile(shared.v[use.stage()], params.v, shared.v_full[use.stage()], tile, params.v_batch_step);
    };

    // In the order in which the consumers need them: keys run one tile ahead of values.
    KeyTileIterator<Config::kBlockN> keys(params.table, item.tiles());
    KeyTile tile = keys.next();
    load_k(tile, Ring{num_loaded});
    ptx::mbarrier_wait(shared.q_empty, q_parity);
    q_parity ^= 1;
    ptx::mbarrier_arrive_expect(shared.q_full, Config::kTileBytesM);
    load_rows<Config::kBlockM, Config::kHeadDim>(shared.q, params.q, shared.q_full, item.row_begin, item.head,
                                                 item.batch * params.q_batch_step);
    for (int i = 1; i < num_tiles; ++i) {
      const KeyTile next = keys.next();
      load_k(next, Ring{num_loaded + 1});
      load_v(tile, Ring{num_loaded});
      tile = next;
      ++num_loaded;
    }
    load_v(tile, Ring{num_loaded});
    ++num_loaded;
  }
}

template <int kCount>
__device__ inline void scale_rows(float (&o)[kCount], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) o[i] *= factor[row_of(i)];
}

template <typename Config>
__device__ inline void consume(const FwdKernelParams& params, FwdSharedStorage<Config>& shared, int consumer) {
  using Element = typename Config::Element;
  using Ring = RingUse<Config::kStages>;
  const int lane = threadIdx.x % 32;
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32 % 4, 0);
  const int first_row = consumer * kWarpgroupRows + warp * kWarpRows;  // of this warp in the tile

  const ptx::Operand q = ptx::Operand::make(shared.q).advance(consumer * kWarpgroupRows * kRowBytes);
  const ptx::Operand k_ring = ptx::Operand::make(shared.k);
  const ptx::Operand v_ring = ptx::Operand::make(shared.v, Config::kSlabBytesN);
  Element* staging = shared.out + first_row * Config::kHeadDim;

  // Named barrier 1 + i: it is consumer i's turn to issue. Consumer 0's first turn comes from the last one.
  const int own_turn = 1 + consumer;
  const int next_turn = 1 + (consumer + 1) % Config::kConsumers;
  if (consumer == Config::kConsumers - 1) ptx::named_barrier_arrive(next_turn, 2 * kWarpgroup);

  const auto issue_scores = [&](float (&s)[Config::kBlockN / 2], Ring use) {
    issue_row_products<Element, Config::kHeadDim, Config::kSlabBytesM, Config::kSlabBytesN>(
        s, q, k_ring.advance(use.stage() * Config::kTileBytesN));
  };
  const auto issue_output = [&](float (&o)[Config::kHeadDim / 2], const uint32_t (&p)[Config::kBlockN / 4], Ring use) {
    issue_column_products<Element>(o, p, v_ring.advance(use.stage() * Config::kTileBytesN));
  };
  const auto release = [&](ptx::Mbarrier& empty) {
    if (lane == 0) ptx::mbarrier_arrive(empty);
  };

  uint32_t num_used = 0;  // key tiles, over all items
  uint32_t q_parity = 0;
  for (WorkItems<Config::kBlockM> item(params.table); item.next();) {
    const int num_tiles = item.tiles().num_tiles;
    float o[Config::kHeadDim / 2] = {};
    OnlineSoftmax softmax;

    if (num_tiles > 0) {
      float s[Config::kBlockN / 2];
      uint32_t p[Config::kBlockN / 4];
      const auto mask_scores = [&](int tile) {
        if (tile < item.tiles().num_partial) {
          mask_columns(s, params.table.ranges[item.tiles().first_range + tile].tail);
        }
      };

      // The first tile has no older product to run beside.
      Ring k{num_used};
      ptx::mbarrier_wait(shared.q_full, q_parity);
      q_parity ^= 1;
      ptx::mbarrier_wait(shared.k_full[k.stage()], k.full_parity());
      issue_scores(s, k);
      ptx::wgmma_wait<0>(s);
      release(shared.k_empty[k.stage()]);
      mask_scores(0);
      softmax.update(s, params.softmax_scale_log2);
      round_operand<Element>(p, s);

      for (int tile = 1; tile < num_tiles; ++tile) {
        const Ring v{num_used};
        k = Ring{++num_used};
        ptx::mbarrier_wait(shared.k_full[k.stage()], k.full_parity());
        ptx::named_barrier_sync(own_turn, 2 * kWarpgroup);
        issue_scores(s, k);
        ptx::mbarrier_wait(shared.v_full[v.stage()], v.full_parity());
        issue_output(o, p, v);
        ptx::named_barrier_arrive(next_turn, 2 * kWarpgroup);

        ptx::wgmma_wait<1>(s);
        release(shared.k_empty[k.stage()]);
        mask_scores(tile);
        softmax.update(s, params.softmax_scale_log2);
        softmax.hold(ptx::shared_address(staging));

        ptx::wgmma_wait<0>(o, s);
        release(shared.v_empty[v.stage()]);
        round_operand<Element>(p, s);
        if (softmax.rescale) scale_rows(o, softmax.factor);
      }

      release(shared.q_empty);
      const Ring v{num_used++};
      ptx::mbarrier_wait(shared.v_full[v.stage()], v.full_parity());
      issue_output(o, p, v);
      ptx::wgmma_wait<0>(o);
      release(shared.v_empty[v.stage()]);
      softmax.finish();
      const float inverse[2] = {__fdividef(1.f, softmax.row_sum[0]), __fdividef(1.f, softmax.row_sum[1])};
      scale_rows(o, inverse);
    }

    const int row_begin = item.row_begin + first_row;
    const int num_rows = item.tiles().row_end - row_begin;
    Element* out = static_cast<Element*>(params.out) + item.batch * params.out_strides.batch +
                   row_begin * params.out_strides.row + item.head * params.out_strides.head;
    store_rows<Element, Config::kHeadDim>(staging, o, out, params.out_strides.row, num_rows);

    float* lse = params.lse + (int64_t{item.batch} * params.table.num_heads + item.head) * params.seqlen_q + row_begin;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = lane / 4 + 8 * i;
      if (lane % 4 == 0 && row < num_rows)
        lse[row] = softmax.row_max[i] * params.softmax_scale + logf(softmax.row_sum[i]);
    }
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    hopper_attention_fwd_kernel(const __grid_constant__ FwdKernelParams params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  FwdSharedStorage<Config>& shared = *reinterpret_cast<FwdSharedStorage<Config>*>(memory);

  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(params.q);
    ptx::prefetch_tensor_map(params.k);
    ptx::prefetch_tensor_map(params.v);
    init_barriers(shared);
  }
  __syncthreads();

  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / kWarpgroup, 0);
  if (warpgroup == 0) {
    ptx::release_registers<Config::kProducerRegisters>();
    if (threadIdx.x / 32 == 0 && ptx::elect_one()) produce(params, shared);
  } else {
    ptx::acquire_registers<Config::kConsumerRegisters>();
    consume(params, shared, warpgroup - 1);
  }
}

}  // namespace mixed_attention::cuda::hopper
