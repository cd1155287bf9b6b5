#include <algorithm>
#include <numbers>
#include <utility>
#include <vector>

#include "cuda/common/device.h"
#include "cuda/common/scratch.h"
#include "cuda/hopper/bwd/config.h"
#include "cuda/hopper/bwd/launch.h"
#include "cuda/hopper/bwd/plan.h"
#include "cuda/hopper/plan/key_table.h"
#include "schedule.h"

namespace mixed_attention::cuda::hopper {
namespace {

int64_t num_batch_heads(const BwdParams& params) { return params.batch_size * params.num_heads; }

int64_t num_rows(const BwdParams& params) { return num_batch_heads(params) * params.seqlen_q; }

// The accumulators of the largest share serve all.
DqAccum take_dq_accum(const BwdParams& params, const BwdPlan& plan, const std::vector<QueryRun>& runs,
                      Scratch& scratch) {
  const bool is_ordered = plan.dq_form == DqForm::kOrdered;
  const int64_t num_tiles = plan.list != nullptr ? plan.list->num_shared_tiles
                            : is_ordered         ? num_reader_tiles(*params.schedule)
                                                 : num_query_tiles(runs);
  const int64_t num_all = num_batch_heads(params_of(plan.shares.front(), params)) * num_tiles;
  const int64_t tile_floats =
      kQueryTileRows * with_bwd_head_dim(widest_head_dim(params), []<int kHeadDim>() { return kHeadDim; });
  DqAccum accum{};
  accum.num_tiles = static_cast<int>(num_tiles);
  accum.spare = static_cast<float*>(params.spare_out);
  const int64_t spare_floats = accum.spare == nullptr ? 0 : num_rows(params) * params.head_dim_v / 2;
  accum.num_spare = std::min(num_all, spare_floats / tile_floats);
  accum.num_others = num_all - accum.num_spare;
  accum.others = scratch.take<float>(accum.num_others * tile_floats);
  if (is_ordered) accum.turns = scratch.take<uint32_t>(num_batch_heads(params) * num_tiles);
  return accum;
}

// Those of all blocks that may run.
float* take_own_sums(const BwdParams& params, const BwdList& list, Scratch& scratch) {
  const int64_t num_blocks =
      std::min<int64_t>(list.num_units * num_batch_heads(params), num_multiprocessors(params.device));
  const int64_t tile_floats =
      kQueryTileRows * with_bwd_head_dim(widest_head_dim(params), []<int kHeadDim>() { return kHeadDim; });
  return scratch.take<float>(num_blocks * list.num_slots * tile_floats);
}

// The kernel for dq reads all keys and values, the one for dk and dv all queries: whichever runs first cannot write
// where the other one reads. Those for fp32 read limbs.
DqTensor take_dq(const BwdParams& params, Scratch& scratch) {
  if (params.dq != params.q || params.dtype == DType::kFloat32) return {params.dq, params.dq_strides};
  const int64_t row = params.num_heads * params.head_dim;
  const Strides strides{params.seqlen_q * row, row, params.head_dim};
  const bool fits_spare = params.spare_out != nullptr && params.head_dim <= params.head_dim_v;
  return {fits_spare ? params.spare_out : scratch.take<uint16_t>(params.seqlen_q * params.batch_size * row), strides};
}

// Statistics of the tiles of queries; every segment may end in one that is filled up.
void take_stats(const BwdParams& params, int num_tiles, Scratch& scratch, BwdWorkspace& workspace) {
  const int64_t num_all = num_batch_heads(params) * num_tiles;
  if (params.dtype == DType::kFloat32) {
    workspace.fp32_stats = {scratch.take<QueryNumbers>(num_all), scratch.take<DoutNumbers>(num_all), num_tiles};
  } else {
    const int64_t size = num_all * kStatsTileFloats;
    workspace.stats = {scratch.take<float>(size), scratch.take<float>(size), num_tiles};
  }
}

BwdLimbs take_limbs(const BwdParams& params, Scratch& scratch) {
  if (params.dtype != DType::kFloat32) return {};
  const BwdTensors tensors = bwd_tensors(params);
  const int num_limbs = with_limbs(params, []<int kLimbs>() { return kLimbs; });
  return {take_half_limbs(tensors.q, num_limbs, scratch), take_half_limbs(tensors.k, num_limbs, scratch),
          take_half_limbs(tensors.v, num_limbs, scratch), take_half_limbs(tensors.dout, num_limbs, scratch)};
}

}  // namespace

BwdTensors bwd_tensors(const BwdParams& params) {
  return {view_of(params, params.q, params.seqlen_q, params.head_dim, params.q_strides),
          view_of(params, params.k, params.seqlen_k, params.head_dim, params.k_strides),
          view_of(params, params.v, params.seqlen_k, params.head_dim_v, params.v_strides),
          view_of(params, params.dout, params.seqlen_q, params.head_dim_v, params.dout_strides)};
}

BwdWorkspace bwd_workspace(const BwdParams& params, const std::vector<QueryRun>& runs, BwdPlan plan) {
  Scratch scratch(params.workspace);
  BwdWorkspace workspace{};
  workspace.plan = std::move(plan);
  workspace.limbs = take_limbs(params, scratch);
  take_stats(params, num_query_tiles(runs), scratch, workspace);
  // A tile of references more than there are, as they are read by tiles.
  workspace.references = scratch.take<RowReference>(num_rows(params) + kQueryTileRows);
  if (workspace.plan.dq_form != DqForm::kSeparate) {
    workspace.dq_accum = take_dq_accum(params, workspace.plan, runs, scratch);
  } else {
    workspace.delta_of_rows = scratch.take<float>(num_rows(params));
    workspace.dq = take_dq(params, scratch);
  }
  if (params.key_padding_mask != nullptr) workspace.masked_keys = plan_masked_keys(params, scratch, true);
  if (const BwdList* list = workspace.plan.list) {
    workspace.list_room = scratch.take<char>(static_cast<int64_t>(list->bytes.size()));
    workspace.next_item = scratch.take<uint32_t>(1);
    workspace.own_sums = take_own_sums(params, *list, scratch);
  }
  workspace.size = scratch.bytes();
  return workspace;
}

ScoreInputs score_inputs(const BwdParams& params, RowReference* references) {
  // By mode: what is multiplied, and what tensor cores cut off when they add.
  const float unit = params.dtype != DType::kFloat32 ? 0x1p-21f : params.allow_tf32 ? 0x1p-10f : 0x1p-20f;
  return {
      .q = params.q,
      .k = params.k,
      .q_strides = params.q_strides,
      .k_strides = params.k_strides,
      .mask = params.key_padding_mask,
      .mask_batch_stride = params.key_padding_mask_batch_stride,
      .head_dim = static_cast<int>(params.head_dim),
      .scale_log2 = static_cast<float>(params.softmax_scale * std::numbers::log2e),
      .unit = unit,
      .references = references,
  };
}

ScoreSource score_source(const BwdParams& params, RowReference* references) {
  ScoreSource source{score_inputs(params, references), {}, {}};
  int run = 0, num_ranges = 0;
  for (const QuerySegment& segment : params.schedule->query_segments) {
    for (const Range& keys : segment.keys) {
      source.ranges[num_ranges++] = {static_cast<int>(keys.begin), static_cast<int>(keys.end)};
    }
    source.first_range[++run] = num_ranges;
  }
  return source;
}

}  // namespace mixed_attention::cuda::hopper
