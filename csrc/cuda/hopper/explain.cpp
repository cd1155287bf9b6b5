// Tiles of the Hopper kernels, for people to read.
#include "ceil_div.h"
#include "cuda/common/device.h"
#include "cuda/hopper/bwd/config.h"
#include "cuda/hopper/bwd/launch.h"
#include "cuda/hopper/config.h"
#include "cuda/hopper/fwd/launch.h"
#include "cuda/hopper/launch.h"
#include "schedule.h"

namespace mixed_attention::cuda::hopper {
namespace {

// One thread block to a multiprocessor.
template <class Segments>
Layout layout(const AttentionParams& params, const Segments& segments, int tile_rows, int block_rows) {
  int64_t num_tiles = 0;
  for (const auto& segment : segments) num_tiles += ceil_div(segment.rows.size(), tile_rows);
  num_tiles *= params.batch_size * params.num_heads;
  return {tile_rows, block_rows, 1, num_tiles, num_multiprocessors(params.device), 0};
}

}  // namespace

Layout layout_fwd(const FwdParams& params) {
  Layout result = with_fwd_kernel(params, [&]<typename Element, int kHeadDim, int kLimbs>() {
    constexpr FwdTuning kTuning = kFwdTuning<Element, kHeadDim, kLimbs>;
    return layout(params, params.schedule->query_segments, kTuning.block_m(), kTuning.block_n);
  });
  if (fits_work_table(params)) {
    const ItemSplits splits = plan_fwd(params).table.splits;
    result.num_splits = splits.num_splits;
    result.num_tiles += splits.num_items() - splits.num_whole;
    result.num_split_tiles = splits.num_whole;
  }
  return result;
}

Layout layout_bwd(const BwdParams& params) {
  Layout result = layout(params, params.schedule->key_segments, key_tile_rows(params.head_dim), kQueryTileRows);
  if (fits_key_work_table(params)) {
    result.num_splits = plan_bwd(params, make_query_runs(*params.schedule)).shares.front().splits;
    if (result.num_splits > 1) result.num_split_tiles = result.num_tiles;
    result.num_tiles *= result.num_splits;
  }
  return result;
}

}  // namespace mixed_attention::cuda::hopper
