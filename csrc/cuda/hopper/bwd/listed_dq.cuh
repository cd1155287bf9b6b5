// The third warpgroup of the kernel that goes through a list of keys computes what a key tile adds to dq, as
// dq_adder.cuh does. Sums of a unit's own lie in memory of the block, thread by thread: each finds there what it has
// left at the visit before, while ds is on its way, and lets the MMA add to it. At the last visit dq leaves, scaled and
// in 16 bits. Other sums are added to those of all blocks.
//
// Who signals whom: full of the visits by one arrival of the producer.
#pragma once

#include <cstdint>

#include "cuda/hopper/bwd/config.h"
#include "cuda/hopper/bwd/ds_exchange.cuh"
#include "cuda/hopper/bwd/listed_items.cuh"
#include "cuda/hopper/bwd/params.h"
#include "cuda/hopper/bwd/scores.cuh"
#include "cuda/hopper/tile/mma.cuh"
#include "cuda/hopper/tile/register_operand.cuh"
#include "cuda/hopper/tile/ring.cuh"
#include "cuda/hopper/tile/store_rows.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/lane.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/reduce.cuh"
#include "cuda/ptx/shared_address.cuh"
#include "cuda/ptx/stmatrix.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace mixed_attention::cuda::hopper {

// Writes this warp's 16 columns, the first num_columns of them, of 64 rows, num_rows of which exist: they come
// transposed, as columns are rows of an MMA. staging: 64 rows of 32 bytes.
template <typename Element>
__device__ inline void store_transposed_rows(Element* staging, const float (&result)[32], Element* target,
                                             int64_t row_stride, int num_rows, int num_columns) {
  const int lane = ptx::lane_anew();
  // Halves of a row change places in every other four rows, against bank conflicts.
  const auto half_at = [&](int row, int half) { return staging + row * 16 + (half ^ row / 4 % 2) * 8; };

  __syncwarp();  // the rows stored before have been read
#pragma unroll
  for (int rows = 0; rows < kQueryTileRows; rows += 16) {
    const float* part = result + rows / 2;
    ptx::stmatrix_x4_trans(ptx::shared_address(half_at(rows + lane / 16 * 8 + lane % 8, lane / 8 % 2)),
                           ptx::pack<Element>(part[0], part[1]), ptx::pack<Element>(part[2], part[3]),
                           ptx::pack<Element>(part[4], part[5]), ptx::pack<Element>(part[6], part[7]));
  }
  __syncwarp();
#pragma unroll
  for (int first = 0; first < 2 * kQueryTileRows; first += 32) {
    const int row = (first + lane) / 2, half = lane % 2;
    if (row < num_rows && half * 8 < num_columns) {
      *reinterpret_cast<uint4*>(target + row * row_stride + half * 8) =
          *reinterpret_cast<const uint4*>(half_at(row, half));
    }
  }
}

template <typename Config>
__device__ inline void add_listed_dq(const ListedDkDvKernelParams& params, DkDvSharedStorage<Config>& shared) {
  using Element = typename Config::Element;
  auto& exchange = shared.dq_exchange;
  using Ring = RingUse<DqExchange<Config>::kStages>;
  constexpr bool kTransposes = transposes_dq(Config::kHeadDim);
  constexpr int kChunks = Config::kDqTileFloats / kWarpgroup / 4;
  static_assert(!kTransposes || Config::kHeadDim == kWarpgroupRows, "a warp has 16 columns of dq, or 16 rows");
  const int thread = threadIdx.x % kWarpgroup;
  const int warp = __shfl_sync(0xffffffff, thread / 32, 0);
  const ptx::Operand ds_ring = ptx::Operand::make(exchange.ds);
  float4* const own_sums =
      reinterpret_cast<float4*>(params.own_sums + int64_t{blockIdx.x} * params.num_slots * Config::kDqTileFloats) +
      thread;

  uint32_t num_used = 0;  // query tiles, over all items
  RingUse<Config::kKeyBuffers> kv{0};
  for (ListedItems items(shared.items); items.next();) {
    const int num_tiles = items.num_query_tiles();
    if (num_tiles == 0) continue;
    // Keys of the item
    [[maybe_unused]] uint32_t keys[Config::kBlockN / 4];
    const Element* const k = shared.k + kv.stage() * Config::kBlockN * Config::kHeadDim;
    wait_full(shared.kv_pipe, kv);
    if constexpr (kTransposes) {
      load_column_operand(keys, k);
      sync_and_release(shared.kv_pipe, kv);
    }

    for (int i = 0; i < num_tiles; ++i, ++num_used) {
      // The sums that the visit adds to
      const RingUse<kDqVisits> of_visit{num_used};
      ptx::mbarrier_wait(shared.dq_exchange.visits.full[of_visit.stage()], of_visit.full_parity());
      const DqVisit visit = shared.dq_exchange.visits.visits[of_visit.stage()];
      const bool shares = visit.shares();
      float4* const sums = shares ? reinterpret_cast<float4*>(params.dq_accum.of_tile(
                                        (int64_t{items.item().batch} * params.table.num_heads + items.item().head) *
                                                params.dq_accum.num_tiles +
                                            visit.place,
                                        Config::kDqTileFloats)) +
                                        thread
                                  : own_sums + int64_t{visit.place} * (Config::kDqTileFloats / 4);
      float dq[4 * kChunks];
      if (shares || visit.begins()) {
#pragma unroll
        for (float& each : dq) each = 0;
      } else {
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
          const float4 four = sums[chunk * kWarpgroup];
          dq[4 * chunk] = four.x;
          dq[4 * chunk + 1] = four.y;
          dq[4 * chunk + 2] = four.z;
          dq[4 * chunk + 3] = four.w;
        }
      }

      // dq of the visit
      const Ring ds{num_used};
      const ptx::Operand ds_tile = ds_ring.advance(ds.stage() * Config::kScoreBytes);
      wait_full(exchange.ds_pipe, ds);
      if constexpr (kTransposes) {
        issue_column_mma<Element>(dq, keys, ds_tile);
      } else {
        issue_transposed_mma<Element, Config::kBlockN, true>(
            dq, ds_tile, ptx::SlabOperand<Config::kRowBytes>::make(k, Config::kSlabBytesN));
      }
      ptx::wgmma_wait<0>(dq);
      release(exchange.ds_pipe, ds);

      // The sums go back, or, at the last visit, dq leaves
      if (shares) {
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
          ptx::add_four(reinterpret_cast<float*>(sums + chunk * kWarpgroup), dq[4 * chunk], dq[4 * chunk + 1],
                        dq[4 * chunk + 2], dq[4 * chunk + 3]);
        }
      } else if (!visit.ends()) {
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
          sums[chunk * kWarpgroup] =
              make_float4(dq[4 * chunk], dq[4 * chunk + 1], dq[4 * chunk + 2], dq[4 * chunk + 3]);
        }
      } else {
        scale_all(dq, params.softmax_scale);
        Element* const target = static_cast<Element*>(params.dq) + items.item().batch * params.dq_strides.batch +
                                items.item().head * params.dq_strides.head + visit.row_begin * params.dq_strides.row;
        Element* const staging = exchange.rows[warp];
        if constexpr (kTransposes) {
          store_transposed_rows(staging, dq, target + 16 * warp, params.dq_strides.row, visit.num_rows,
                                params.head_dim - 16 * warp);
        } else {
          store_rows<Element, Config::kHeadDim>(staging, dq, target + 16 * warp * params.dq_strides.row,
                                                params.dq_strides.row, visit.num_rows - 16 * warp, params.head_dim);
        }
      }
    }
    if constexpr (!kTransposes) release(shared.kv_pipe, kv);
    ++kv.count;
  }
}

}  // namespace mixed_attention::cuda::hopper
