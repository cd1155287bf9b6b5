#include "cuda/hopper/bwd/plan.h"

#include <optional>
#include <utility>

#include "cuda/common/device.h"
#include "cuda/hopper/plan/key_tiles.h"
#include "cuda/hopper/plan/query_table.h"

namespace mixed_attention::cuda::hopper {
namespace {

// About how long the kernel of all gradients takes.
class StepCount {
 public:
  StepCount(const BwdParams& params, const std::vector<QueryRun>& runs)
      : block_n_(key_tile_rows(widest_head_dim(params))),
        num_blocks_(num_multiprocessors(params.device)),
        is_masked_(params.key_padding_mask != nullptr),
        table_(make_key_work_table(params, runs, block_n_)) {}

  // In steps of a query tile, with the queries of a key tile split over so many blocks.
  int64_t steps(DqForm form, int splits) const {
    return steps_of_longest_block(table_, block_n_, num_blocks_ / splits, splits, form == DqForm::kOrdered);
  }

  // 2 where two halves end earlier than a whole, and may run side by side. The kernels for padding masks do not split.
  int best_splits(DqForm form) const {
    return !is_masked_ && num_blocks_ >= 2 && steps(form, 2) < steps(form, 1) ? 2 : 1;
  }

  int64_t best_steps(DqForm form) const { return steps(form, best_splits(form)); }

 private:
  int block_n_, num_blocks_;
  bool is_masked_;
  KeyWorkTable table_;
};

// True if one kernel takes less time than two, with seven MMAs instead of five: where keys are many and queries few,
// blocks would wait for their turns. Nor may the sums of a query tile, one for each key segment that it reads, take
// more than twice the memory that they take where they come in any order.
bool can_be_ordered(const BwdParams& params, const std::vector<QueryRun>& runs, const StepCount& count) {
  return num_reader_tiles(*params.schedule) <= 2 * num_query_tiles(runs) &&
         5 * count.steps(DqForm::kOrdered, 1) <= 7 * count.steps(DqForm::kAtomic, 1);
}

// Two shares where dq_accum finds spare memory, which is half of what all of them take, and where they cost hardly any
// time: rounds of blocks are as many, and so long that two launches more do not count.
std::vector<BwdShare> make_shares(const BwdParams& params, const std::vector<QueryRun>& runs, DqForm form,
                                  const StepCount& count) {
  constexpr int kStepsOfShare = 8;
  const int64_t size = params.batch_size == 1 ? params.num_heads : params.batch_size;
  const BwdShare all{0, size, count.best_splits(form)};
  const int64_t steps = count.best_steps(form);
  const bool is_long = steps >= 100 * kStepsOfShare;
  if (params.spare_out == nullptr || params.key_padding_mask != nullptr || size < 2 || !is_long) return {all};

  BwdShare first{0, (size + 1) / 2, 1}, second{first.count, size - first.count, 1};
  int64_t steps_of_shares = kStepsOfShare;
  for (BwdShare* share : {&first, &second}) {
    const StepCount of_share(params_of(*share, params), runs);
    share->splits = of_share.best_splits(form);
    steps_of_shares += of_share.best_steps(form);
  }
  return steps_of_shares <= steps + steps / 100 ? std::vector{first, second} : std::vector{all};
}

bool fits_tables(const AttentionParams& params) { return fits_work_table(params) && fits_key_work_table(params); }

bool may_list(const BwdParams& params) {
  return params.dtype != DType::kFloat32 && params.key_padding_mask == nullptr && params.seqlen_q > 0 &&
         with_bwd_head_dim(widest_head_dim(params), []<int kHeadDim>() { return has_list(kHeadDim); }) &&
         are_counted_in_32_bits(params) && are_keys_counted_in_32_bits(params);
}

// The plan that goes through a list, where there is one and it has to be, or pays.
std::optional<BwdPlan> plan_list(const BwdParams& params, const std::vector<QueryRun>& runs, const BwdShare& whole,
                                 BwdList& list) {
  const bool must_list = !fits_tables(params), adds_dq = can_add_dq(widest_head_dim(params));
  if (!may_list(params) || !(must_list || adds_dq)) return {};
  const int num_blocks = num_multiprocessors(params.device);
  if (adds_dq) {
    list = make_bwd_list(params, runs, DqForm::kAtomic, num_blocks);
    // Sums that blocks add to as they come have other bits every time.
    const bool is_allowed = !params.deterministic || list.num_shared_tiles == 0;
    if ((must_list && is_allowed) || pays_to_list(list, params, num_blocks)) {
      return BwdPlan{DqForm::kAtomic, {whole}, &list};
    }
    if (!must_list) return {};
  }
  list = make_bwd_list(params, runs, DqForm::kSeparate, num_blocks);
  return BwdPlan{DqForm::kSeparate, {whole}, &list};
}

// How many (sequence, head) come before it.
int64_t num_before(const BwdShare& share, const BwdParams& params) {
  return share.first * (params.batch_size == 1 ? 1 : params.num_heads);
}

}  // namespace

bool has_bwd_plan(const BwdParams& params) { return fits_tables(params) || may_list(params); }

BwdPlan plan_bwd(const BwdParams& params, const std::vector<QueryRun>& runs, BwdList& list) {
  const BwdShare whole{0, params.batch_size == 1 ? params.num_heads : params.batch_size, 1};
  if (std::optional<BwdPlan> plan = plan_list(params, runs, whole, list)) return *std::move(plan);
  if (params.dtype == DType::kFloat32 || !can_add_dq(widest_head_dim(params))) return {DqForm::kSeparate, {whole}};
  const StepCount count(params, runs);
  if (params.deterministic && !can_be_ordered(params, runs, count)) return {DqForm::kSeparate, {whole}};
  const DqForm form = params.deterministic ? DqForm::kOrdered : DqForm::kAtomic;
  return {form, make_shares(params, runs, form, count)};
}

BwdParams params_of(const BwdShare& share, const BwdParams& params) {
  BwdParams part = params;
  const auto skip = [&](const void* tensor, const Strides& strides) {
    const int64_t step = params.batch_size == 1 ? strides.head : strides.batch;
    return static_cast<const char*>(tensor) + share.first * step * sizeof(uint16_t);
  };
  (params.batch_size == 1 ? part.num_heads : part.batch_size) = share.count;
  part.q = skip(params.q, params.q_strides);
  part.k = skip(params.k, params.k_strides);
  part.v = skip(params.v, params.v_strides);
  part.dout = skip(params.dout, params.dout_strides);
  part.dq = const_cast<char*>(skip(params.dq, params.dq_strides));
  part.dk = const_cast<char*>(skip(params.dk, params.dk_strides));
  part.dv = const_cast<char*>(skip(params.dv, params.dv_strides));
  return part;
}

QueryStats stats_of(const BwdShare& share, const BwdParams& params, const QueryStats& stats) {
  const int64_t skipped = num_before(share, params) * stats.num_tiles * kStatsTileFloats;
  return {stats.lse_log2 + skipped, stats.delta + skipped, stats.num_tiles};
}

// Sums give way to the next share's, turns are each one's own.
DqAccum accum_of(const BwdShare& share, const BwdParams& params, const DqAccum& accum) {
  DqAccum own = accum;
  if (own.turns != nullptr) own.turns += num_before(share, params) * accum.num_tiles;
  return own;
}

std::vector<DqAccumRun> make_dq_accum_runs(const Schedule& schedule, const std::vector<QueryRun>& runs, DqForm form) {
  if (form == DqForm::kSeparate) return {};
  if (form == DqForm::kAtomic) return {{0, num_query_tiles(runs), 0}};
  std::vector<DqAccumRun> accum_runs;
  int first_accum = 0;
  for (const QueryRun& run : make_reader_runs(schedule, runs)) {
    accum_runs.push_back({run.first_tile, num_query_tiles(run), first_accum});
    first_accum += num_query_tiles(run);
  }
  return accum_runs;
}

}  // namespace mixed_attention::cuda::hopper
