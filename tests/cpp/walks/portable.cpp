// The portable kernels: tiles of both passes, their blocks, and the splits that walks are cut into.
#include <algorithm>
#include <vector>

#include "cuda/portable/config.h"
#include "cuda/portable/launch.h"
#include "cuda/portable/plan.h"
#include "cuda/portable/tangent_plan.h"
#include "cuda/portable/tile_iterator.cuh"
#include "params.h"
#include "visits.h"

namespace walks {
namespace {

namespace portable = ma::cuda::portable;
using ma::cuda::WorkRange;
using portable::Side;
using portable::Tile;

// Its ranges as a walk finds them, with one behind the last that no plan lists.
struct Table {
  std::vector<ma::cuda::WorkSegment> segments;
  std::vector<WorkRange> ranges;
  ma::cuda::InlineWork in_parameters;
  ma::cuda::DeviceWork table;

  Table(const portable::Pass& pass, int num_splits)
      : segments(pass.host.segments),
        ranges(pass.host.ranges),
        in_parameters{},
        table{nullptr, nullptr, static_cast<int32_t>(segments.size()), static_cast<int32_t>(pass.host.num_tiles),
              num_splits} {
    segments.push_back({-1000, -1000, 0, 1, table.num_tiles, 1});
    ranges.push_back({-1000, -900, 0, 0});
    if (!pass.host.fits_inline()) {
      table.segments = segments.data();
      table.ranges = ranges.data();
      return;
    }
    const auto put = [](const auto& from, auto& to) {
      std::fill(std::begin(to), std::end(to), from.back());
      std::copy_n(from.begin(), std::min(from.size(), std::size(to)), to);
    };
    put(segments, in_parameters.segments);
    put(ranges, in_parameters.ranges);
  }
};

// Where the keys of a visit stand in the list of the queries' segment, by which dropout draws.
void expect_listed(const Problem& problem, int64_t query_row, int64_t key_row, int range_index, int64_t offset) {
  size_t segment = 0;
  for (int64_t end = problem.segments[0].num_rows; end <= query_row; end += problem.segments[segment].num_rows) {
    ++segment;
  }
  const std::vector<ma::Range>& keys = problem.segments[segment].keys;
  expect(0 <= range_index && range_index < static_cast<int>(keys.size()) && 0 <= offset &&
             offset < keys[range_index].size() && keys[range_index].begin + offset == key_row,
         "dropout draws for other keys");
}

// As the thread blocks of one launch go.
template <int kBlockRows>
void check_launch(const Problem& problem, const Visits& listed, const portable::Pass& pass, int tile_rows,
                  int num_splits, Side side) {
  const Table host(pass, num_splits);
  const ma::cuda::DeviceWork& table = host.table;
  const ma::cuda::WorkView view = ma::cuda::view(table, host.in_parameters);
  Visits visits;
  Rows stored;  // of all splits
  const int64_t grid = problem.num_sequences() * table.num_tiles * num_splits;
  for (int64_t block_index = 0; block_index < grid; ++block_index) {
    const ma::cuda::WorkItem item = ma::cuda::locate(table, view, static_cast<unsigned>(block_index), tile_rows,
                                                     static_cast<int>(problem.num_heads));
    const int64_t sequence = int64_t{item.batch} * problem.num_heads + item.head;
    const ma::Range rows{item.row_begin, item.row_begin + item.num_rows};
    expect(0 < item.num_rows && item.num_rows <= tile_rows, "a tile has no rows or too many");
    stored.add(sequence + item.split * problem.num_sequences(), rows);
    for (ma::cuda::BlockWalk<kBlockRows> walk(view, item, num_splits); !walk.done(); walk.advance()) {
      const ma::cuda::Block block = walk.block();
      const WorkRange& range = walk.range_of(block);
      const ma::Range others{block.row_begin, block.row_begin + block.num_rows};
      expect(0 < block.num_rows && block.num_rows <= kBlockRows, "a block has no rows or too many");
      if (side == Side::kQueries) {
        visits.add(sequence, rows, others);
        expect_listed(problem, rows.begin, others.begin, range.range_index, block.row_begin - range.begin);
      } else {
        visits.add(sequence, others, rows);
        const int offset = item.row_begin - view.segments[item.segment].row_begin + range.range_offset;
        expect_listed(problem, others.begin, rows.begin, range.range_index, offset);
      }
    }
  }
  const bool is_by_query = side == Side::kQueries;
  visits.expect_equal(listed, is_by_query ? "portable kernels, by query" : "portable kernels, by key");
  stored.expect_all(problem.num_sequences() * num_splits, is_by_query ? problem.seqlen_q() : problem.seqlen_k,
                    "results of the portable kernels");
}

void check_pass(const Problem& problem, const Visits& listed, const portable::PassOfCall& call, const Tile& tile,
                Side side) {
  const portable::Pass& pass = *call.pass;
  expect(pass.host.fits_inline() == (call.table == nullptr),
         "a table takes memory that fits the parameters, or takes none and does not");
  const int forced = static_cast<int>(1 + problem.choose(12, problem.choose(13, {4, 40})));
  for (const int num_splits : {pass.num_splits, forced}) {
    switch (tile.block_rows) {
      case 16: check_launch<16>(problem, listed, pass, tile.rows, num_splits, side); break;
      case 32: check_launch<32>(problem, listed, pass, tile.rows, num_splits, side); break;
      case 64: check_launch<64>(problem, listed, pass, tile.rows, num_splits, side); break;
      default: throw Failure("tiles of so many rows are not walked by this test");
    }
  }
}

}  // namespace

void check_portable(const Problem& problem) {
  const ma::Schedule schedule = schedule_of(problem);
  ma::BwdParams params{};
  fill(params, problem, schedule, problem.choose(0, {ma::DType::kFloat32, ma::DType::kBFloat16}),
       problem.choose(1, {1, 32, 64, 96, 128, 192, 256}), false);
  params.allow_tf32 = problem.choose(2, 2) == 0;
  params.deterministic = problem.choose(3, 2) == 0;
  const Visits listed = listed_visits(problem);

  const portable::FwdPasses fwd = portable::plan_fwd({static_cast<const ma::AttentionParams&>(params)});
  check_pass(problem, listed, fwd.by_query, portable::fwd_tile(fwd.arithmetic, fwd.head_dim), Side::kQueries);
  const portable::BwdPasses bwd = portable::plan_bwd(params);
  check_pass(problem, listed, bwd.by_key, portable::dk_dv_tile(bwd.arithmetic, bwd.head_dim), Side::kKeys);
  if (!bwd.adds_dq) {
    check_pass(problem, listed, bwd.by_query, portable::dq_tile(bwd.arithmetic, bwd.head_dim), Side::kQueries);
  }

  if (!portable::refusal_of_tangents({params.dtype, params.head_dim, params.head_dim_v, kDevice}).empty()) return;
  for (const bool moves_keys : {false, true}) {
    ma::JvpParams moving{{static_cast<const ma::AttentionParams&>(params)}};
    moving.tangents.count = 1;
    if (moves_keys) moving.tangents.k = &schedule;  // anything: plans read none
    const portable::JvpPlan jvp = portable::plan_jvp(moving);
    check_pass(problem, listed, jvp.by_query, jvp.tile, Side::kQueries);
  }
  const portable::BwdJvpPlan bwd_jvp = portable::plan_bwd_jvp({params});
  const Tile tile = portable::bwd_jvp_tile(bwd_jvp.arithmetic, bwd_jvp.head_dim);
  check_pass(problem, listed, bwd_jvp.by_query, tile, Side::kQueries);
  check_pass(problem, listed, bwd_jvp.by_key, tile, Side::kKeys);
}

}  // namespace walks
