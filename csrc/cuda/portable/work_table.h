// The work of one launch: which rows a tile owns, and which rows of the other side it walks through.
//
// One form serves both directions: query segments with the key ranges that they attend to (forward, dq), and key
// segments with the query ranges that read them (dk, dv).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "params.h"
#include "schedule.h"

namespace mixed_attention::cuda {

// Half-open range of rows to walk through. The last two say where the keys at hand stand, for dropout: which range of
// the query segment's list, and where in it the range (or, by key, the owning segment) begins.
struct WorkRange {
  int32_t begin, end;
  int32_t range_index, range_offset;
};

// Rows that tiles own. Tiles are numbered through all segments.
struct WorkSegment {
  int32_t row_begin, row_end;
  int32_t first_range, num_ranges;
  int32_t first_tile;
  int32_t num_blocks;  // blocks of the other side that each tile walks through
};

// Segments are in order of falling num_blocks: the hardware hands out tiles in order, so the longest start first.
struct DeviceWork {
  const WorkSegment* segments;  // null: they travel in the kernel's parameters
  const WorkRange* ranges;
  int32_t num_segments;
  int32_t num_tiles;
  int32_t num_splits;  // of the walk of every tile
};

// Room for a plan in the parameters of a kernel, which are 4 KiB in all.
struct InlineWork {
  static constexpr int kMaxSegments = 48, kMaxRanges = 96;
  WorkSegment segments[kMaxSegments];
  WorkRange ranges[kMaxRanges];
};

// The host's copy of a table.
struct HostWork {
  std::vector<WorkSegment> segments;
  std::vector<WorkRange> ranges;
  int64_t num_tiles = 0;
  int64_t num_blocks = 0;  // over all tiles

  bool fits_inline() const {
    return segments.size() <= InlineWork::kMaxSegments && ranges.size() <= InlineWork::kMaxRanges;
  }
  // Bytes of device memory for a table that does not travel in the parameters: segments, and ranges behind them.
  size_t segment_bytes() const;  // a multiple of 256
  size_t device_bytes() const;
};

// Tables and kernels count rows, tiles and blocks in 32 bits, with room for a tile behind the last row.
constexpr int64_t kMaxRows = (int64_t{1} << 31) - 1025;

HostWork work_by_query(const Schedule& schedule, int tile_rows, int block_rows);
HostWork work_by_key(const Schedule& schedule, int tile_rows, int block_rows);

// How many splits of the walks fill the device: 1 where the tiles do that by themselves.
// slots = how many tiles run at a time on the device; num_batch_heads = batch_size * num_heads; min_blocks = the fewest
// to a split.
int choose_splits(const HostWork& work, int64_t num_batch_heads, int64_t slots, int64_t min_blocks);

}  // namespace mixed_attention::cuda
