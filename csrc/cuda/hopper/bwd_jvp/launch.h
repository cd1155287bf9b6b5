// The launcher of the kernels for gradients of tangents, as its instantiations and its dispatch see it.
#pragma once

#include <cstddef>
#include <vector>

#include "cuda/common/bwd_jvp_rows.h"
#include "cuda/hopper/plan/key_table.h"
#include "cuda/hopper/plan/query_table.h"
#include "derivatives_params.h"

namespace mixed_attention::cuda::hopper {

// What is decided about a call, made once for all that are alike.
struct BwdJvpPlan {
  const char* refusal = nullptr;
  // Whether one kernel owns dk and dv and adds to dq, in the order in which its blocks come; else there are two.
  bool adds_dq = false;
  WorkTable by_query{}, by_key{};  // by_key: its segments are of keys, and its ranges of queries that read them
  std::vector<QueryRun> runs;
};

// Those of the fp32 numbers that are added to.
size_t bytes_of_dq_sums(const BwdJvpParams& params, const BwdJvpPlan& plan);

// Instantiated by cuda/instantiate_hopper_bwd_jvp.cu.
template <typename Element>
void launch_bwd_jvp(const BwdJvpParams& params, const BwdJvpRows& rows, const BwdJvpPlan& plan, void* sums);

}  // namespace mixed_attention::cuda::hopper
