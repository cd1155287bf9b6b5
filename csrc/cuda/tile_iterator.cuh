// Which rows a tile owns and which blocks it visits: the only device code that knows the form of the work table.
#pragma once

#include "cuda/work_table.h"

namespace mixed_attention::cuda {

// What one thread block computes.
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

__device__ inline WorkView view(const WorkTable& table, const InlineWork& in_parameters) {
  return table.segments ? WorkView{table.segments, table.ranges}
                        : WorkView{in_parameters.segments, in_parameters.ranges};
}

// Tiles in order of falling length, all parts of a tile together, then head by head: neighbours share keys in cache.
__device__ inline WorkItem locate(const WorkTable& table, const WorkView& view, unsigned index, int tile_rows,
                                  int num_heads) {
  WorkItem item;
  const unsigned parts = static_cast<unsigned>(table.num_tiles) * static_cast<unsigned>(table.num_splits);
  const unsigned copy = index / parts, part = index % parts;
  const int tile = static_cast<int>(part / table.num_splits);
  item.split = static_cast<int>(part % table.num_splits);
  item.head = static_cast<int>(copy % num_heads);
  item.batch = static_cast<int>(copy / num_heads);
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
  int range_index, range_offset;  // of the block's range: WorkRange
  int offset;                     // of the block's first row in its range
};

// Walks the blocks of one part of a segment's ranges.
template <int kBlockRows>
class BlockWalk {
 public:
  __device__ BlockWalk(const WorkView& view, const WorkItem& item, int num_splits) {
    const WorkSegment& segment = view.segments[item.segment];
    const int64_t total = segment.num_blocks;
    const int begin = static_cast<int>(total * item.split / num_splits);
    remaining_ = static_cast<int>(total * (item.split + 1) / num_splits) - begin;
    range_ = view.ranges + segment.first_range;
    if (remaining_ > 0) seek(begin);
  }

  __device__ bool done() const { return remaining_ == 0; }

  __device__ Block block() const {
    return {row_, min(kBlockRows, range_->end - row_), range_->range_index, range_->range_offset, row_ - range_->begin};
  }

  __device__ void advance() {
    row_ += kBlockRows;
    --remaining_;
    if (row_ >= range_->end && remaining_ > 0) row_ = (++range_)->begin;
  }

 private:
  __device__ void seek(int block) {
    for (; true; ++range_) {
      const int in_range = (range_->end - range_->begin + kBlockRows - 1) / kBlockRows;
      if (block < in_range) break;
      block -= in_range;
    }
    row_ = range_->begin + block * kBlockRows;
  }

  const WorkRange* range_;
  int row_;
  int remaining_;
};

}  // namespace mixed_attention::cuda
