#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <string>

#include "cuda/device.h"
#include "cuda/hopper/fwd_launch.h"
#include "cuda/hopper/launch.h"
#include "cuda/hopper/work_table.h"

namespace mixed_attention::cuda::hopper {
namespace {

template <typename Element>
void run_element(const FwdParams& params) {
  params.head_dim == 64 ? launch_fwd<Element, 64>(params) : launch_fwd<Element, 128>(params);
}

}  // namespace

FwdTensors fwd_tensors(const FwdParams& params) {
  const auto view = [&](const void* data, int64_t seqlen, const Strides& strides) {
    return TensorView{data, params.dtype, params.batch_size, seqlen, params.num_heads, params.head_dim, strides};
  };
  return {view(params.q, params.seqlen_q, params.q_strides), view(params.k, params.seqlen_k, params.k_strides),
          view(params.v, params.seqlen_k, params.v_strides)};
}

std::string refusal_fwd(const Problem& problem) {
  if (compute_capability(problem.device) != 90) return "the device is not of compute capability 9.0";
  if (problem.dtype != DType::kBFloat16 && problem.dtype != DType::kFloat16) return "the dtype is not 16 bits wide";
  if (problem.head_dim != 64 && problem.head_dim != 128) {
    return "head_dim is " + std::to_string(problem.head_dim) + ", not 64 or 128";
  }
  if (problem.head_dim_v != problem.head_dim) return "v is of another width than q and k";
  return "";
}

bool can_fwd(const FwdParams& params) {
  const FwdTensors tensors = fwd_tensors(params);
  // The maximum of the scores is the maximum of the exponents only under a positive scale.
  return params.softmax_scale > 0 && params.dropout_p == 0 && params.key_padding_mask == nullptr &&
         can_map(tensors.q) && can_map(tensors.k) && can_map(tensors.v) && can_store(params.out, params.out_strides) &&
         fits_work_table(params);
}

size_t fwd_workspace_size(const FwdParams&) { return 0; }

void run_fwd(const FwdParams& params) {
  params.dtype == DType::kBFloat16 ? run_element<__nv_bfloat16>(params) : run_element<__half>(params);
}

}  // namespace mixed_attention::cuda::hopper
