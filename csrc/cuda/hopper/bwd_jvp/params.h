// The parameters of the kernels for gradients of tangents as they travel to the device.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <type_traits>

#include "cuda/common/bwd_jvp_rows.h"
#include "cuda/hopper/bwd/dq_accum.h"
#include "cuda/hopper/bwd_jvp/config.h"
#include "cuda/hopper/plan/key_table.h"
#include "cuda/hopper/plan/query_table.h"
#include "params.h"

namespace mixed_attention::cuda::hopper {

// A tensor as TMA reads it (tensor_map.h), or none, for which zeros stand.
struct SideMap {
  CUtensorMap map;  // (batch_size, seqlen, num_heads, head_dim or head_dim_v)
  int batch_step;   // 1, or 0 where one sequence serves the whole batch
  bool exists;
};

struct SideGrad {
  void* data;  // (batch_size, seqlen, num_heads, num_columns); null where the gradient is not wanted
  Strides strides;
  int num_columns;
  float factor;
};

template <typename Table>
struct BwdJvpKernelParamsOf {
  SideMap owned[kSideTensors], streamed[kSideTensors];
  SideGrad first, second;  // dq and dq', or dk and dv
  BwdJvpRows rows;
  int64_t seqlen_q;
  float softmax_scale, softmax_scale_log2;
  DqAccum dq_accum;  // none where a kernel owns dq
  Table table;       // rows that own, and those that stream through them
};

template <typename Config>
using BwdJvpKernelParams = BwdJvpKernelParamsOf<std::conditional_t<Config::kAddsDq, KeyWorkTable, WorkTable>>;

}  // namespace mixed_attention::cuda::hopper
