// What the walks of both passes on Hopper share.
#pragma once

#include <limits>
#include <memory>

#include "cuda/hopper/plan/key_table.h"
#include "cuda/hopper/plan/query_table.h"
#include "params.h"
#include "problem.h"

namespace walks {

namespace hopper = ma::cuda::hopper;

// Makes values, or queries and keys, narrower than the width that both have, or leaves them.
inline void narrow(const Problem& problem, ma::AttentionParams& params) {
  const int64_t width = 8 * (1 + problem.dice[15] / 3 % (params.head_dim / 8));
  switch (problem.choose(15, 3)) {
    case 0: params.head_dim_v = width; break;
    case 1: params.head_dim = width; break;
    default: break;
  }
}

// A copy of a table in which whatever lies behind the last segment and the last range is seen when a walk meets it:
// rows that no plan lists. num_items: whole ones.
template <class Table>
std::unique_ptr<Table> with_poison(int num_items, int num_ranges, const Table& table) {
  auto copy = std::make_unique<Table>(table);
  auto* segment = copy->segments;
  for (int end = 0; end < num_items; ++segment) end = segment->item_end;
  for (; segment < copy->segments + Table::kMaxSegments; ++segment) {
    *segment = {};
    segment->row_begin = -1000;
    segment->item_end = std::numeric_limits<int>::max();
  }
  for (int i = num_ranges; i < Table::kMaxRanges; ++i) copy->ranges[i] = {-1000, 1, 1};
  return copy;
}

inline std::unique_ptr<hopper::WorkTable> with_poison(const Problem& problem, const hopper::WorkTable& table) {
  int num_ranges = 0;
  for (const Segment& segment : problem.segments) {
    for (const ma::Range& keys : segment.keys) num_ranges += segment.num_rows > 0 && keys.size() > 0;
  }
  const hopper::ItemSplits& splits = table.splits;
  return with_poison(table.num_items - splits.num_items() + splits.num_whole, num_ranges, table);
}

inline std::unique_ptr<hopper::KeyWorkTable> with_poison(const ma::Schedule& schedule,
                                                         const hopper::KeyWorkTable& table) {
  int num_ranges = 0;
  for (const ma::KeySegment& segment : schedule.key_segments) num_ranges += static_cast<int>(segment.readers.size());
  return with_poison(table.num_items, num_ranges, table);
}

}  // namespace walks
