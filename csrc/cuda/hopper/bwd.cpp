#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <memory>
#include <string>
#include <vector>

#include "cuda/common/check.h"
#include "cuda/hopper/bwd/config.h"
#include "cuda/hopper/bwd/launch.h"
#include "cuda/hopper/bwd/plan.h"
#include "cuda/hopper/bwd_fp32/launch.h"
#include "cuda/hopper/launch.h"
#include "cuda/hopper/plan/key_table.h"
#include "cuda/hopper/plan/query_table.h"

namespace mixed_attention::cuda::hopper {
namespace {

// Whether the rows of dq are in one piece each, and equally far apart.
bool can_move_dq(const BwdParams& params) {
  const Strides& strides = params.dq_strides;
  return (params.num_heads == 1 || strides.head == params.head_dim) &&
         (params.batch_size == 1 || strides.batch == params.seqlen_q * strides.row);
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

BwdTensors bwd_tensors(const BwdParams& params, const BwdWorkspace& workspace) {
  BwdTensors tensors = bwd_tensors(params);
  if (params.key_padding_mask != nullptr) {
    tensors.k = masked_view(params, workspace.masked_keys, workspace.masked_keys.keys);
    tensors.v = masked_view(params, workspace.masked_keys, workspace.masked_keys.values);
  }
  return tensors;
}

std::string refusal_bwd(const Problem& problem) {
  if (std::string refusal = refusal_fwd(problem); !refusal.empty()) return refusal;
  if (problem.dtype == DType::kFloat32 && problem.head_dim > kFp32BwdHeadDim) {
    return "head_dim is " + std::to_string(problem.head_dim) + ", above " + std::to_string(kFp32BwdHeadDim);
  }
  return "";
}

bool can_bwd(const BwdParams& params) {
  if (params.dtype == DType::kFloat32) return can_fp32_bwd(params);
  const BwdTensors tensors = bwd_tensors(params);
  // Keys past a range's end get the score -inf, whose p is zero only under a positive scale.
  return static_cast<float>(params.softmax_scale) > 0 && params.dropout_p == 0 && can_map(tensors.q) &&
         can_map(tensors.k) && can_map(tensors.v) && can_map(tensors.dout) &&
         can_store(params.out, params.out_strides) && can_store(params.dq, params.dq_strides) &&
         can_store(params.dk, params.dk_strides) && can_store(params.dv, params.dv_strides) &&
         fits_work_table(params) && fits_key_work_table(params);
}

// Gradients may be where the inputs are: the last kernel that reads keys and values is the one for their gradients.
// There they are read by those alone who overwrite them, after their last use. Gradients of queries reach their place
// behind it. The kernels for fp32 read copies.
Launch<BwdParams> launch_of_bwd(const BwdParams& params) {
  if (params.dtype == DType::kFloat32) {
    return {.workspace_size = fp32_bwd_workspace(params).size, .can_overwrite_inputs = true, .run = launch_fp32_bwd};
  }
  struct Plan {
    std::vector<QueryRun> runs;
    BwdPlan plan;
  };
  const auto made = std::make_shared<Plan>();
  made->runs = make_query_runs(*params.schedule);
  made->plan = plan_bwd(params, made->runs);
  return {.workspace_size = bwd_workspace(params, made->runs, made->plan).size,
          .can_overwrite_inputs = can_move_dq(params) || made->plan.dq_form != DqForm::kSeparate,
          .run = [made](const BwdParams& params) {
            with_bwd_head_dim(params.head_dim, [&]<int kHeadDim>() {
              params.dtype == DType::kBFloat16 ? launch_bwd<__nv_bfloat16, kHeadDim>(params, made->runs, made->plan)
                                               : launch_bwd<__half, kHeadDim>(params, made->runs, made->plan);
            });
          }};
}

}  // namespace mixed_attention::cuda::hopper
