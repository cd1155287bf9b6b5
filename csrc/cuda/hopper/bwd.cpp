#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/common/check.h"
#include "cuda/common/device_tables.h"
#include "cuda/common/kept.h"
#include "cuda/common/upload.h"
#include "cuda/hopper/bwd/config.h"
#include "cuda/hopper/bwd/launch.h"
#include "cuda/hopper/bwd/plan.h"
#include "cuda/hopper/launch.h"
#include "cuda/hopper/layout.h"
#include "cuda/hopper/plan/key_table.h"
#include "cuda/hopper/refusals.h"
#include "schedule.h"

namespace mixed_attention::cuda::hopper {
namespace {

// Whether the rows of dq are in one piece each, and equally far apart.
bool can_move_dq(const BwdParams& params) {
  const Strides& strides = params.dq_strides;
  return (params.num_heads == 1 || strides.head == params.head_dim) &&
         (params.batch_size == 1 || strides.batch == params.seqlen_q * strides.row);
}

// Whether rows of all tensors lie where the kernels can read and write them. fp32 is read as limbs, which are made of
// any rows, but dout as it is, too.
bool is_aligned(const BwdParams& params) {
  const BwdTensors tensors = bwd_tensors(params);
  const bool is_fp32 = params.dtype == DType::kFloat32;
  const auto is_aligned = [&](const void* data, const Strides& strides) {
    return can_store(data, strides, is_fp32 ? sizeof(float) : sizeof(uint16_t));
  };
  return can_load(tensors.q) && can_load(tensors.k) && can_load(tensors.v) && can_load(tensors.dout) &&
         (!is_fp32 || is_aligned(params.dout, params.dout_strides)) && is_aligned(params.out, params.out_strides) &&
         is_aligned(params.dq, params.dq_strides) && is_aligned(params.dk, params.dk_strides) &&
         is_aligned(params.dv, params.dv_strides);
}

struct Plan {
  bool exists = false;
  std::vector<QueryRun> runs;
  std::unique_ptr<BwdList> list;  // the plan's
  BwdPlan plan;
};

// What is decided about a call, made once for all that are alike.
std::shared_ptr<const Plan> plan_of(const BwdParams& params) {
  using Key = std::tuple<uint64_t, DType, int64_t, int64_t, int64_t, int, bool, bool, bool>;
  static auto* kept = new Kept<Key, Plan>(256);  // never freed: threads may outlive static objects
  const Key key{params.schedule->id,
                params.dtype,
                widest_head_dim(params),
                params.batch_size,
                params.num_heads,
                params.device,
                params.key_padding_mask != nullptr,
                params.spare_out != nullptr,
                params.deterministic};
  return kept->of(key, [&] {
    if (!has_bwd_plan(params)) return Plan{};
    std::vector<QueryRun> runs = make_query_runs(*params.schedule);
    auto list = std::make_unique<BwdList>();
    BwdPlan plan = plan_bwd(params, runs, *list);
    if (plan.list == nullptr) list.reset();
    return Plan{true, std::move(runs), std::move(list), std::move(plan)};
  });
}

// A plan's list where kernels read it.
struct BroughtList {
  HeldTable held;
  const char* list = nullptr;
};

// Enqueues what the list of a plan, if there is one, needs to be on the device. room: for want of a place where it is
// kept.
BroughtList bring(const BwdList* list, const BwdParams& params, char* room) {
  if (list == nullptr) return {};
  const auto bring_to = [&](char* memory, void* stream) {
    upload(memory, list->bytes.data(), list->bytes.size(), stream);
  };
  BroughtList brought{hold_table(list->id, list->bytes.size(), params.device, params.stream, bring_to)};
  brought.list = brought.held.memory;
  if (brought.list == nullptr) {
    bring_to(room, params.stream);
    brought.list = room;
  }
  return brought;
}

Layout layout_bwd(const BwdParams& params, const BwdPlan& plan) {
  const int tile_rows = key_tile_rows(widest_head_dim(params));
  Layout layout = layout_of(params, params.schedule->key_segments, tile_rows, kQueryTileRows);
  layout.num_splits = plan.shares.front().splits;
  if (layout.num_splits > 1) layout.num_split_tiles = layout.num_tiles;
  layout.num_tiles *= layout.num_splits;
  return layout;
}

}  // namespace

void move_dq(const BwdParams& params, const BwdWorkspace& workspace) {
  if (workspace.dq.data == params.dq) return;
  const size_t row_bytes = params.num_heads * params.head_dim * sizeof(uint16_t);
  check(cudaMemcpy2DAsync(params.dq, params.dq_strides.row * sizeof(uint16_t), workspace.dq.data, row_bytes, row_bytes,
                          params.batch_size * params.seqlen_q, cudaMemcpyDeviceToDevice,
                          static_cast<cudaStream_t>(params.stream)),
        "copy of dq");
}

std::string refusal_bwd(const Problem& problem) {
  if (std::string refusal = refusal_fwd(problem); !refusal.empty()) return refusal;
  return problem.dtype == DType::kFloat32 ? refusal_above(problem, kFp32BwdHeadDim) : "";
}

const char* refusal_of_bwd(const BwdParams& params) {
  if (static_cast<float>(params.softmax_scale) == 0) return kScaleIsZero;  // as in the forward
  if (params.dropout_p != 0) return kDropsOut;
  if (params.dtype == DType::kFloat32 && params.key_padding_mask != nullptr) return kMasksFp32;
  if (!is_aligned(params)) return kIsNotAligned;
  return plan_of(params)->exists ? nullptr : kPlanIsTooLarge;
}

// Gradients may be where the inputs are: the last kernel that reads keys and values is the one for their gradients.
// There they are read by those alone who overwrite them, after their last use. Gradients of queries reach their place
// behind it. The kernels for fp32 read copies.
Launch<BwdParams> launch_of_bwd(const BwdParams& params) {
  const std::shared_ptr<const Plan> plan = plan_of(params);
  Launch<BwdParams> launch{.layout = layout_bwd(params, plan->plan)};
  launch.workspace_size = bwd_workspace(params, plan->runs, plan->plan).size;
  launch.can_overwrite_inputs =
      params.dtype == DType::kFloat32 || can_move_dq(params) || plan->plan.dq_form != DqForm::kSeparate;
  launch.run = [plan](const BwdParams& params) {
    const BwdList* const list = plan->list.get();
    char* const room = list == nullptr ? nullptr : bwd_workspace(params, plan->runs, plan->plan).list_room;
    const BroughtList brought = bring(list, params, room);
    with_bwd_kernel(params, [&]<typename Element, int kHeadDim, int kLimbs>() {
      launch_bwd<Element, kHeadDim, kLimbs>(params, plan->runs, plan->plan, brought.list);
    });
  };
  return launch;
}

}  // namespace mixed_attention::cuda::hopper
