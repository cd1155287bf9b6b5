#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <memory>
#include <string>
#include <tuple>
#include <utility>

#include "cuda/common/device.h"
#include "cuda/common/kept.h"
#include "cuda/hopper/bwd/config.h"
#include "cuda/hopper/bwd_jvp/config.h"
#include "cuda/hopper/bwd_jvp/launch.h"
#include "cuda/hopper/bwd_jvp/tensors.h"
#include "cuda/hopper/fwd/split_items.h"
#include "cuda/hopper/launch.h"
#include "cuda/hopper/layout.h"
#include "cuda/hopper/plan/key_table.h"
#include "cuda/hopper/plan/query_table.h"
#include "cuda/hopper/refusals.h"
#include "schedule.h"

namespace mixed_attention::cuda::hopper {
namespace {

// A schedule in which keys take the part of queries, and those who read them that of keys.
Schedule transposed(const Schedule& schedule) {
  Schedule result{};
  for (const KeySegment& segment : schedule.key_segments) {
    QuerySegment& made = result.query_segments.emplace_back();
    made.rows = segment.rows;
    for (const Reader& reader : segment.readers) made.keys.push_back(reader.queries);
  }
  return result;
}

// Double backward has one kernel, with 7 and 10 products instead of 10 and 15, where sums may have other bits in every
// run. Other forms have too much to hold for it.
bool adds_dq(const BwdJvpParams& params) {
  return !params.deterministic && params.dout == nullptr && params.dq_dot == nullptr && fits_key_work_table(params);
}

BwdJvpPlan make_plan(const BwdJvpParams& params) {
  const Schedule by_key = transposed(*params.schedule);
  AttentionParams of_keys = params;
  of_keys.schedule = &by_key;
  if (!fits_work_table(params) || !fits_work_table(of_keys)) return {.refusal = kPlanIsTooLarge};
  BwdJvpPlan plan{.adds_dq = adds_dq(params),
                  .by_query = make_work_table(params, kBwdJvpBlockM, kBwdJvpBlockN),
                  .by_key = make_work_table(of_keys, kBwdJvpBlockM, kBwdJvpBlockN),
                  .runs = make_query_runs(*params.schedule)};
  const int num_blocks = num_multiprocessors(params.device);
  if (wants_splits(plan.by_query, num_blocks) || wants_splits(plan.by_key, num_blocks)) plan.refusal = kWantsSplits;
  return plan;
}

std::shared_ptr<const BwdJvpPlan> plan_of(const BwdJvpParams& params) {
  using Key = std::tuple<uint64_t, int64_t, int64_t, int, bool>;
  static auto* kept = new Kept<Key, BwdJvpPlan>(256);  // never freed: threads may outlive static objects
  const Key key{params.schedule->id, params.batch_size, params.num_heads, params.device, adds_dq(params)};
  return kept->of(key, [&] { return make_plan(params); });
}

// Whether rows lie where the kernels can read and write them.
bool is_aligned(const BwdJvpParams& params) {
  const BwdJvpTensors tensors = bwd_jvp_tensors(params);
  for (const auto* side : {&tensors.queries, &tensors.keys}) {
    for (const TensorView& tensor : *side) {
      if (tensor.data != nullptr && !can_map(tensor)) return false;
    }
  }
  return can_map(tensors.queries[0]) && can_map(tensors.keys[0]) && can_store(params.dq, params.dq_strides) &&
         can_store(params.dk, params.dk_strides) && can_store(params.dv, params.dv_strides) &&
         can_store(params.dq_dot, params.dq_dot_strides);
}

}  // namespace

BwdJvpTensors bwd_jvp_tensors(const BwdJvpParams& params) {
  const Tangents& tangents = params.tangents;
  const auto of_queries = [&](const void* data, int64_t width, const Strides& strides) {
    return view_of(params, data, params.seqlen_q, width, strides);
  };
  const auto of_keys = [&](const void* data, int64_t width, const Strides& strides) {
    return view_of(params, data, params.seqlen_k, width, strides);
  };
  return {
      {of_queries(params.q, params.head_dim, params.q_strides),
       of_queries(tangents.q, params.head_dim, tangents.q_strides),
       of_queries(params.dout_dot, params.head_dim_v, params.dout_dot_strides),
       of_queries(params.dout, params.head_dim_v, params.dout_strides)},
      {of_keys(params.k, params.head_dim, params.k_strides), of_keys(tangents.k, params.head_dim, tangents.k_strides),
       of_keys(params.v, params.head_dim_v, params.v_strides),
       of_keys(tangents.v, params.head_dim_v, tangents.v_strides)}};
}

const char* refusal_of_bwd_jvp(const BwdJvpParams& params) {
  if (static_cast<float>(params.softmax_scale) == 0) return kScaleIsZero;  // as in the forward
  if (params.dropout_p != 0) return kDropsOut;
  if (params.key_padding_mask != nullptr) return kMasks;
  if (!is_aligned(params)) return kIsNotAligned;
  return plan_of(params)->refusal;
}

Layout layout_of_bwd_jvp(const BwdJvpParams& params) {
  return layout_of(params, params.schedule->key_segments, kBwdJvpBlockM, kBwdJvpBlockN);
}

size_t bytes_of_dq_sums(const BwdJvpParams& params, const BwdJvpPlan& plan) {
  if (!plan.adds_dq) return 0;
  return num_query_tiles(plan.runs) * params.batch_size * params.num_heads * kQueryTileRows * kJvpHeadDim *
         sizeof(float);
}

BwdJvpProducts products_of_bwd_jvp(const BwdJvpParams& params) {
  const std::shared_ptr<const BwdJvpPlan> plan = plan_of(params);
  return {bytes_of_dq_sums(params, *plan), [plan](const BwdJvpParams& params, const BwdJvpRows& rows, void* workspace) {
            const auto launch =
                params.dtype == DType::kBFloat16 ? launch_bwd_jvp<__nv_bfloat16> : launch_bwd_jvp<__half>;
            launch(params, rows, *plan, workspace);
          }};
}

}  // namespace mixed_attention::cuda::hopper
