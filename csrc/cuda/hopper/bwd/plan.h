// How the 16-bit backward goes about a call: who computes dq, and what comes one after the other.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/hopper/bwd/config.h"
#include "cuda/hopper/bwd/dq_accum.h"
#include "cuda/hopper/bwd/list.h"
#include "cuda/hopper/bwd/params.h"
#include "cuda/hopper/plan/key_table.h"
#include "params.h"

namespace mixed_attention::cuda::hopper {

// Some of the heads of a call that has one sequence, or some of the sequences of a batch.
struct BwdShare {
  int64_t first, count;
  int splits;  // blocks that the queries of a key tile are split over, 1 or 2
};

struct BwdPlan {
  DqForm dq_form;
  std::vector<BwdShare> shares;  // one after the other, adding up their dq in the same memory; the first is the largest
  const BwdList* list = nullptr;  // none where tables in the parameters of kernels hold the plan
};

// True if kernels can go about a call at all: its plan fits tables, or there are kernels that go through a list.
bool has_bwd_plan(const BwdParams& params);

// Pointers count only by whether there is a mask and whether there is spare memory. To measure another form, this is
// the place to change. list: the place for the plan's, if it has one.
BwdPlan plan_bwd(const BwdParams& params, const std::vector<QueryRun>& runs, BwdList& list);

// A share as the kernels behind the statistics see it.
BwdParams params_of(const BwdShare& share, const BwdParams& params);
QueryStats stats_of(const BwdShare& share, const BwdParams& params, const QueryStats& stats);
DqAccum accum_of(const BwdShare& share, const BwdParams& params, const DqAccum& accum);

// The places of query tiles among the accumulators of a batch_head; empty if another kernel computes dq.
std::vector<DqAccumRun> make_dq_accum_runs(const Schedule& schedule, const std::vector<QueryRun>& runs, DqForm form);

}  // namespace mixed_attention::cuda::hopper
