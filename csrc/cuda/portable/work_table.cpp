#include "cuda/portable/work_table.h"

#include <algorithm>
#include <iterator>

#include "ceil_div.h"
#include "cuda/common/scratch.h"

namespace mixed_attention::cuda {
namespace {

int32_t to_int32(int64_t value) { return static_cast<int32_t>(value); }

// Adds the rows that walk through the ranges from first_range on.
void add_segment(HostWork& work, const Range& rows, size_t first_range, int block_rows) {
  int64_t num_blocks = 0;
  for (size_t i = first_range; i < work.ranges.size(); ++i) {
    num_blocks += ceil_div(work.ranges[i].end - work.ranges[i].begin, block_rows);
  }
  work.segments.push_back({to_int32(rows.begin), to_int32(rows.end), to_int32(first_range),
                           to_int32(work.ranges.size() - first_range), 0, to_int32(num_blocks)});
}

// Numbers the tiles, longest walks first.
void number_tiles(HostWork& work, int tile_rows) {
  std::stable_sort(work.segments.begin(), work.segments.end(),
                   [](const WorkSegment& a, const WorkSegment& b) { return a.num_blocks > b.num_blocks; });
  for (WorkSegment& segment : work.segments) {
    const int64_t num_tiles = ceil_div(segment.row_end - segment.row_begin, tile_rows);
    segment.first_tile = to_int32(work.num_tiles);
    work.num_tiles += num_tiles;
    work.num_blocks += num_tiles * segment.num_blocks;
  }
}

}  // namespace

size_t HostWork::segment_bytes() const { return part_bytes(segments.size() * sizeof(WorkSegment)); }

size_t HostWork::device_bytes() const { return segment_bytes() + ranges.size() * sizeof(WorkRange); }

HostWork work_by_query(const Schedule& schedule, int tile_rows, int block_rows) {
  HostWork work;
  work.segments.reserve(schedule.query_segments.size());
  for (const QuerySegment& segment : schedule.query_segments) {
    const size_t first_range = work.ranges.size();
    for (size_t i = 0; i < segment.keys.size(); ++i) {
      const Range keys = segment.keys[i];
      if (keys.size() > 0) work.ranges.push_back({to_int32(keys.begin), to_int32(keys.end), to_int32(i), 0});
    }
    add_segment(work, segment.rows, first_range, block_rows);
  }
  number_tiles(work, tile_rows);
  return work;
}

HostWork work_by_key(const Schedule& schedule, int tile_rows, int block_rows) {
  HostWork work;
  work.segments.reserve(schedule.key_segments.size());
  for (const KeySegment& segment : schedule.key_segments) {
    const size_t first_range = work.ranges.size();
    for (const Reader& reader : segment.readers) {
      work.ranges.push_back({to_int32(reader.queries.begin), to_int32(reader.queries.end), reader.range_index,
                             to_int32(reader.range_offset)});
    }
    add_segment(work, segment.rows, first_range, block_rows);
  }
  number_tiles(work, tile_rows);
  return work;
}

int choose_splits(const HostWork& work, int64_t num_batch_heads, int64_t slots, int64_t min_blocks) {
  if (work.num_blocks * num_batch_heads == 0) return 1;
  constexpr int64_t kMaxSplits = 32;
  const int64_t longest = work.segments.front().num_blocks;
  const int64_t limit = std::min(kMaxSplits, std::max<int64_t>(1, longest / min_blocks));
  // Keys that nobody reads are tiles without any work, behind all others.
  const auto idle = std::find_if(work.segments.begin(), work.segments.end(),
                                 [](const WorkSegment& segment) { return segment.num_blocks == 0; });
  const int64_t num_tiles = (idle == work.segments.end() ? work.num_tiles : idle->first_tile) * num_batch_heads;
  const int64_t shortest = std::prev(idle)->num_blocks;
  // The share of its time for which the device is full, about: splits come in waves that take as long as the longest
  // one, however few the last wave has; or they fill gaps, until the shortest, which come last, begin at the end.
  const double full_time = static_cast<double>(work.num_blocks * num_batch_heads) / static_cast<double>(slots);
  const auto efficiency = [&](int64_t splits) {
    const auto of_split = [&](int64_t num_blocks) {
      return static_cast<double>(num_blocks) / static_cast<double>(splits);
    };
    const double waves = static_cast<double>(ceil_div(num_tiles * splits, slots)) * of_split(longest);
    return full_time / std::min(waves, full_time + of_split(shortest));
  };
  // Combining costs a pass over the outputs: only where the tiles leave much of the device idle.
  if (limit == 1 || efficiency(1) >= 0.75) return 1;
  double best = 0;
  for (int64_t splits = 1; splits <= limit; ++splits) best = std::max(best, efficiency(splits));
  int64_t splits = 1;
  while (efficiency(splits) < 0.78 * best) ++splits;
  return static_cast<int>(splits);
}

}  // namespace mixed_attention::cuda
