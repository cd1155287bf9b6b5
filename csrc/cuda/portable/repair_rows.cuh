// Behind a forward's own way out: rows whose output is not finite are computed once more, each by its warp.
#pragma once

#include "cuda/common/row_lse.h"
#include "cuda/portable/dropout.cuh"
#include "cuda/portable/plain_row.cuh"
#include "cuda/portable/tile.cuh"
#include "cuda/portable/tile_iterator.cuh"

namespace mixed_attention::cuda::portable {

// Those of a warp's rows that exist and have an output that is not finite: bit i stands for row i. Rows without a sum
// are as they should be.
template <int kTilesM, int kTilesN>
__device__ unsigned rows_to_repair(const float (&out)[kTilesM][kTilesN][4], const RowLse (&row_lses)[2 * kTilesM],
                                   int num_rows) {
  unsigned rows = 0;
#pragma unroll
  for (int i = 0; i < 2 * kTilesM; ++i) {
    float zero = 0;
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
      zero = fmaf(out[i / 2][n][i % 2 * 2], 0.0f, fmaf(out[i / 2][n][i % 2 * 2 + 1], 0.0f, zero));
    }
    const int row = threadIdx.x % 32 / 4 + 8 * i;
    if (zero != 0 && row_lses[i].has_sum() && row < num_rows) rows |= 1u << row;
  }
  return __reduce_or_sync(0xFFFFFFFF, rows);
}

// repairs: bit i stands for row first_row + i. Arguments: those of the kernel, with its table, dropout and scale_log2.
// Calls store(i, plain row, what it comes to, dropout's factor for the output) for each row that has a sum now.
template <int kBlockRows, int kHeadDim, class Arguments, class Element, class Store>
__device__ __forceinline__ void repair_rows(unsigned repairs, const Arguments& args, const WorkView& work,
                                            const WorkItem& item, int batch_head, const bool* mask,
                                            const GlobalRows<Element>& q, const GlobalRows<Element>& k,
                                            const GlobalRows<Element>& v, int first_row, const Store& store) {
  const bool drops = args.dropout.seed != nullptr;
  for (; repairs != 0; repairs &= repairs - 1) {
    const int row = __ffs(static_cast<int>(repairs)) - 1;
    const auto for_each_key = [&](const auto& visit) {
      const DropoutParams marks{args.dropout.seed, args.dropout.threshold, 1.0f};
#pragma unroll 1
      for (BlockWalk<kBlockRows> blocks(work, item, args.work.num_splits); !blocks.done(); blocks.advance()) {
        const Block block = blocks.block();
        const WorkRange& range = blocks.range_of(block);
#pragma unroll 1
        for (int key = block.row_begin; key < block.row_begin + block.num_rows; ++key) {
          if (mask != nullptr && !mask[key]) continue;
          const auto factor = [&] {
            if (!drops) return 1.0f;
            const Dropout dropout(marks, batch_head);
            return dropout.factor_at(first_row + row, range.range_index, key - range.begin);
          };
          if (!visit(k.row(key), v.row(key), factor)) return;
        }
      }
    };
    PlainRow<Element, kHeadDim> plain(q.row(first_row + row), q.num_cols, v.num_cols, args.scale_log2);
    const RowLse row_lse = plain.compute(for_each_key);
    if (isnan(row_lse.sum_log2)) continue;
    __syncwarp();  // what is replaced has been written
    store(row, plain, row_lse, drops ? args.dropout.inverse_keep_probability : 1.0f);
  }
}

}  // namespace mixed_attention::cuda::portable
