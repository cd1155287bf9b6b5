#include "cuda/common/scratch.h"
#include "cuda/hopper/bwd/launch.h"
#include "cuda/hopper/bwd_fp32/launch.h"
#include "cuda/hopper/plan/key_table.h"

namespace mixed_attention::cuda::hopper {

Fp32BwdWorkspace fp32_bwd_workspace(const BwdParams& params, const std::vector<QueryRun>& runs) {
  const BwdTensors tensors = bwd_tensors(params);
  Scratch scratch(params.workspace);
  Fp32BwdWorkspace workspace{};
  const int num_limbs = with_limbs(params, []<int kLimbs>() { return kLimbs; });
  workspace.q = take_half_limbs(tensors.q, num_limbs, scratch);
  workspace.k = take_half_limbs(tensors.k, num_limbs, scratch);
  workspace.v = take_half_limbs(tensors.v, num_limbs, scratch);
  workspace.dout = take_half_limbs(tensors.dout, num_limbs, scratch);
  const int64_t num_batch_heads = params.batch_size * params.num_heads;
  const int64_t num_tiles = num_batch_heads * num_query_tiles(runs);
  workspace.q_numbers = scratch.take<QueryNumbers>(num_tiles);
  workspace.dout_numbers = scratch.take<DoutNumbers>(num_tiles);
  workspace.delta = scratch.take<float>(num_batch_heads * params.seqlen_q);
  workspace.references = take_references(params, scratch);
  workspace.size = scratch.bytes();
  return workspace;
}

bool is_fp32_bwd_aligned(const BwdParams& params) {
  const BwdTensors tensors = bwd_tensors(params);
  return can_map_limbs(tensors.q) && can_map_limbs(tensors.k) && can_map_limbs(tensors.v) &&
         can_map_limbs(tensors.dout) && can_store(params.out, params.out_strides, sizeof(float)) &&
         can_store(params.dout, params.dout_strides, sizeof(float)) &&
         can_store(params.dq, params.dq_strides, sizeof(float)) &&
         can_store(params.dk, params.dk_strides, sizeof(float)) &&
         can_store(params.dv, params.dv_strides, sizeof(float));
}

}  // namespace mixed_attention::cuda::hopper
