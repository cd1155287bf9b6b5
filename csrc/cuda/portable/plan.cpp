#include "cuda/portable/plan.h"

#include <algorithm>
#include <tuple>

#include "ceil_div.h"
#include "cuda/common/device.h"
#include "cuda/common/kept.h"
#include "cuda/common/table_id.h"
#include "cuda/portable/config.h"
#include "cuda/portable/launch.h"

namespace mixed_attention::cuda::portable {
namespace {

int padded_head_dim(const AttentionParams& params) {
  return *std::lower_bound(std::begin(kHeadDims), std::end(kHeadDims), std::max(params.head_dim, params.head_dim_v));
}

Pass make_pass(Side side, const AttentionParams& params, const Tile& tile, bool may_split) {
  const auto work = side == Side::kQueries ? work_by_query : work_by_key;
  Pass pass{work(*params.schedule, tile.rows, tile.block_rows), 1, new_table_id()};
  if (!may_split) return pass;
  // A split of fewer than 8 blocks or 256 rows, whichever is less, does not pay for its epilogue and for combining.
  const int min_blocks = std::min(8, 256 / tile.block_rows);
  const int64_t slots = int64_t{tile.blocks} * num_multiprocessors(params.device);
  pass.num_splits = choose_splits(pass.host, params.batch_size * params.num_heads, slots, min_blocks);
  return pass;
}

}  // namespace

Arithmetic arithmetic_of(const AttentionParams& params) {
  switch (params.dtype) {
    case DType::kFloat16: return Arithmetic::kFloat16;
    case DType::kBFloat16: return Arithmetic::kBFloat16;
    default: return params.allow_tf32 ? Arithmetic::kTf32 : Arithmetic::kTf32x3;
  }
}

std::shared_ptr<const Pass> pass_of(Side side, const AttentionParams& params, const Tile& tile, bool may_split) {
  using Key = std::tuple<uint64_t, Side, int, int, int, int64_t, int, bool>;
  static auto* kept = new Kept<Key, Pass>(128);  // never freed: threads may outlive static objects
  const int64_t num_batch_heads = params.batch_size * params.num_heads;
  const Key key{params.schedule->id, side,          tile.rows, tile.block_rows, tile.blocks,
                num_batch_heads,     params.device, may_split};
  return kept->of(key, [&] { return make_pass(side, params, tile, may_split); });
}

std::string refusal(const Problem& problem) {
  if (problem.dtype == DType::kFloat64) return "float64 is computed by the reference";
  const int largest = *std::prev(std::end(kHeadDims));
  if (std::max(problem.head_dim, problem.head_dim_v) > largest) {
    return "head_dim: " + std::to_string(std::max(problem.head_dim, problem.head_dim_v)) +
           " is not supported, expected at most " + std::to_string(largest);
  }
  const int capability = compute_capability(problem.device);
  if (capability < 80) {
    return "compute capability " + std::to_string(capability / 10) + "." + std::to_string(capability % 10) +
           " is not supported, expected 8.0 or later";
  }
  return "";
}

unsigned Pass::grid(int64_t num_batch_heads) const {
  return static_cast<unsigned>(num_batch_heads * host.num_tiles * num_splits);
}

Layout Pass::layout(const Tile& tile, int64_t num_batch_heads, int device) const {
  return {tile.rows,
          tile.block_rows,
          num_splits,
          grid(num_batch_heads),
          tile.blocks * num_multiprocessors(device),
          num_splits > 1 ? num_batch_heads * host.num_tiles : 0};
}

void PassOfCall::take(Scratch& scratch) {
  if (pass == nullptr || pass->host.fits_inline()) return;
  table = scratch.take<char>(static_cast<int64_t>(pass->host.device_bytes()));
}

float* PassOfCall::take_splits(Scratch& scratch, int64_t count) const {
  return pass->num_splits > 1 ? scratch.take<float>(pass->num_splits * count) : nullptr;
}

void take_rows(const BwdParams& params, Scratch& scratch, BwdBuffers& buffers) {
  const int64_t rows = params.batch_size * params.num_heads * params.seqlen_q;
  buffers.lse_log2 = scratch.take<float>(rows);
  buffers.delta = scratch.take<float>(rows);
  buffers.references = scratch.take<RowReference>(rows);
  buffers.has_references = scratch.take<int>(1);
}

void take_splits_of_keys(const BwdParams& params, const PassOfCall& by_key, Scratch& scratch, BwdBuffers& buffers) {
  const int64_t rows = params.batch_size * params.num_heads * params.seqlen_k;
  buffers.partial_dk = by_key.take_splits(scratch, rows * params.head_dim);
  buffers.partial_dv = by_key.take_splits(scratch, rows * params.head_dim_v);
}

FwdPasses plan_fwd(const FwdParams& params) {
  FwdPasses plan{.arithmetic = arithmetic_of(params), .head_dim = padded_head_dim(params)};
  plan.by_query.pass = pass_of(Side::kQueries, params, fwd_tile(plan.arithmetic, plan.head_dim));
  take_workspace(params, plan);
  return plan;
}

void take_workspace(const FwdParams& params, FwdPasses& plan) {
  const int64_t rows = params.batch_size * params.num_heads * params.seqlen_q;
  Scratch scratch(params.workspace);
  plan.by_query.take(scratch);
  plan.buffers.partial_out = plan.by_query.take_splits(scratch, rows * params.head_dim_v);
  if (const int64_t splits = plan.by_query.pass->num_splits; splits > 1) {
    plan.buffers.row_lses = scratch.take<RowLse>(splits * rows);
  }
  plan.workspace_size = scratch.bytes();
}

BwdPasses plan_bwd(const BwdParams& params) {
  BwdPasses plan{.arithmetic = arithmetic_of(params), .head_dim = padded_head_dim(params)};
  plan.adds_dq = fuses_dk_dv(plan.head_dim) && !params.deterministic;
  plan.by_key.pass = pass_of(Side::kKeys, params, dk_dv_tile(plan.arithmetic, plan.head_dim));
  if (!plan.adds_dq) plan.by_query.pass = pass_of(Side::kQueries, params, dq_tile(plan.arithmetic, plan.head_dim));
  take_workspace(params, plan);
  return plan;
}

void take_workspace(const BwdParams& params, BwdPasses& plan) {
  const int64_t rows = params.batch_size * params.num_heads * params.seqlen_q;
  Scratch scratch(params.workspace);
  plan.by_key.take(scratch);
  BwdBuffers& buffers = plan.buffers;
  take_rows(params, scratch, buffers);
  if (plan.adds_dq) {
    buffers.dq_accum_cols = static_cast<int>(round_up(params.head_dim, 8));
    buffers.dq_accum_size = round_up(rows, 8) * buffers.dq_accum_cols;
    buffers.dq_accum = scratch.take<float>(buffers.dq_accum_size);
  } else {
    plan.by_query.take(scratch);
    buffers.partial_dq = plan.by_query.take_splits(scratch, rows * params.head_dim);
  }
  take_splits_of_keys(params, plan.by_key, scratch, buffers);
  plan.workspace_size = scratch.bytes();
}

}  // namespace mixed_attention::cuda::portable
