// The rows of the work items that were split, for their combination.
#pragma once

#include <cstdint>

#include "cuda/common/split_row.h"
#include "cuda/hopper/plan/work_items.cuh"

namespace mixed_attention::cuda::hopper {

// Splits lie as store_split (epilogue.cuh) leaves them: kBlockM rows each, whether these exist or not.
template <int kBlockM>
struct RowsOfSplits {
  WorkTable table;

  __device__ SplitRow find(int64_t index) const {
    const int item = static_cast<int>(index / kBlockM);  // of those
    const int row = static_cast<int>(index % kBlockM);
    const int number = table.splits.begin + item;
    int segment = 0;
    while (number >= table.segments[segment].item_end) ++segment;
    const ItemRows rows = rows_of_item<kBlockM>(table, number, segment);
    return {rows.row_begin + row < rows.row_end,
            rows.batch,
            rows.head,
            rows.row_begin + row,
            int64_t{item} * table.splits.num_splits * kBlockM + row,
            kBlockM};
  }
};

}  // namespace mixed_attention::cuda::hopper
