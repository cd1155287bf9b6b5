#include "cuda/hopper/fwd/split_items.h"

#include <algorithm>
#include <stdexcept>

#include "ceil_div.h"

namespace mixed_attention::cuda::hopper {
namespace {

// In steps of a key tile, each of which takes the tensor cores about a microsecond.
constexpr int kStepsOfItem = 3;       // to begin and to end
constexpr int kStepsOfSplit = 2;      // beside, as its output leaves in fp32 and is read once more
constexpr int kStepsOfCombining = 2;  // the second launch

constexpr int kMaxSplits = 32;  // the combination goes through them one by one; times tiles they fit 32 bits
constexpr int kMaxRounds = 3;   // that splits are made to fill
constexpr int kLeastGain = 32;  // of the time, one in so many: the estimate is not better than that

// The segment of an item; number counts whole ones.
const QueryTiles& segment_of(const WorkTable& table, int number) {
  const QueryTiles* segment = table.segments;
  while (number >= segment->item_end) ++segment;
  return *segment;
}

int steps_of_item(const WorkTable& table, const ItemSplits& splits, int item) {
  const int num_steps = segment_of(table, splits.number(item)).num_steps;
  if (num_steps == 0) return 1;
  return splits.has(item) ? ceil_div(num_steps, splits.num_splits) + kStepsOfItem + kStepsOfSplit
                          : num_steps + kStepsOfItem;
}

int64_t steps_of_launch(const WorkTable& table, const ItemSplits& splits, int num_items, int num_blocks) {
  int64_t steps = splits.num_splits > 1 ? kStepsOfCombining : 0;
  for (int first = 0; first < num_items; first += num_blocks) {
    // Items become shorter, but after the splits.
    const int splits_end = splits.begin + splits.num_items();
    const bool ends = first < splits_end && splits_end < std::min(first + num_blocks, num_items);
    steps += std::max(steps_of_item(table, splits, first), ends ? steps_of_item(table, splits, splits_end) : 0);
  }
  return steps;
}

// How many items take at least so long.
int num_items_of(const WorkTable& table, int least_steps) {
  int num_items = 0;
  for (const QueryTiles* segment = table.segments; num_items < table.num_items && segment->num_steps >= least_steps;
       ++segment) {
    num_items = segment->item_end;
  }
  return num_items;
}

}  // namespace

int64_t steps_of_launch(const WorkTable& table, int num_blocks) {
  return steps_of_launch(table, table.splits, table.num_items, num_blocks);
}

int most_splits(const WorkTable& table, int begin, int end) {
  int num_splits = kMaxSplits;  // items are in order of their steps, not of their tiles: all have a say
  int first = 0;
  for (const QueryTiles* segment = table.segments; first < end; first = segment++->item_end) {
    if (begin < segment->item_end) num_splits = std::min(num_splits, segment->num_tiles);
  }
  return num_splits;
}

void cut_items(WorkTable& table, const ItemSplits& splits) {
  if (splits.num_splits > most_splits(table, splits.begin, splits.begin + splits.num_whole)) {
    throw std::logic_error("cut_items: too many splits");
  }
  table.num_items += splits.num_items() - splits.num_whole;
  table.splits = splits;
}

void split_items(WorkTable& table, int num_blocks) {
  if (table.num_items == 0) return;
  const int64_t steps_of_whole = steps_of_launch(table, num_blocks);
  int64_t least_steps = steps_of_whole - steps_of_whole / kLeastGain;
  ItemSplits best;
  const auto num_items = [&](const ItemSplits& splits) {
    return table.num_items + splits.num_items() - splits.num_whole;
  };
  const auto consider = [&](const ItemSplits& splits) {
    const int64_t steps = steps_of_launch(table, splits, num_items(splits), num_blocks);
    if (steps < least_steps) {
      least_steps = steps;
      best = splits;
    }
  };
  const int half_of_longest = std::max(1, ceil_div(table.segments[0].num_steps, 2));
  for (const int least_steps_of_item : {1, half_of_longest}) {
    const int end = num_items_of(table, least_steps_of_item);
    for (const int begin : {0, end / num_blocks * num_blocks}) {
      if (begin == end) continue;
      const int limit = most_splits(table, begin, end);
      for (int rounds = 1; rounds <= kMaxRounds; ++rounds) {
        const int num_splits = std::min(limit, rounds * num_blocks / (end - begin));
        if (num_splits > 1) consider({begin, end - begin, num_splits});
      }
    }
  }
  cut_items(table, best);
}

bool wants_splits(WorkTable table, int num_blocks) {
  constexpr int kTimesFaster = 3;
  const int64_t steps_of_whole = steps_of_launch(table, num_blocks);
  split_items(table, num_blocks);
  return steps_of_whole > kTimesFaster * steps_of_launch(table, num_blocks);
}

}  // namespace mixed_attention::cuda::hopper
