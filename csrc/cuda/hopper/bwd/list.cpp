#include "cuda/hopper/bwd/list.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "ceil_div.h"
#include "cuda/common/scratch.h"
#include "cuda/common/table_id.h"
#include "cuda/hopper/plan/tile_list.h"
#include "schedule.h"

namespace mixed_attention::cuda::hopper {
namespace {

constexpr int kStepsOfItem = 4;  // to begin and to end a tile of keys

// A block's own sums of dq: those of all blocks stay in the L2 cache together.
constexpr int64_t kMostOwnBytes = 192 << 10;

// Sets of segments that see each other: the numbers of queries come first, then those of keys.
class Components {
 public:
  explicit Components(size_t count) : parents_(count) { std::iota(parents_.begin(), parents_.end(), 0); }

  int root(int of) {
    while (parents_[of] != of) of = parents_[of] = parents_[parents_[of]];
    return of;
  }
  void join(int a, int b) { parents_[root(a)] = root(b); }

 private:
  std::vector<int> parents_;
};

struct Component {
  std::vector<int> keys;  // its key segments
  int64_t num_steps = 0;  // of all its tiles of keys
  int num_slots = 0;      // query tiles
  bool is_own = false;    // whether a block adds up its dq by itself
};

struct Unit {
  int64_t num_steps;
  std::vector<ListedKeys> keys;
};

class Maker {
 public:
  Maker(const AttentionParams& params, const std::vector<QueryRun>& runs, DqForm form, int num_blocks)
      : params_(params),
        schedule_(*params.schedule),
        runs_(runs),
        form_(form),
        block_n_(key_tile_rows(widest_head_dim(params))) {
    find_readers();
    find_components(num_blocks);
  }

  BwdList make() {
    place_sums();
    make_units();
    BwdList list{.bytes = {}, .id = new_table_id()};
    list.num_units = static_cast<int>(units_.size());
    list.num_slots = num_slots_;
    list.num_shared_tiles = static_cast<int>(shared_tiles_.size());
    add_units(list);
    list.runs = append(list, readers_runs_);
    add_queries(list);
    list.shared_tiles = append(list, shared_tiles_);
    add_ranges(list);
    if (form_ == DqForm::kSeparate) add_dq_tiles(list);
    return list;
  }

 private:
  int num_query_segments() const { return static_cast<int>(runs_.size()); }
  int num_key_tiles(const KeySegment& segment) const {
    return static_cast<int>(ceil_div(segment.rows.size(), block_n_));
  }

  // The runs of every key segment's readers, without sums.
  void find_readers() {
    for (const KeySegment& segment : schedule_.key_segments) {
      first_run_.push_back(static_cast<int>(readers_.size()));
      int num_tiles = 0;
      for (const Reader& reader : segment.readers) {
        const auto run = std::lower_bound(runs_.begin(), runs_.end(), reader.queries.begin,
                                          [](const QueryRun& each, int64_t row) { return each.row_begin < row; });
        readers_.push_back(static_cast<int>(run - runs_.begin()));
        num_tiles += num_query_tiles(*run);
      }
      num_tiles_.push_back(num_tiles);
    }
    first_run_.push_back(static_cast<int>(readers_.size()));
  }

  void find_components(int num_blocks) {
    Components sets(runs_.size() + schedule_.key_segments.size());
    for (size_t key = 0; key < schedule_.key_segments.size(); ++key) {
      for (int i = first_run_[key]; i < first_run_[key + 1]; ++i) {
        sets.join(readers_[i], num_query_segments() + static_cast<int>(key));
      }
    }
    std::vector<int> number(runs_.size() + schedule_.key_segments.size(), -1);
    const auto component_of = [&](int segment) {
      int& of = number[sets.root(segment)];
      if (of < 0) {
        of = static_cast<int>(components_.size());
        components_.emplace_back();
      }
      return of;
    };
    int64_t num_steps = 0;
    for (size_t key = 0; key < schedule_.key_segments.size(); ++key) {
      Component& component = components_[component_of(num_query_segments() + static_cast<int>(key))];
      component.keys.push_back(static_cast<int>(key));
      const int64_t steps = int64_t{num_key_tiles(schedule_.key_segments[key])} * (kStepsOfItem + num_tiles_[key]);
      component.num_steps += steps;
      num_steps += steps;
    }
    component_of_queries_.resize(runs_.size());
    for (int queries = 0; queries < num_query_segments(); ++queries) {
      component_of_queries_[queries] = component_of(queries);
      components_[component_of_queries_[queries]].num_slots += num_query_tiles(runs_[queries]);
    }
    if (form_ == DqForm::kSeparate) return;
    const int64_t tile_bytes = kQueryTileRows * sizeof(float) *
                               with_bwd_head_dim(widest_head_dim(params_), []<int kHeadDim>() { return kHeadDim; });
    const int64_t num_batch_heads = params_.batch_size * params_.num_heads;
    for (Component& component : components_) {
      // No block may have much more to do than its share.
      component.is_own = component.num_slots > 0 && !component.keys.empty() &&
                         component.num_slots * tile_bytes <= kMostOwnBytes &&
                         2 * component.num_steps * num_blocks <= 3 * num_steps * num_batch_heads;
    }
  }

  void place_sums() {
    // Where the sums of every query segment begin, among shared ones or among the slots of its unit.
    std::vector<int> first(runs_.size()), used(components_.size());
    for (int queries = 0; queries < num_query_segments(); ++queries) {
      const int component = component_of_queries_[queries];
      const int num_tiles = num_query_tiles(runs_[queries]);
      if (components_[component].is_own) {
        first[queries] = used[component];
        num_slots_ = std::max(num_slots_, used[component] += num_tiles);
      } else if (form_ != DqForm::kSeparate && !components_[component].keys.empty()) {
        first[queries] = static_cast<int>(shared_tiles_.size());
        for (int i = 0; i < num_tiles; ++i) shared_tiles_.push_back(runs_[queries].first_tile + i);
      }
    }
    // Keys of a component in their order; who comes first and last to a query segment.
    std::vector<int> first_reading(runs_.size(), -1), last_reading(runs_.size(), -1);
    for (int i = 0; i < static_cast<int>(readers_.size()); ++i) {
      if (first_reading[readers_[i]] < 0) first_reading[readers_[i]] = i;
      last_reading[readers_[i]] = i;
    }
    for (int i = 0; i < static_cast<int>(readers_.size()); ++i) {
      const int queries = readers_[i];
      const QueryRun& run = runs_[queries];
      const bool is_own = components_[component_of_queries_[queries]].is_own;
      readers_runs_.push_back(
          {run.row_begin, run.row_end, run.first_tile,
           is_own ? SumsOfRun::own(first[queries], i == first_reading[queries], i == last_reading[queries])
                  : SumsOfRun::shared(first[queries])});
    }
  }

  void add_keys(int key, std::vector<ListedKeys>& keys) const {
    const KeySegment& segment = schedule_.key_segments[key];
    int first_query = 0, end_query = 0;  // nowhere if nobody reads it
    for (int i = first_run_[key]; i < first_run_[key + 1]; ++i) {
      const QueryRun& run = runs_[readers_[i]];
      first_query = i == first_run_[key] ? run.first_tile : std::min(first_query, run.first_tile);
      end_query = std::max(end_query, run.first_tile + num_query_tiles(run));
    }
    const int row_begin = static_cast<int>(segment.rows.begin), row_end = static_cast<int>(segment.rows.end);
    for (int row = row_begin; row < row_end; row += block_n_) {
      keys.push_back({row, row_end, first_run_[key], num_tiles_[key], first_query, end_query, row == row_begin,
                      row_end - row <= block_n_});
    }
  }

  void make_units() {
    for (const Component& component : components_) {
      std::vector<ListedKeys> keys;
      for (const int key : component.keys) add_keys(key, keys);
      if (component.is_own) {
        units_.push_back({component.num_steps, std::move(keys)});
      } else {
        for (const ListedKeys& tile : keys) units_.push_back({kStepsOfItem + tile.num_tiles, {tile}});
      }
    }
    std::stable_sort(units_.begin(), units_.end(),
                     [](const Unit& a, const Unit& b) { return a.num_steps > b.num_steps; });
  }

  template <class Part>
  static int64_t append(BwdList& list, const std::vector<Part>& part) {
    const size_t begin = list.bytes.size(), bytes = part.size() * sizeof(Part);
    list.bytes.resize(begin + part_bytes(bytes));
    if (bytes > 0) std::memcpy(list.bytes.data() + begin, part.data(), bytes);
    return static_cast<int64_t>(begin);
  }

  void add_units(BwdList& list) const {
    std::vector<int> begins{0};
    std::vector<ListedKeys> keys;
    for (const Unit& unit : units_) {
      keys.insert(keys.end(), unit.keys.begin(), unit.keys.end());
      begins.push_back(static_cast<int>(keys.size()));
    }
    list.units = append(list, begins);
    list.keys = append(list, keys);
  }

  void add_queries(BwdList& list) const {
    std::vector<ListedQueries> queries;
    for (int segment = 0; segment < num_query_segments(); ++segment) {
      const QueryRun& run = runs_[segment];
      const bool is_unread = form_ != DqForm::kSeparate && components_[component_of_queries_[segment]].keys.empty();
      for (int row = run.row_begin; row < run.row_end; row += kQueryTileRows) {
        queries.push_back({row, run.row_end, segment, is_unread});
      }
    }
    list.queries = append(list, queries);
  }

  void add_ranges(BwdList& list) const {
    std::vector<int> first_ranges{0};
    std::vector<ListedRange> ranges;
    for (const QuerySegment& segment : schedule_.query_segments) {
      for (const Range& keys : segment.keys) {
        ranges.push_back({static_cast<int>(keys.begin), static_cast<int>(keys.end)});
      }
      first_ranges.push_back(static_cast<int>(ranges.size()));
    }
    list.first_ranges = append(list, first_ranges);
    list.ranges = append(list, ranges);
  }

  void add_dq_tiles(BwdList& list) const {
    const HostTileList tiles = make_tile_list(
        params_, kDqTileRows,
        with_bwd_head_dim(widest_head_dim(params_), []<int kHeadDim>() { return dq_tuning(kHeadDim).block_n; }));
    list.num_dq_tiles = static_cast<int>(tiles.tiles.size());
    list.dq_tiles = append(list, tiles.tiles);
    list.dq_ranges = append(list, tiles.ranges);
  }

  const AttentionParams& params_;
  const Schedule& schedule_;
  const std::vector<QueryRun>& runs_;
  const DqForm form_;
  const int block_n_;

  // By key segment: who reads it, by numbers of runs, and how many tiles they have.
  std::vector<int> first_run_, readers_, num_tiles_;
  std::vector<Component> components_;
  std::vector<int> component_of_queries_;
  std::vector<ListedRun> readers_runs_;
  std::vector<int> shared_tiles_;
  std::vector<Unit> units_;
  int num_slots_ = 0;
};

}  // namespace

KeyList BwdList::key_list(const AttentionParams& params, const char* list, uint32_t* next_item) const {
  const int num_batch_heads = static_cast<int>(params.batch_size * params.num_heads);
  return {.num_items = num_units * num_batch_heads,
          .num_heads = static_cast<int>(params.num_heads),
          .num_batch_heads = num_batch_heads,
          .units = part<int>(list, units),
          .keys = part<ListedKeys>(list, keys),
          .runs = part<ListedRun>(list, runs),
          .next_item = next_item};
}

WorkTable BwdList::dq_table(const AttentionParams& params, const char* list) const {
  WorkTable table{};
  table.num_heads = static_cast<int>(params.num_heads);
  table.list = {part<ListedTile>(list, dq_tiles), part<KeyTiles>(list, dq_ranges),
                static_cast<int>(params.batch_size * params.num_heads)};
  table.num_items = num_dq_tiles * table.list.num_batch_heads;
  return table;
}

BwdList make_bwd_list(const AttentionParams& params, const std::vector<QueryRun>& runs, DqForm form, int num_blocks) {
  return Maker(params, runs, form, num_blocks).make();
}

bool pays_to_list(const BwdList& list, const AttentionParams& params, int num_blocks) {
  constexpr int kLeastRounds = 2;
  return list.num_shared_tiles == 0 &&
         list.num_units * params.batch_size * params.num_heads >= kLeastRounds * num_blocks;
}

}  // namespace mixed_attention::cuda::hopper
