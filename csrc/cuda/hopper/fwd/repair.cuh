// A second walk over a block's work items repairs outputs that overflowed in the first one (overflow.cuh): tile by
// tile, with p of 2^-64 at most. It replaces what is not finite and leaves everything else; where a value is infinite
// or NaN itself, that changes nothing but the time.
#pragma once

#include <cstdint>

#include "cuda/hopper/config.h"
#include "cuda/hopper/fwd/epilogue.cuh"
#include "cuda/hopper/fwd/mma.cuh"
#include "cuda/hopper/fwd/overflow.cuh"
#include "cuda/hopper/fwd/params.h"
#include "cuda/hopper/fwd/softmax.cuh"
#include "cuda/hopper/fwd/walk.cuh"
#include "cuda/hopper/tile/ring.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace mixed_attention::cuda::hopper {

// True if the block has to go through its work items once more. Producers and consumers ask behind their last item, and
// wait for the last consumer.
template <template <typename> typename SharedStorage, typename Config>
__device__ inline bool must_repair(SharedStorage<Config>& shared) {
  if constexpr (!kMayOverflow<Config>) return false;
  ptx::mbarrier_wait(shared.finished, 0);
  return shared.has_overflowed != 0;
}

// Tells that this consumer warp has done its work items.
template <template <typename> typename SharedStorage, typename Config>
__device__ inline void finish_items(SharedStorage<Config>& shared) {
  __syncwarp();
  if (kMayOverflow<Config> && threadIdx.x % 32 == 0) ptx::mbarrier_arrive(shared.finished);
}

// Writes one of a thread's two rows, i, times a factor, where memory has no finite numbers. out: the row in memory, of
// num_columns.
template <typename Element, int kCount>
__device__ inline void replace_row(Element* out, int num_columns, const float (&o)[kCount], int i, float factor) {
#pragma unroll
  for (int column = 0; column < 2 * kCount; column += 8) {
    const int own_column = column + threadIdx.x % 4 * 2;
    if (own_column >= num_columns) break;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      Element& number = out[own_column + j];
      if (!isfinite(static_cast<float>(number))) number = Element(o[column / 2 + 2 * i + j] * factor);
    }
  }
}

// Replaces what is not finite in this warp's 16 rows of a work item.
template <typename Config>
__device__ inline void replace_item(const FwdKernelParams& params, const Walk<Config>& item, int first_row,
                                    const float (&o)[Config::kHeadDim / 2], OnlineSoftmax softmax) {
  using Element = typename Config::Element;
  const int row_of_tile = first_row + threadIdx.x % 32 / 4;
  const ItemRows rows = item.rows();
  const ItemSplits& splits = params.table.splits;
  softmax.finish();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = row_of_tile + 8 * i;
    const float inverse = inverse_of<Config>(softmax.row_sum[i]);
    if (splits.has(item.item)) {
      const int64_t split_row = int64_t{splits.place(item.item)} * Config::kBlockM + row;
      replace_row(params.partial_out + split_row * params.head_dim_v, params.head_dim_v, o, i, inverse);
    } else if (rows.row_begin + row < rows.row_end) {
      const Strides& strides = params.out_strides;
      Element* out = static_cast<Element*>(params.out) + rows.batch * strides.batch + rows.head * strides.head +
                     (rows.row_begin + row) * strides.row;
      replace_row(out, params.head_dim_v, o, i, inverse);
    }
  }
}

// The walk of a consumer; the producers bring everything again. q_use and k_use are the next uses of the rings.
template <typename Config>
__device__ inline void repair_items(const FwdKernelParams& params, FwdSharedStorage<Config>& shared,
                                    FwdMma<Config>& mma, RingUse<Config::kQueryBuffers> q_use,
                                    RingUse<Config::kStages> k_use, int first_row, int team) {
  using Element = typename Config::Element;
  auto& s = mma.s;
  auto& o = mma.o;
  const RowBases bases{shared.bases[0] + first_row + threadIdx.x % 32 / 4, true};
  for (auto items = walk_of_team<Walk<Config>>(params.table, team); items.next_with_keys(); ++q_use.count) {
    const TileShare share = items.share();
    OnlineSoftmax softmax;
    mma.start_item(params, items.rows(), first_row);
    clear(o);
    wait_full(shared.q_pipe, q_use);
    for (int tile = share.begin; tile < share.end; ++tile, ++k_use.count) {
      wait_full(shared.k_pipe, k_use);
      mma.issue_s(q_use.stage(), k_use.stage());
      ptx::wgmma_wait<0>(s);
      finish_scores(params, shared, mma, items, share, k_use, tile);
      sync_and_release(shared.k_pipe, k_use);
      if (tile == share.begin) {
        softmax.start<Element, 0>(s, mma.scale_log2, bases);
      } else {
        float factor[2];
        softmax.raise<Element, 0>(s, mma.scale_log2, factor, bases);
        scale_rows(o, factor);
      }
      softmax.add_tile();
      mma.take_p(shared, k_use);
      wait_full(shared.v_pipe, k_use);
      mma.issue_o(k_use.stage());
      mma.wait();
      sync_and_release(shared.v_pipe, k_use);
    }
    sync_and_release(shared.q_pipe, q_use);
    replace_item<Config>(params, items, first_row, o, softmax);
  }
}

}  // namespace mixed_attention::cuda::hopper
