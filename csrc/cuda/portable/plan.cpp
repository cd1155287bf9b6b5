#include "cuda/portable/plan.h"

#include <algorithm>

#include "cuda/common/device.h"
#include "cuda/portable/config.h"

namespace mixed_attention::cuda::portable {
namespace {

Arithmetic arithmetic_of(const AttentionParams& params) {
  switch (params.dtype) {
    case DType::kFloat16: return Arithmetic::kFloat16;
    case DType::kBFloat16: return Arithmetic::kBFloat16;
    default: return params.allow_tf32 ? Arithmetic::kTf32 : Arithmetic::kTf32x3;
  }
}

int padded_head_dim(const AttentionParams& params) {
  return *std::lower_bound(std::begin(kHeadDims), std::end(kHeadDims), std::max(params.head_dim, params.head_dim_v));
}

}  // namespace

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

Pass::Pass(HostWork work, const Tile& tile, int64_t copies, int device, Scratch& scratch)
    : host(std::move(work)), table{} {
  table.num_segments = static_cast<int32_t>(host.segments.size());
  table.num_tiles = static_cast<int32_t>(host.num_tiles);
  // A part of fewer than 8 blocks or 256 rows, whichever is less, does not pay for its epilogue and the combining of
  // parts.
  const int min_blocks = std::min(8, 256 / tile.block_rows);
  table.num_splits = choose_splits(host, copies, int64_t{tile.blocks} * num_multiprocessors(device), min_blocks);
  if (!host.fits_inline()) {
    table.segments = scratch.take<WorkSegment>(static_cast<int64_t>(host.segments.size()));
    table.ranges = scratch.take<WorkRange>(static_cast<int64_t>(host.ranges.size()));
  }
}

unsigned Pass::grid(int64_t copies) const { return static_cast<unsigned>(copies * table.num_tiles * table.num_splits); }

Layout Pass::layout(const Tile& tile, int64_t copies, int device) const {
  const int64_t num_tiles = copies * table.num_tiles;
  return {tile.rows,
          tile.block_rows,
          table.num_splits,
          grid(copies),
          tile.blocks * num_multiprocessors(device),
          table.num_splits > 1 ? num_tiles : 0};
}

FwdPlan plan_fwd(const FwdParams& params) {
  const int64_t copies = params.batch_size * params.num_heads;
  const Arithmetic arithmetic = arithmetic_of(params);
  const int head_dim = padded_head_dim(params);
  const Tile tile = fwd_tile(arithmetic, head_dim);
  Scratch scratch(params.workspace);
  FwdPlan plan{
      .arithmetic = arithmetic,
      .head_dim = head_dim,
      .pass = Pass(work_by_query(*params.schedule, tile.rows, tile.block_rows), tile, copies, params.device, scratch),
  };
  if (const int64_t splits = plan.pass.table.num_splits; splits > 1) {
    plan.partial_out = scratch.take<float>(splits * copies * params.seqlen_q * params.head_dim_v);
    plan.row_parts = scratch.take<RowPart>(splits * copies * params.seqlen_q);
  }
  plan.workspace_size = scratch.bytes();
  return plan;
}

BwdPlan plan_bwd(const BwdParams& params) {
  const int64_t copies = params.batch_size * params.num_heads;
  const Arithmetic arithmetic = arithmetic_of(params);
  const int head_dim = padded_head_dim(params);
  const Tile tile = dk_dv_tile(arithmetic, head_dim);
  Scratch scratch(params.workspace);
  BwdPlan plan{
      .arithmetic = arithmetic,
      .head_dim = head_dim,
      .adds_dq = fuses_dk_dv(head_dim) && !params.deterministic,
      .by_key = Pass(work_by_key(*params.schedule, tile.rows, tile.block_rows), tile, copies, params.device, scratch),
      .lse_log2 = scratch.take<float>(copies * params.seqlen_q),
      .delta = scratch.take<float>(copies * params.seqlen_q),
      .references = scratch.take<RowReference>(copies * params.seqlen_q),
      .has_references = scratch.take<int>(1),
  };
  if (plan.adds_dq) {
    plan.dq_sum_cols = static_cast<int>((params.head_dim + 7) / 8 * 8);
    plan.dq_sum_size = (copies * params.seqlen_q + 7) / 8 * 8 * plan.dq_sum_cols;
    plan.dq_sum = scratch.take<float>(plan.dq_sum_size);
  } else {
    const Tile by_query = dq_tile(arithmetic, head_dim);
    plan.by_query.emplace(work_by_query(*params.schedule, by_query.rows, by_query.block_rows), by_query, copies,
                          params.device, scratch);
    if (const int64_t splits = plan.by_query->table.num_splits; splits > 1) {
      plan.partial_dq = scratch.take<float>(splits * copies * params.seqlen_q * params.head_dim);
    }
  }
  if (const int64_t splits = plan.by_key.table.num_splits; splits > 1) {
    plan.partial_dk = scratch.take<float>(splits * copies * params.seqlen_k * params.head_dim);
    plan.partial_dv = scratch.take<float>(splits * copies * params.seqlen_k * params.head_dim_v);
  }
  plan.workspace_size = scratch.bytes();
  return plan;
}

Layout layout_fwd(const FwdParams& params) {
  const FwdPlan plan = plan_fwd(params);
  return plan.pass.layout(fwd_tile(plan.arithmetic, plan.head_dim), params.batch_size * params.num_heads,
                          params.device);
}

Layout layout_bwd(const BwdParams& params) {
  const BwdPlan plan = plan_bwd(params);
  return plan.by_key.layout(dk_dv_tile(plan.arithmetic, plan.head_dim), params.batch_size * params.num_heads,
                            params.device);
}

}  // namespace mixed_attention::cuda::portable
