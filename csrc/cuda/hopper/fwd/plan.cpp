#include <memory>
#include <tuple>
#include <utility>

#include "cuda/common/device.h"
#include "cuda/common/kept.h"
#include "cuda/common/scratch.h"
#include "cuda/hopper/config.h"
#include "cuda/hopper/fwd/launch.h"
#include "cuda/hopper/fwd/list.h"
#include "cuda/hopper/fwd/split_items.h"
#include "cuda/hopper/plan/key_tiles.h"
#include "cuda/hopper/plan/query_table.h"
#include "cuda/hopper/plan/tile_list.h"
#include "cuda/hopper/refusals.h"
#include "schedule.h"

namespace mixed_attention::cuda::hopper {

FwdTensors fwd_tensors(const FwdParams& params) {
  return {view_of(params, params.q, params.seqlen_q, params.head_dim, params.q_strides),
          view_of(params, params.k, params.seqlen_k, params.head_dim, params.k_strides),
          view_of(params, params.v, params.seqlen_k, params.head_dim_v, params.v_strides)};
}

namespace {

// How the items of a call are told to the kernel, the same for all that are alike: to weigh ways to cut many takes the
// host a while.
struct Form {
  bool exists;
  FwdForm form;
  WorkTable table;
  HostTileList list;  // empty unless kListed
};

// True if a list of smaller tiles takes clearly less time than a table. It has no splits, by which few items fill the
// device.
bool pays_to_list(const AttentionParams& params, const WorkTable& table, const HostTileList& list, int head_dim) {
  constexpr int kLeastRounds = 4;
  if (head_dim > 64) return false;  // tiles of the same size
  const int64_t num_batch_heads = params.batch_size * params.num_heads;
  const int64_t num_listed = static_cast<int64_t>(list.tiles.size()) * num_batch_heads;
  if (num_listed < kLeastRounds * num_multiprocessors(params.device)) return false;
  const FwdCost cost = fwd_cost(head_dim), cost_of_list = fwd_cost_of_list(head_dim);
  int64_t time = 0, time_of_list = 0;
  int item = 0;
  for (const QueryTiles* tiles = table.segments; item < table.num_items; item = (tiles++)->item_end) {
    time += int64_t{tiles->item_end - item} * (tiles->num_tiles * cost.key_tile + cost.rest);
  }
  for (const ListedTile& tile : list.tiles) time_of_list += tile.num_tiles * cost_of_list.key_tile + cost_of_list.rest;
  return time_of_list * num_batch_heads < time - time / 20;
}

Form make_form(const FwdParams& params) {
  Form made{};
  const bool may_list = params.dtype != DType::kFloat32 && params.key_padding_mask == nullptr &&
                        with_fwd_kernel(params, []<typename, int kHeadDim, int>() { return has_list(kHeadDim); });
  const bool fits = fits_work_table(params);
  made.exists = fits || (may_list && are_counted_in_32_bits(params));
  if (!made.exists) return made;
  made.form = params.key_padding_mask != nullptr ? FwdForm::kMasked : FwdForm::kPlain;
  with_fwd_kernel(params, [&]<typename Element, int kHeadDim, int kLimbs>() {
    constexpr FwdTuning kTuning = kFwdTuning<Element, kHeadDim, kLimbs>;
    if (fits) made.table = make_work_table(params, kTuning.block_m(), kTuning.block_n);
    if (may_list) {
      constexpr FwdTuning kOfList = fwd_tuning_of_list(kHeadDim);
      HostTileList list = make_tile_list(params, kOfList.block_m(), kOfList.block_n);
      if (!fits || pays_to_list(params, made.table, list, kHeadDim)) {
        made.form = FwdForm::kListed;
        made.table = list.table(params);
        made.list = std::move(list);
        return;
      }
    }
    split_items(made.table, num_multiprocessors(params.device));
  });
  return made;
}

std::shared_ptr<const Form> form_of(const FwdParams& params) {
  using Key = std::tuple<uint64_t, DType, bool, bool, int64_t, int64_t, int64_t, int>;
  static auto* kept = new Kept<Key, Form>(256);  // never freed: threads may outlive static objects
  const Key key{params.schedule->id,     params.dtype,      params.allow_tf32, params.key_padding_mask != nullptr,
                widest_head_dim(params), params.batch_size, params.num_heads,  params.device};
  return kept->of(key, [&] { return make_form(params); });
}

}  // namespace

const char* refusal_of_plan(const FwdParams& params) { return form_of(params)->exists ? nullptr : kPlanIsTooLarge; }

std::shared_ptr<const HostTileList> list_of(const FwdParams& params) {
  const std::shared_ptr<const Form> form = form_of(params);
  return {form, &form->list};
}

FwdPlan plan_fwd(const FwdParams& params) {
  const std::shared_ptr<const Form> form = form_of(params);
  FwdPlan plan{.form = form->form, .table = form->table, .list_bytes = form->list.device_bytes()};
  take_workspace(params, plan);
  return plan;
}

void take_workspace(const FwdParams& params, FwdPlan& plan) {
  with_fwd_kernel(params, [&]<typename Element, int kHeadDim, int kLimbs>() {
    constexpr int kBlockM = kFwdTuning<Element, kHeadDim, kLimbs>.block_m();
    Scratch scratch(params.workspace);
    if (plan.form == FwdForm::kListed) plan.list_room = scratch.take<char>(plan.list_bytes);
    if (const int64_t num_splits = plan.table.splits.num_items(); num_splits > 0) {
      plan.partial_out = scratch.take<float>(num_splits * kBlockM * params.head_dim_v);
      plan.row_lses = scratch.take<RowLse>(num_splits * kBlockM);
    }
    if (params.key_padding_mask != nullptr) plan.masked_keys = plan_masked_keys(params, scratch, false);
    if (kHasRowScales<Element>) {
      const FwdTensors tensors = fwd_tensors(params);
      plan.q_limbs = take_half_limbs(tensors.q, kLimbs, scratch);
      plan.k_limbs = take_half_limbs(tensors.k, kLimbs, scratch);
      plan.v_limbs = take_half_limbs(tensors.v, kLimbs, scratch);
    }
    plan.workspace_size = scratch.bytes();
  });
}

}  // namespace mixed_attention::cuda::hopper
