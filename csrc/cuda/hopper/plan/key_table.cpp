#include "cuda/hopper/plan/key_table.h"

#include <algorithm>
#include <limits>

#include "ceil_div.h"
#include "cuda/hopper/bwd/config.h"
#include "schedule.h"

namespace mixed_attention::cuda::hopper {
namespace {

constexpr int64_t kMaxInt = std::numeric_limits<int>::max();

int to_int(int64_t value) { return static_cast<int>(value); }

// Readers read whole query segments.
const QueryRun& run_of(const Reader& reader, const std::vector<QueryRun>& runs) {
  return *std::lower_bound(runs.begin(), runs.end(), reader.queries.begin,
                           [](const QueryRun& run, int64_t row) { return run.row_begin < row; });
}

}  // namespace

std::vector<QueryRun> make_query_runs(const Schedule& schedule) {
  std::vector<QueryRun> runs;
  int first_tile = 0;
  for (const QuerySegment& segment : schedule.query_segments) {
    runs.push_back({to_int(segment.rows.begin), to_int(segment.rows.end), first_tile});
    first_tile += num_query_tiles(runs.back());
  }
  return runs;
}

int num_query_tiles(const QueryRun& run) { return to_int(ceil_div(run.row_end - run.row_begin, kQueryTileRows)); }

int num_query_tiles(const std::vector<QueryRun>& runs) {
  return runs.empty() ? 0 : runs.back().first_tile + num_query_tiles(runs.back());
}

std::vector<QueryRun> make_reader_runs(const Schedule& schedule, const std::vector<QueryRun>& runs) {
  std::vector<QueryRun> readers;
  for (const KeySegment& segment : schedule.key_segments) {
    for (const Reader& reader : segment.readers) readers.push_back(run_of(reader, runs));
  }
  return readers;
}

int64_t num_reader_tiles(const Schedule& schedule) {
  int64_t num_tiles = 0;
  for (const KeySegment& segment : schedule.key_segments) {
    for (const Reader& reader : segment.readers) num_tiles += ceil_div(reader.queries.size(), kQueryTileRows);
  }
  return num_tiles;
}

bool are_keys_counted_in_32_bits(const AttentionParams& params) {
  int64_t num_items = 0, num_readers = 0;
  for (const KeySegment& segment : params.schedule->key_segments) {
    num_readers += static_cast<int64_t>(segment.readers.size());
    num_items += ceil_div(segment.rows.size(), kWarpgroupRows) * params.num_heads * params.batch_size;
    int64_t num_queries = 0;
    for (const Reader& reader : segment.readers) num_queries += reader.queries.size();
    if (num_queries >= kMaxInt) return false;
  }
  return num_readers < kMaxInt && num_items < kMaxInt / 2;
}

bool fits_key_work_table(const AttentionParams& params) {
  const std::vector<KeySegment>& segments = params.schedule->key_segments;
  if (segments.size() > KeyWorkTable::kMaxSegments) return false;
  size_t num_readers = 0;
  for (const KeySegment& segment : segments) num_readers += segment.readers.size();
  return num_readers <= KeyWorkTable::kMaxRanges && are_keys_counted_in_32_bits(params);
}

KeyWorkTable make_key_work_table(const AttentionParams& params, const std::vector<QueryRun>& runs, int block_n) {
  KeyWorkTable table{};
  table.num_heads = to_int(params.num_heads);
  int num_segments = 0, num_ranges = 0, first_tile = 0;
  for (const KeySegment& segment : params.schedule->key_segments) {
    const int first_range = num_ranges;
    int num_tiles = 0;
    for (const Reader& reader : segment.readers) {
      const QueryRun& run = table.ranges[num_ranges++] = run_of(reader, runs);
      num_tiles += num_query_tiles(run);
    }
    table.segments[num_segments++] = {
        to_int(segment.rows.begin), to_int(segment.rows.end), first_range, num_tiles, first_tile, 0};
    first_tile += num_tiles;
  }
  std::stable_sort(table.segments, table.segments + num_segments,
                   [](const KeySegmentTiles& a, const KeySegmentTiles& b) { return a.num_tiles > b.num_tiles; });
  for (int i = 0; i < num_segments; ++i) {
    KeySegmentTiles& segment = table.segments[i];
    const int64_t num_blocks = ceil_div(segment.row_end - segment.row_begin, block_n);
    table.num_items += to_int(num_blocks * params.num_heads * params.batch_size);
    segment.item_end = table.num_items;
  }
  return table;
}

int64_t steps_of_longest_block(const KeyWorkTable& table, int block_n, int num_blocks, int splits, bool is_ordered) {
  constexpr int kStepsOfItem = 4;  // to begin and to end
  constexpr int kStepsOfExchange = 2;
  constexpr int kStepsOfTurn = 2;  // until the next block may add
  const auto steps_of_walk = [&](const KeySegmentTiles& segment) {
    const int num_tiles = to_int(ceil_div(segment.num_tiles, splits));
    if (!is_ordered || num_tiles == 0) return num_tiles;
    const int64_t num_key_tiles = ceil_div(segment.row_end - segment.row_begin, block_n);
    return std::max(num_tiles, kStepsOfTurn * to_int(std::min<int64_t>(num_key_tiles, num_blocks)));
  };
  int64_t steps = 0;
  const KeySegmentTiles* segment = table.segments;
  for (int item = 0; item < table.num_items; item += num_blocks) {
    while (item >= segment->item_end) ++segment;
    const int end = std::min(item + num_blocks, table.num_items);
    int longest = steps_of_walk(*segment);
    for (const KeySegmentTiles* other = segment; other->item_end < end;) {
      longest = std::max(longest, steps_of_walk(*++other));
    }
    steps += longest + kStepsOfItem + (splits - 1) * kStepsOfExchange;
  }
  return steps;
}

}  // namespace mixed_attention::cuda::hopper
