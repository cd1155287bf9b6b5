// The forward on Hopper and its tangents: items, their splits, and what combines these.
#include <algorithm>
#include <memory>
#include <vector>

#include "ceil_div.h"
#include "cuda/hopper/config.h"
#include "cuda/hopper/fwd/launch.h"
#include "cuda/hopper/fwd/rows_of_splits.cuh"
#include "cuda/hopper/fwd/split_items.h"
#include "cuda/hopper/fwd/walk.cuh"
#include "cuda/hopper/jvp/config.h"
#include "cuda/hopper/plan/persistent_blocks.h"
#include "cuda/hopper/plan/tile_list.h"
#include "hopper.h"
#include "params.h"
#include "visits.h"

namespace walks {
namespace {

// Where a split's results were left, and by what.
struct SplitRows {
  bool is_written;
  int64_t sequence;
  int row_begin;
};

// As the blocks of hopper_attention_fwd_kernel (fwd/kernel.cuh) and those of the combination go.
template <class Walk, int kBlockM, int kBlockN, class ProducersWalk = Walk, int kTeams = 1>
void check_launch(const Problem& problem, const Visits& listed, const hopper::WorkTable& table) {
  const hopper::ItemSplits& splits = table.splits;
  Visits visits;
  Rows stored;
  std::vector<SplitRows> results(splits.num_items());
  const auto sequence_of = [&](const hopper::ItemRows& rows) {
    return int64_t{rows.batch} * problem.num_heads + rows.head;
  };
  const auto rows_of = [](const hopper::ItemRows& rows) {
    return ma::Range{rows.row_begin, std::min(rows.row_begin + kBlockM, rows.row_end)};
  };

  // As one of the teams of a block, or as the block where it has one.
  int num_items_of_block = 0;
  const auto walk_as = [&](int team) {
    auto items = hopper::walk_of_team<Walk>(table, team);
    auto producers_items = hopper::walk_of_team<ProducersWalk>(table, team);
    while (items.next_with_keys()) {
      ++num_items_of_block;
      const bool is_same = producers_items.next_with_keys() && producers_items.item == items.item;
      expect(is_same, "a producer goes through other items than consumers");
      const hopper::TileShare share = producers_items.share();
      const hopper::ItemRows rows = items.rows();
      expect(share.begin < share.end, "a split has no key tile, but its producer copies one");
      hopper::KeyTileIterator<kBlockN> keys(producers_items, share.begin);
      for (int i = share.begin; i < share.end; ++i) {
        const hopper::KeyTile tile = keys.next();
        const bool is_partial = i < share.num_partial;
        const int num_seen = is_partial ? items.ranges()[i].tail : kBlockN;
        expect(tile.num_rows == num_seen, "columns are masked as those of another key tile");
        visits.add(sequence_of(rows), rows_of(rows), {tile.row_begin, tile.row_begin + tile.num_rows});
      }
      if (splits.has(items.item)) {
        SplitRows& split = results.at(splits.place(items.item));
        expect(!split.is_written, "two splits share a place");
        split = {true, sequence_of(rows), rows.row_begin};
      } else {
        stored.add(sequence_of(rows), rows_of(rows));
      }
    }
    expect(!producers_items.next_with_keys(), "a producer copies for an item that consumers do not have");
    for (bool is_left = items.item < table.num_items; is_left; is_left = items.next()) {
      ++num_items_of_block;
      expect(items.tiles().num_tiles == 0 && !splits.has(items.item), "an item with keys comes behind one without");
      stored.add(sequence_of(items.rows()), rows_of(items.rows()));
    }
  };
  const int num_blocks = hopper::num_persistent_blocks(ma::ceil_div(table.num_items, kTeams), kDevice);
  for_each_block(num_blocks, [&] {
    num_items_of_block = 0;
    for (int team = 0; team < kTeams; ++team) walk_as(team);
    const bool is_even = num_items_of_block == table.num_items / num_blocks ||
                         num_items_of_block == ma::ceil_div(table.num_items, num_blocks);
    expect(is_even, "a block has two items more than another one");
  });

  const hopper::RowsOfSplits<kBlockM> rows_of_splits{table};
  for (int item = 0; item < splits.num_whole; ++item) {
    const auto find = [&](int row) { return rows_of_splits.find(int64_t{item} * kBlockM + row); };
    const ma::cuda::SplitRow first = find(0);
    int num_rows = 0;  // rows exist up to one from which on none does
    for (int step = 256; step > 0; step /= 2) {
      if (num_rows + step <= kBlockM && find(num_rows + step - 1).exists) num_rows += step;
    }
    const int64_t sequence = first.batch * problem.num_heads + first.head;
    stored.add(sequence, {first.row, first.row + num_rows});
    for (int i = 0; i < splits.num_splits; ++i) {
      const int64_t row = first.first_split + i * first.split_step;
      expect(row % kBlockM == 0, "a split is read from its middle on");
      const SplitRows& split = results.at(row / kBlockM);
      expect(split.is_written && split.sequence == sequence && split.row_begin == first.row,
             "a split is read as another item's, or was never written");
      const ma::cuda::SplitRow last = find(num_rows - 1);
      expect(last.first_split - first.first_split == last.row - first.row, "rows of a split are exchanged");
    }
  }

  visits.expect_equal(listed, "forward on Hopper");
  stored.expect_all(problem.num_sequences(), problem.seqlen_q(), "output on Hopper");
}

template <int kBlockM, int kBlockN>
void check_table(const Problem& problem, const Visits& listed, const hopper::WorkTable& given) {
  const std::unique_ptr<hopper::WorkTable> table = with_poison(problem, given);
  check_launch<hopper::ItemWalk<kBlockM>, kBlockM, kBlockN>(problem, listed, *table);
}

// The list where the device has it, between rows that no plan lists.
template <class Config>
void check_list(const Problem& problem, const Visits& listed, const ma::FwdParams& params) {
  constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN;
  const hopper::HostTileList list = hopper::make_tile_list(params, kBlockM, kBlockN);
  std::vector<hopper::ListedTile> tiles(list.tiles.size() + 2, {-1000, -900, 0, 0, 1});
  std::copy(list.tiles.begin(), list.tiles.end(), tiles.begin() + 1);
  std::vector<hopper::KeyTiles> ranges(list.ranges.size() + 2, {-1000, 1, 1});
  std::copy(list.ranges.begin(), list.ranges.end(), ranges.begin() + 1);
  hopper::WorkTable table = list.table(params);
  table.list.tiles = tiles.data() + 1;
  table.list.ranges = ranges.data() + 1;
  check_launch<hopper::Walk<Config>, kBlockM, kBlockN, hopper::LeanWalk<Config>, Config::kTeams>(problem, listed,
                                                                                                 table);
}

// The walks of the tangents' kernels (jvp), which have no splits.
template <hopper::JvpForm kForm>
void check_tangents(const Problem& problem, const Visits& listed, const ma::FwdParams& params) {
  constexpr hopper::JvpTuning kTuning = hopper::jvp_tuning(kForm);
  constexpr int kBlockM = kTuning.block_m(), kBlockN = kTuning.block_n;
  check_table<kBlockM, kBlockN>(problem, listed, hopper::make_work_table(params, kBlockM, kBlockN));
}

// What the host has made room for.
template <int kBlockM>
void check_workspace(const hopper::FwdPlan& plan, const ma::FwdParams& params) {
  const int64_t num_rows = int64_t{plan.table.splits.num_items()} * kBlockM;
  if (num_rows == 0) return;
  const int64_t out_end = bytes_between(params.workspace, plan.partial_out + num_rows * params.head_dim_v);
  const int64_t splits_begin = bytes_between(params.workspace, plan.row_lses);
  const int64_t splits_end = bytes_between(params.workspace, plan.row_lses + num_rows);
  expect(out_end <= splits_begin && splits_end <= static_cast<int64_t>(plan.workspace_size),
         "splits leave the workspace");
}

// Any items with keys that follow one another, in as many splits as they allow.
void force_splits(const Problem& problem, hopper::WorkTable& table) {
  int num_with_keys = 0;
  for (const hopper::QueryTiles* segment = table.segments; num_with_keys < table.num_items && segment->num_tiles > 0;
       ++segment) {
    num_with_keys = segment->item_end;
  }
  if (num_with_keys == 0) return;
  const int begin = static_cast<int>(problem.choose(10, 2) * problem.choose(11, num_with_keys));
  const int end = static_cast<int>(begin + 1 + problem.choose(12, num_with_keys - begin));
  const int most = hopper::most_splits(table, begin, end);
  const int num_splits = problem.choose(13, 2) == 0 ? most : static_cast<int>(1 + problem.choose(14, most));
  if (num_splits > 1) hopper::cut_items(table, {begin, end - begin, num_splits});
}

}  // namespace

void check_hopper_fwd(const Problem& problem) {
  const ma::Schedule schedule = schedule_of(problem);
  const bool is_fp32 = problem.choose(0, 3) == 0;
  ma::FwdParams params{};
  fill(params, problem, schedule, is_fp32 ? ma::DType::kFloat32 : ma::DType::kBFloat16,
       is_fp32 ? problem.choose(1, {64, 128}) : problem.choose(1, {8, 64, 96, 128, 192, 256}),
       !is_fp32 && problem.choose(2, 4) == 0);
  narrow(problem, params);
  params.allow_tf32 = problem.choose(3, 2) == 0;
  const Visits listed = listed_visits(problem);
  hopper::with_fwd_kernel(params, [&]<typename Element, int kHeadDim, int kLimbs>() {
    using Config = hopper::FwdConfig<Element, kHeadDim, kLimbs, hopper::FwdForm::kPlain>;
    if constexpr (!Config::kHasRowScales) {
      check_list<hopper::FwdConfig<Element, kHeadDim, kLimbs, hopper::FwdForm::kListed>>(problem, listed, params);
    }
    if (!hopper::fits_work_table(params)) return;
    check_tangents<hopper::JvpForm::kQuery>(problem, listed, params);
    check_tangents<hopper::JvpForm::kQueries>(problem, listed, params);
    const hopper::FwdPlan plan = hopper::plan_fwd(params);
    check_workspace<Config::kBlockM>(plan, params);
    if (plan.form != hopper::FwdForm::kListed) {
      check_table<Config::kBlockM, Config::kBlockN>(problem, listed, plan.table);
    }
    hopper::WorkTable table = hopper::make_work_table(params, Config::kBlockM, Config::kBlockN);
    force_splits(problem, table);
    check_table<Config::kBlockM, Config::kBlockN>(problem, listed, table);
  });
}

}  // namespace walks
