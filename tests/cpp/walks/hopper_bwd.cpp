// The backward on Hopper: key tiles and the queries that read them, in every form; dq by queries, or by its sums.
#include <algorithm>
#include <vector>

#include "cuda/hopper/bwd/launch.h"
#include "cuda/hopper/bwd/list.h"
#include "cuda/hopper/bwd/listed_walk.cuh"
#include "cuda/hopper/bwd/query_walk.cuh"
#include "cuda/hopper/bwd/wide_dk_dv_config.h"
#include "cuda/hopper/bwd_fp32/config.h"
#include "cuda/hopper/plan/persistent_blocks.h"
#include "cuda/hopper/plan/work_items.cuh"
#include "hopper.h"
#include "params.h"
#include "visits.h"

namespace walks {
namespace {

using hopper::BwdShare;
using hopper::BwdWorkspace;
using hopper::DqForm;

// An addition to sums of dq, in the order of a block.
struct Addition {
  int64_t place;
  int turn;
};

// Blocks wait for the turns of their additions, one after the other: all must come, each once.
void expect_turns(const std::vector<std::vector<Addition>>& of_blocks, int64_t num_places) {
  std::vector<int> counts(num_places);
  std::vector<size_t> done(of_blocks.size());
  size_t num_left = 0;
  for (const std::vector<Addition>& additions : of_blocks) num_left += additions.size();
  for (bool goes_on = true; goes_on;) {
    goes_on = false;
    for (size_t block = 0; block < of_blocks.size(); ++block) {
      for (size_t& i = done[block]; i < of_blocks[block].size(); ++i, --num_left, goes_on = true) {
        const Addition& addition = of_blocks[block][i];
        if (counts[addition.place] != addition.turn) break;
        ++counts[addition.place];
      }
    }
  }
  expect(num_left == 0, "blocks wait for turns to add to dq that never come");
}

int64_t bytes_of_rows(const ma::BwdParams& params, int64_t head_dim) {
  return 2 * params.batch_size * params.num_heads * params.seqlen_q * head_dim;
}

int64_t bytes_of_out(const ma::BwdParams& params) { return bytes_of_rows(params, params.head_dim_v); }

// Whether gradients of queries that a kernel owns, where they cannot lie in their place at once, have room.
void check_dq(const ma::BwdParams& params, const BwdWorkspace& workspace) {
  const void* dq = workspace.dq.data;
  if (params.dq != params.q) return expect(dq == params.dq, "dq is written apart from its place");
  const bool is_spare = dq == params.spare_out;
  const int64_t begin = is_spare ? 0 : bytes_between(params.workspace, dq);
  const int64_t end = is_spare ? bytes_of_out(params) : static_cast<int64_t>(workspace.size);
  expect(0 <= begin && begin + bytes_of_rows(params, params.head_dim) <= end, "dq leaves its memory");
}

// A share of a call, as the kernels behind the statistics get it.
class ShareCheck {
 public:
  ShareCheck(const Problem& problem, const ma::BwdParams& whole, const BwdWorkspace& workspace, const BwdShare& share,
             const std::vector<hopper::QueryRun>& runs, Visits& visits)
      : problem_(problem),
        params_(hopper::params_of(share, whole)),
        sums_(hopper::accum_of(share, whole, workspace.dq_accum)),
        first_sequence_(share.first * (whole.batch_size == 1 ? 1 : whole.num_heads)),
        num_sequences_(params_.batch_size * params_.num_heads),
        num_tiles_(hopper::num_query_tiles(runs)),
        runs_(runs),
        visits_(visits),
        owners_(workspace.plan.dq_form == DqForm::kSeparate ? 0 : num_sequences_ * sums_.num_tiles, -1) {
    check_addresses(whole, workspace, share);
  }

  // As the blocks of hopper_dk_dv_kernel go, those of wide heads and those for fp32; dk, dv: rows that were written.
  template <typename Config>
  void walk_keys(Rows& dk, Rows& dv) {
    const auto table = with_poison(*params_.schedule, hopper::make_key_work_table(params_, runs_, Config::kBlockN));
    std::vector<std::vector<Addition>> additions;
    for_each_block(hopper::num_persistent_blocks(table->num_items, kDevice, Config::kSplits), [&] {
      additions.emplace_back();
      for (hopper::KeyItems<Config> item(*table); item.next();) {
        const ma::Range keys{item.row_begin, std::min(item.row_begin + Config::kBlockN, item.tiles().row_end)};
        const int64_t sequence = sequence_of(item);
        if (Config::kSplits == 1 || hopper::QueryShare<Config>::block_rank() == 0) dv.add(global(sequence), keys);
        if (Config::kSplits == 1 || hopper::QueryShare<Config>::block_rank() == 1) dk.add(global(sequence), keys);
        if (hopper::QueryShare<Config>(item.tiles()).count == 0) continue;
        hopper::QueryWalk<Config> walk(*table, item);
        for (int i = 0; i < walk.num_tiles(); ++i) {
          const hopper::QueryTile tile = walk.next();
          visit(sequence, tile, keys);
          if constexpr (Config::kIsOrdered) {
            additions.back().push_back({sequence * sums_.num_tiles + walk.place(), walk.turn()});
            own(additions.back().back().place, sequence, tile.index);
          } else if (!owners_.empty()) {
            own(sequence * num_tiles_ + tile.index, sequence, tile.index);
          }
        }
      }
    });
    if constexpr (Config::kIsOrdered) expect_turns(additions, num_sequences_ * sums_.num_tiles);
  }

  // As the blocks of hopper_dq_accum_kernel go: each reads what was added for its tile, and nothing else does.
  void read_sums(DqForm form, Rows& dq) {
    const std::vector<hopper::DqAccumRun> accum_runs = hopper::make_dq_accum_runs(*params_.schedule, runs_, form);
    expect(accum_runs.size() <= hopper::KeyWorkTable::kMaxRanges, "more runs of sums than a kernel has room for");
    for (int64_t sequence = 0; sequence < num_sequences_; ++sequence) {
      for (int index = 0; index < num_tiles_; ++index) {
        const hopper::QueryTile tile = tile_of(index);
        dq.add(global(sequence), {tile.row_begin, tile.row_begin + tile.num_rows});
        for (const hopper::DqAccumRun& run : accum_runs) {
          const int tile_of_run = index - run.first_tile;
          if (tile_of_run < 0 || tile_of_run >= run.num_tiles) continue;
          int64_t& owner = owners_.at(sequence * sums_.num_tiles + run.first_accum + tile_of_run);
          // Sums that are added as they come begin with zeros, which are read where nobody added.
          const bool is_own = owner == sequence * num_tiles_ + index;
          expect(is_own || (owner == -1 && form == DqForm::kAtomic), "sums of dq are read as another tile's");
          owner = kRead;
        }
      }
    }
    expect(std::none_of(owners_.begin(), owners_.end(), [](int64_t owner) { return owner >= 0; }),
           "sums of dq are never read");
  }

 private:
  static constexpr int64_t kRead = -2;

  int64_t global(int64_t sequence) const { return first_sequence_ + sequence; }

  template <class Item>
  int64_t sequence_of(const Item& item) const {
    return int64_t{item.batch} * params_.num_heads + item.head;
  }

  void visit(int64_t sequence, const hopper::QueryTile& tile, ma::Range keys) {
    expect(0 <= tile.index && tile.index < num_tiles_, "a query tile has statistics that nobody makes");
    const hopper::QueryTile same = tile_of(tile.index);
    expect(same.row_begin == tile.row_begin && same.num_rows == tile.num_rows, "a tile has another one's statistics");
    expect(0 < tile.num_rows && tile.num_rows <= hopper::kQueryTileRows, "a query tile has no rows or too many");
    visits_.add(global(sequence), {tile.row_begin, tile.row_begin + tile.num_rows}, keys);
  }

  void own(int64_t place, int64_t sequence, int index) {
    int64_t& owner = owners_.at(place);
    const int64_t tile = sequence * num_tiles_ + index;
    expect(owner == -1 || owner == tile, "two query tiles share the place of their sums of dq");
    owner = tile;
    expect(place < sums_.num_spare + sums_.num_others, "sums of dq lie where there is no room");
  }

  // Whether the share's tensors, statistics, sums and turns are those of its sequences, and within their memory.
  void check_addresses(const ma::BwdParams& whole, const BwdWorkspace& workspace, const BwdShare& share) const {
    const hopper::QueryStats& of_all = workspace.stats;
    const hopper::QueryStats stats = hopper::stats_of(share, whole, of_all);
    const int64_t skipped = first_sequence_ * num_tiles_ * hopper::kStatsTileFloats;
    expect(stats.lse_log2 == of_all.lse_log2 + skipped && stats.delta == of_all.delta + skipped,
           "a share has other statistics than its own");
    for (int64_t sequence = 0; sequence < num_sequences_; ++sequence) {
      const auto expect_same = [&](const void* all, const void* own, const ma::Strides& strides) {
        const auto offset = [&](int64_t index, int64_t num_heads) {
          return 2 * (index / num_heads * strides.batch + index % num_heads * strides.head);
        };
        expect(
            bytes_between(all, own) == offset(global(sequence), whole.num_heads) - offset(sequence, params_.num_heads),
            "a share works on other heads or sequences than its own");
      };
      expect_same(whole.q, params_.q, whole.q_strides);
      expect_same(whole.k, params_.k, whole.k_strides);
      expect_same(whole.v, params_.v, whole.v_strides);
      expect_same(whole.dout, params_.dout, whole.dout_strides);
      expect_same(whole.dq, params_.dq, whole.dq_strides);
      expect_same(whole.dk, params_.dk, whole.dk_strides);
      expect_same(whole.dv, params_.dv, whole.dv_strides);
    }
    if (owners_.empty()) return;
    const int64_t tile_bytes =
        hopper::kQueryTileRows * sizeof(float) *
        hopper::with_bwd_head_dim(hopper::widest_head_dim(params_), []<int kHeadDim>() { return kHeadDim; });
    const int64_t spare_bytes = bytes_of_out(whole);
    const auto end = static_cast<int64_t>(workspace.size);
    expect(sums_.num_spare * tile_bytes <= (whole.spare_out == nullptr ? 0 : spare_bytes), "sums leave spare memory");
    expect(bytes_between(whole.workspace, sums_.others) + sums_.num_others * tile_bytes <= end, "sums leave memory");
    if (sums_.turns == nullptr) return;
    expect(sums_.turns == workspace.dq_accum.turns + first_sequence_ * sums_.num_tiles,
           "a share counts turns where another one does");
    expect(bytes_between(whole.workspace, sums_.turns + num_sequences_ * sums_.num_tiles) <= end, "turns leave memory");
  }

  const Problem& problem_;
  const ma::BwdParams params_;
  const hopper::DqAccum sums_;
  const int64_t first_sequence_, num_sequences_, num_tiles_;
  hopper::QueryTile tile_of(int index) const {
    const int run = hopper::run_of_tile(runs_.data(), static_cast<int>(runs_.size()), index);
    return hopper::query_tile(runs_.data(), run, index);
  }

  const std::vector<hopper::QueryRun>& runs_;
  Visits& visits_;
  std::vector<int64_t> owners_;  // of places of sums of dq: which tile of all sequences has added there
};

// As the blocks of hopper_dq_kernel go, and those for fp32.
template <typename Config, typename Walk, typename Table>
void walk_queries(const Problem& problem, const Visits& listed, const Table& table) {
  Visits visits;
  Rows dq;
  for_each_block(hopper::num_persistent_blocks(table.num_items, kDevice, Config::kSplits), [&] {
    for (hopper::ItemsOf<Walk> item(table); item.next();) {
      const int64_t sequence = int64_t{item.batch} * problem.num_heads + item.head;
      const ma::Range rows{item.row_begin, std::min(item.row_begin + Config::kBlockM, item.tiles().row_end)};
      dq.add(sequence, rows);
      if (item.tiles().num_tiles == 0) continue;
      hopper::KeyTileIterator<Config::kBlockN> keys(item);
      for (int i = 0; i < item.tiles().num_tiles; ++i) {
        const hopper::KeyTile tile = keys.next();
        const bool is_partial = i < item.tiles().num_partial;
        const int num_seen = is_partial ? item.ranges()[i].tail : Config::kBlockN;
        expect(tile.num_rows == num_seen, "columns are masked as those of another key tile");
        visits.add(sequence, rows, {tile.row_begin, tile.row_begin + tile.num_rows});
      }
    }
  });
  visits.expect_equal(listed, "dq by queries on Hopper");
  dq.expect_all(problem.num_sequences(), problem.seqlen_q(), "dq on Hopper");
}

template <typename Config, typename Table>
void check_dq_kernel(const Problem& problem, const Visits& listed, const ma::BwdParams& params) {
  const auto copy = with_poison(problem, hopper::make_work_table(params, Config::kBlockM, Config::kBlockN));
  walk_queries<Config, hopper::ItemWalk<Config::kBlockM, Table>>(problem, listed, Table{*copy});
}

// A list as the device has it.
class ListCheck {
 public:
  ListCheck(const Problem& problem, const Visits& listed, const ma::BwdParams& params,
            const std::vector<hopper::QueryRun>& runs, const hopper::BwdPlan& plan)
      : problem_(problem),
        listed_(listed),
        params_(params),
        host_(*plan.list),
        form_(plan.dq_form),
        list_(host_.bytes.data()),
        num_tiles_(hopper::num_query_tiles(runs)),
        shared_(problem.num_sequences() * host_.num_shared_tiles, -1) {
    check_workspace(runs, plan);
  }

  void run() {
    hopper::with_bwd_head_dim(hopper::widest_head_dim(params_), [&]<int kHeadDim>() {
      form_ == DqForm::kSeparate ? walk_keys<hopper::DkDvConfig<__half, kHeadDim, false, DqForm::kSeparate, 1, true>>()
                                 : walk_keys<hopper::DkDvConfig<__half, kHeadDim, false, DqForm::kAtomic, 1, true>>();
      if (form_ == DqForm::kSeparate) {
        using Config = hopper::DqConfig<__half, kHeadDim, false, true>;
        walk_queries<Config, hopper::ListWalk<Config::kBlockM>>(problem_, listed_, host_.dq_table(params_, list_));
      }
    });
    visits_.expect_equal(listed_, "dk and dv of a list on Hopper");
    dk_.expect_all(problem_.num_sequences(), problem_.seqlen_k, "dk of a list on Hopper");
    if (form_ == DqForm::kSeparate) return;
    clear_unread();
    read_shared();
    dq_.expect_all(problem_.num_sequences(), problem_.seqlen_q(), "dq of a list on Hopper");
  }

 private:
  // Sums of a query tile that a block adds up by itself: whose they are, which visits have come.
  struct Slot {
    int64_t tile = -1;
    bool is_open = false;
  };

  // As the blocks of hopper_dk_dv_kernel go; which of them takes an item is told by nobody.
  template <typename Config>
  void walk_keys() {
    uint32_t next_item = 0;
    const hopper::KeyList list = host_.key_list(params_, list_, &next_item);
    std::vector<Slot> slots(host_.num_slots);
    for (int number = 0; number < list.num_items; ++number) {
      const hopper::UnitOfList unit(list, number);
      expect(unit.begin < unit.end, "a unit has no tile of keys");
      const int64_t sequence = int64_t{unit.batch} * problem_.num_heads + unit.head;
      for (int i = unit.begin; i < unit.end; ++i) {
        const hopper::ListedKeys& tile = list.keys[i];
        const ma::Range keys{tile.row_begin, std::min(tile.row_begin + Config::kBlockN, tile.row_end)};
        expect(keys.size() > 0, "a tile of keys has no rows");
        dk_.add(sequence, keys);
        expect(0 <= tile.first_query && tile.first_query <= tile.end_query && tile.end_query <= num_tiles_,
               "who looks for references looks at tiles that there are not");
        if (tile.num_tiles == 0) continue;
        hopper::ListedQueryIterator queries(list.runs, tile.first_run, tile.is_first, tile.is_last);
        for (int j = 0; j < tile.num_tiles; ++j) {
          const hopper::QueryTile query = queries.next();
          check_tile(query);
          expect(tile.first_query <= query.index && query.index < tile.end_query, "who looks for references misses it");
          const ma::Range rows{query.row_begin, query.row_begin + query.num_rows};
          visits_.add(sequence, rows, keys);
          if constexpr (Config::kAddsDq) add(sequence, query, queries.visit(query), rows, slots);
        }
      }
      for (const Slot& slot : slots) expect(!slot.is_open, "sums of dq that a block has begun never leave");
    }
  }

  void add(int64_t sequence, const hopper::QueryTile& query, const hopper::DqVisit& visit, ma::Range rows,
           std::vector<Slot>& slots) {
    const int64_t tile = sequence * num_tiles_ + query.index;
    expect(visit.row_begin == rows.begin && visit.num_rows == rows.size(), "dq leaves to other rows");
    if (visit.shares()) {
      int64_t& owner = shared_.at(sequence * host_.num_shared_tiles + visit.place);
      expect(owner == -1 || owner == tile, "two query tiles share the place of their sums of dq");
      owner = tile;
      return;
    }
    Slot& slot = slots.at(visit.place);
    expect(slot.is_open != visit.begins(), "sums of dq begin twice, or have not begun");
    if (visit.begins()) slot = {tile, true};
    expect(slot.tile == tile, "two query tiles share a slot");
    if (!visit.ends()) return;
    slot.is_open = false;
    dq_.add(sequence, rows);
  }

  void check_tile(const hopper::QueryTile& query) const {
    expect(0 <= query.index && query.index < num_tiles_, "a query tile has statistics that nobody makes");
    const hopper::QueryTile same = tile_of(query.index);
    expect(same.row_begin == query.row_begin && same.num_rows == query.num_rows, "a tile has another one's statistics");
    expect(0 < query.num_rows && query.num_rows <= hopper::kQueryTileRows, "a query tile has no rows or too many");
  }

  hopper::QueryTile tile_of(int index) const {
    return hopper::find_tile(host_.part<hopper::ListedQueries>(list_, host_.queries), index).queries;
  }

  // As hopper_bwd_stats_kernel does.
  void clear_unread() {
    const auto* queries = host_.part<hopper::ListedQueries>(list_, host_.queries);
    for (int64_t sequence = 0; sequence < problem_.num_sequences(); ++sequence) {
      for (int index = 0; index < num_tiles_; ++index) {
        if (queries[index].is_unread == 0) continue;
        const hopper::QueryTile tile = tile_of(index);
        dq_.add(sequence, {tile.row_begin, tile.row_begin + tile.num_rows});
      }
    }
  }

  // As hopper_dq_accum_kernel does.
  void read_shared() {
    const int* tiles = host_.part<int>(list_, host_.shared_tiles);
    for (int64_t sequence = 0; sequence < problem_.num_sequences(); ++sequence) {
      for (int i = 0; i < host_.num_shared_tiles; ++i) {
        const hopper::QueryTile tile = tile_of(tiles[i]);
        expect(shared_.at(sequence * host_.num_shared_tiles + i) == sequence * num_tiles_ + tiles[i],
               "sums of dq are read as another tile's");
        dq_.add(sequence, {tile.row_begin, tile.row_begin + tile.num_rows});
      }
    }
  }

  void check_workspace(const std::vector<hopper::QueryRun>& runs, const hopper::BwdPlan& plan) const {
    const BwdWorkspace workspace = hopper::bwd_workspace(params_, runs, plan);
    const auto end_of = [&](const auto* part, int64_t count) { return bytes_between(params_.workspace, part + count); };
    const int64_t tile_floats =
        hopper::kQueryTileRows *
        hopper::with_bwd_head_dim(hopper::widest_head_dim(params_), []<int kHeadDim>() { return kHeadDim; });
    const int num_blocks =
        hopper::num_persistent_blocks(static_cast<int>(host_.num_units * problem_.num_sequences()), kDevice);
    const hopper::DqAccum& accum = workspace.dq_accum;
    const auto end = static_cast<int64_t>(workspace.size);
    expect(end_of(workspace.own_sums, num_blocks * host_.num_slots * tile_floats) <= end, "own sums leave memory");
    expect(end_of(workspace.list_room, static_cast<int64_t>(host_.bytes.size())) <=
               bytes_between(params_.workspace, workspace.next_item),
           "a list leaves memory");
    expect(end_of(accum.others, accum.num_others * tile_floats) <= end, "sums leave memory");
    expect(accum.num_spare + accum.num_others == problem_.num_sequences() * host_.num_shared_tiles,
           "there is other room for shared sums than there are sums");
  }

  const Problem& problem_;
  const Visits& listed_;
  const ma::BwdParams& params_;
  const hopper::BwdList& host_;
  const DqForm form_;
  const char* const list_;
  const int64_t num_tiles_;
  std::vector<int64_t> shared_;  // of places of shared sums: which tile of all sequences has added there
  Visits visits_;
  Rows dq_, dk_;
};

void walk_16_bit(ShareCheck& check, DqForm form, int splits, bool is_wide, Rows& dk, Rows& dv) {
  using Element = __half;
  if (is_wide) return check.walk_keys<hopper::WideDkDvConfig<Element, 192, false>>(dk, dv);
  switch (form) {
    case DqForm::kSeparate: return check.walk_keys<hopper::DkDvConfig<Element, 64, false, DqForm::kSeparate>>(dk, dv);
    case DqForm::kAtomic:
      return splits == 1 ? check.walk_keys<hopper::DkDvConfig<Element, 64, false, DqForm::kAtomic>>(dk, dv)
                         : check.walk_keys<hopper::DkDvConfig<Element, 64, false, DqForm::kAtomic, 2>>(dk, dv);
    case DqForm::kOrdered:
      return splits == 1 ? check.walk_keys<hopper::DkDvConfig<Element, 64, false, DqForm::kOrdered>>(dk, dv)
                         : check.walk_keys<hopper::DkDvConfig<Element, 64, false, DqForm::kOrdered, 2>>(dk, dv);
  }
}

void check_plan(const Problem& problem, const Visits& listed, const ma::BwdParams& params,
                const hopper::BwdPlan& plan) {
  const std::vector<hopper::QueryRun> runs = hopper::make_query_runs(*params.schedule);
  if (plan.list != nullptr) return ListCheck(problem, listed, params, runs, plan).run();
  const BwdWorkspace workspace = hopper::bwd_workspace(params, runs, plan);
  if (plan.dq_form == DqForm::kSeparate && params.dtype != ma::DType::kFloat32) check_dq(params, workspace);
  Visits visits;
  Rows dq, dk, dv;
  for (const BwdShare& share : plan.shares) {
    ShareCheck check(problem, params, workspace, share, runs, visits);
    if (params.dtype == ma::DType::kFloat32) {
      check.walk_keys<hopper::Fp32DkDvConfig<1>>(dk, dv);
    } else {
      walk_16_bit(check, plan.dq_form, share.splits, hopper::is_wide(hopper::widest_head_dim(params)), dk, dv);
    }
    if (plan.dq_form != DqForm::kSeparate) check.read_sums(plan.dq_form, dq);
  }
  visits.expect_equal(listed, "dk and dv on Hopper");
  dk.expect_all(problem.num_sequences(), problem.seqlen_k, "dk on Hopper");
  dv.expect_all(problem.num_sequences(), problem.seqlen_k, "dv on Hopper");
  if (plan.dq_form != DqForm::kSeparate) {
    dq.expect_all(problem.num_sequences(), problem.seqlen_q(), "dq on Hopper");
  } else if (params.dtype == ma::DType::kFloat32) {
    check_dq_kernel<hopper::Fp32DqConfig<1>, hopper::WorkTable>(problem, listed, params);
  } else {
    hopper::with_bwd_head_dim(hopper::widest_head_dim(params), [&]<int kHeadDim>() {
      check_dq_kernel<hopper::DqConfig<__half, kHeadDim, false>, hopper::UncutWorkTable>(problem, listed, params);
    });
  }
}

// A list, whether it pays or not.
hopper::BwdPlan listed_plan(const Problem& problem, const ma::BwdParams& params, hopper::BwdList& list) {
  const int64_t size = params.batch_size == 1 ? params.num_heads : params.batch_size;
  const DqForm form = hopper::can_add_dq(hopper::widest_head_dim(params))
                          ? problem.choose(10, {DqForm::kSeparate, DqForm::kAtomic})
                          : DqForm::kSeparate;
  const std::vector<hopper::QueryRun> runs = hopper::make_query_runs(*params.schedule);
  list = hopper::make_bwd_list(params, runs, form, problem.num_multiprocessors);
  return {form, {{0, size, 1}}, &list};
}

// A form, splits and shares that the kernels have, whatever is quick.
hopper::BwdPlan forced_plan(const Problem& problem, const ma::BwdParams& params) {
  const int64_t size = params.batch_size == 1 ? params.num_heads : params.batch_size;
  const bool is_masked = params.key_padding_mask != nullptr;
  hopper::BwdPlan plan{DqForm::kSeparate, {{0, size, 1}}};
  if (params.dtype == ma::DType::kFloat32 || !hopper::can_add_dq(hopper::widest_head_dim(params))) return plan;
  plan.dq_form = problem.choose(10, {DqForm::kSeparate, DqForm::kAtomic, DqForm::kOrdered, DqForm::kOrdered});
  if (plan.dq_form == DqForm::kSeparate) return plan;
  const auto splits = [&](int die) {
    return !is_masked && problem.num_multiprocessors > 1 ? 1 + static_cast<int>(problem.choose(die, 2)) : 1;
  };
  if (!is_masked && size > 1 && problem.choose(11, 2) == 0) {
    plan.shares = {{0, (size + 1) / 2, splits(12)}, {(size + 1) / 2, size / 2, splits(13)}};
  } else {
    plan.shares.front().splits = splits(12);
  }
  return plan;
}

}  // namespace

void check_hopper_bwd(const Problem& problem) {
  const ma::Schedule schedule = schedule_of(problem);
  const bool is_fp32 = problem.choose(4, 8) == 0;
  ma::BwdParams params{};
  fill(params, problem, schedule, is_fp32 ? ma::DType::kFloat32 : ma::DType::kFloat16,
       is_fp32 ? 64 : problem.choose(5, {8, 32, 48, 64, 64, 96, 128, 192, 256}), !is_fp32 && problem.choose(6, 4) == 0);
  narrow(problem, params);
  params.out = address(3);
  params.dout = address(4);
  params.dq = problem.choose(15, 2) == 0 ? address(0) : address(5);
  params.dk = address(6);
  params.dv = address(7);
  const int64_t row = params.num_heads * params.head_dim_v;
  params.out_strides = params.dout_strides = {params.seqlen_q * row, row, params.head_dim_v};
  params.dq_strides = params.q_strides;
  params.dk_strides = params.dv_strides = params.k_strides;
  if (problem.choose(7, 3) == 0) params.k_strides.batch = params.v_strides.batch = 0;
  if (problem.choose(8, 2) == 0) params.spare_out = address(3);
  params.deterministic = problem.choose(9, 2) == 0;
  const Visits listed = listed_visits(problem);
  hopper::BwdList list{};
  const auto has_list = []<int kHeadDim>() { return hopper::has_list(kHeadDim); };
  if (!is_fp32 && params.key_padding_mask == nullptr && params.seqlen_q > 0 &&
      hopper::with_bwd_head_dim(hopper::widest_head_dim(params), has_list)) {
    check_plan(problem, listed, params, listed_plan(problem, params, list));
  }
  if (!hopper::has_bwd_plan(params)) return;
  if (!hopper::fits_work_table(params) || !hopper::fits_key_work_table(params)) {
    return check_plan(problem, listed, params, hopper::plan_bwd(params, hopper::make_query_runs(schedule), list));
  }
  check_plan(problem, listed, params, hopper::plan_bwd(params, hopper::make_query_runs(schedule), list));
  check_plan(problem, listed, params, forced_plan(problem, params));
}

}  // namespace walks
