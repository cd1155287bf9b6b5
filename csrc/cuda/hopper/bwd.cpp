#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <limits>
#include <string>

#include "cuda/device.h"
#include "cuda/hopper/bwd_config.h"
#include "cuda/hopper/bwd_launch.h"
#include "cuda/hopper/fp32_bwd_launch.h"
#include "cuda/hopper/key_work_table.h"
#include "cuda/hopper/launch.h"
#include "cuda/hopper/work_table.h"

namespace mixed_attention::cuda::hopper {
namespace {

template <typename Element>
void run_element(const BwdParams& params) {
  params.head_dim == 64 ? launch_bwd<Element, 64>(params) : launch_bwd<Element, 128>(params);
}

// Floats of a statistic by tiles. Every query segment may end in a tile that is filled up.
int64_t size_by_tiles(const BwdParams& params) {
  return params.batch_size * params.num_heads * num_query_tiles(make_query_runs(*params.schedule)) * kQueryTileRows;
}

int64_t num_rows(const BwdParams& params) { return params.batch_size * params.num_heads * params.seqlen_q; }

}  // namespace

BwdTensors bwd_tensors(const BwdParams& params) {
  const auto view = [&](const void* data, int64_t seqlen, const Strides& strides) {
    return TensorView{data, params.dtype, params.batch_size, seqlen, params.num_heads, params.head_dim, strides};
  };
  return {view(params.q, params.seqlen_q, params.q_strides), view(params.k, params.seqlen_k, params.k_strides),
          view(params.v, params.seqlen_k, params.v_strides), view(params.dout, params.seqlen_q, params.dout_strides)};
}

BwdWorkspace bwd_workspace(const BwdParams& params) {
  float* begin = static_cast<float*>(params.workspace);
  const int64_t size = size_by_tiles(params);
  float* rest = begin + 2 * size;
  return adds_dq(params) ? BwdWorkspace{begin, begin + size, nullptr, rest}
                         : BwdWorkspace{begin, begin + size, rest, nullptr};
}

bool adds_dq(const BwdParams& params) {
  return !params.deterministic && params.dtype != DType::kFloat32 && params.head_dim == 64;
}

int num_query_splits(const BwdParams& params, const std::vector<QueryRun>& runs) {
  if (!adds_dq(params)) return 1;
  const KeyWorkTable table = make_key_work_table(params, runs, 2 * kWarpgroupRows);
  const int num_blocks = num_multiprocessors(params.device);
  return steps_of_longest_block(table, num_blocks / 2, 2) < steps_of_longest_block(table, num_blocks, 1) ? 2 : 1;
}

std::string refusal_bwd(const Problem& problem) {
  if (std::string refusal = refusal_fwd(problem); !refusal.empty()) return refusal;
  if (problem.dtype == DType::kFloat32) {
    if (problem.head_dim <= kFp32BwdHeadDim) return "";
    return "head_dim is " + std::to_string(problem.head_dim) + ", above " + std::to_string(kFp32BwdHeadDim);
  }
  if (problem.head_dim == 64 || problem.head_dim == 128) return "";
  return "head_dim is " + std::to_string(problem.head_dim) + ", not 64 or 128";
}

bool can_bwd(const BwdParams& params) {
  if (params.dtype == DType::kFloat32) return can_fp32_bwd(params);
  const BwdTensors tensors = bwd_tensors(params);
  // Keys past a range's end get the score -inf, whose weight is zero only under a positive scale.
  return params.softmax_scale > 0 && params.dropout_p == 0 && params.key_padding_mask == nullptr &&
         can_map(tensors.q) && can_map(tensors.k) && can_map(tensors.v) && can_map(tensors.dout) &&
         can_store(params.out, params.out_strides) && can_store(params.dq, params.dq_strides) &&
         can_store(params.dk, params.dk_strides) && can_store(params.dv, params.dv_strides) &&
         fits_work_table(params) && fits_key_work_table(params);
}

size_t bwd_workspace_size(const BwdParams& params) {
  if (params.dtype == DType::kFloat32) return fp32_bwd_workspace(params).size;
  const int64_t size = size_by_tiles(params);
  return (2 * size + (adds_dq(params) ? size * params.head_dim : num_rows(params))) * sizeof(float);
}

void run_bwd(const BwdParams& params) {
  if (params.dtype == DType::kFloat32) return launch_fp32_bwd(params);
  params.dtype == DType::kBFloat16 ? run_element<__nv_bfloat16>(params) : run_element<__half>(params);
}

}  // namespace mixed_attention::cuda::hopper
