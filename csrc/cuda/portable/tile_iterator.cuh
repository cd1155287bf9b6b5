// Which rows a work item owns and which blocks it visits: the only device code that knows the form of the tables.
#pragma once

#include "ceil_div.h"
#include "cuda/portable/work_table.h"

namespace mixed_attention::cuda {

// What one thread block computes: a tile of rows of one batch_head, or a split of its walk.
struct WorkItem {
  int row_begin, num_rows;  // of the tile; num_rows at most the tile's size
  int segment;
  int split;
  int head, batch;
};

// The table's arrays, wherever they are.
struct WorkView {
  const WorkSegment* segments;
  const WorkRange* ranges;
};

__device__ inline WorkView view(const DeviceWork& table, const InlineWork& in_parameters) {
  return table.segments ? WorkView{table.segments, table.ranges}
                        : WorkView{in_parameters.segments, in_parameters.ranges};
}

// Work items in order of falling length, all splits of a tile together, then head by head: neighbours share keys in
// cache.
__device__ inline WorkItem locate(const DeviceWork& table, const WorkView& view, unsigned index, int tile_rows,
                                  int num_heads) {
  WorkItem item;
  const unsigned num_items = static_cast<unsigned>(table.num_tiles) * static_cast<unsigned>(table.num_splits);
  const unsigned batch_head = index / num_items, item_of_head = index % num_items;
  const int tile = static_cast<int>(item_of_head / table.num_splits);
  item.split = static_cast<int>(item_of_head % table.num_splits);
  item.head = static_cast<int>(batch_head % num_heads);
  item.batch = static_cast<int>(batch_head / num_heads);
  int low = 0, high = table.num_segments;  // the last segment whose first tile is not after this one
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (view.segments[middle].first_tile <= tile ? low : high) = middle;
  }
  item.segment = low;
  const WorkSegment& segment = view.segments[low];
  item.row_begin = segment.row_begin + (tile - segment.first_tile) * tile_rows;
  item.num_rows = min(tile_rows, segment.row_end - item.row_begin);
  return item;
}

// Rows of the other side that are processed together; they never cross the end of a range.
struct Block {
  int row_begin, num_rows;
  int range;  // its number in the table
};

// Walks the blocks of one split of a segment's ranges. A range is read when the walk comes to it: loads are slow.
template <int kBlockRows>
class BlockWalk {
 public:
  __device__ BlockWalk(const WorkView& view, const WorkItem& item, int num_splits) : ranges_(view.ranges) {
    const WorkSegment& segment = view.segments[item.segment];
    const int64_t total = segment.num_blocks;
    const int begin = static_cast<int>(total * item.split / num_splits);
    remaining_ = static_cast<int>(total * (item.split + 1) / num_splits) - begin;
    range_ = segment.first_range;
    if (remaining_ > 0) seek(begin);
  }

  __device__ bool done() const { return remaining_ == 0; }

  __device__ Block block() const { return {row_, min(kBlockRows, end_ - row_), range_}; }

  __device__ const WorkRange& range_of(const Block& block) const { return ranges_[block.range]; }

  __device__ void advance() {
    row_ += kBlockRows;
    --remaining_;
    if (row_ < end_ || remaining_ == 0) return;
    ++range_;
    row_ = ranges_[range_].begin;
    end_ = ranges_[range_].end;
  }

 private:
  __device__ void seek(int block) {
    for (; true; ++range_) {
      const WorkRange& range = ranges_[range_];
      const int in_range = ceil_div(range.end - range.begin, kBlockRows);
      if (block < in_range) break;
      block -= in_range;
    }
    row_ = ranges_[range_].begin + block * kBlockRows;
    end_ = ranges_[range_].end;
  }

  const WorkRange* ranges_;
  int range_;
  int row_, end_;  // the block's first row; the end of its range
  int remaining_;
};

}  // namespace mixed_attention::cuda
