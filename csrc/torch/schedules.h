// Schedules of plans, each made once.
#pragma once

#include <c10/util/ArrayRef.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "params.h"

namespace mixed_attention {

enum class Pass { kForward, kBackward };

// Who walks a schedule, and alone knows what it looks like: the CPU's kernels, or CUDA's (kernels.h).
enum class Walker { kCpu, kCuda };

// The schedule of a plan's integers, as make_schedule has it; without the inverse for a forward, which does not read
// it. It is kept for later calls, the backward of the same step among them. Any thread may call this.
//
// The integers of a plan of thousands of groups take longer to compare than all else in a call. Those of a FlatPlan
// that lives are known by where they lie.
//
// Throws std::invalid_argument where the plan does not fit.
std::shared_ptr<const Schedule> schedule_of(c10::IntArrayRef segments, int64_t seqlen_q, int64_t seqlen_k, Pass pass,
                                            Walker walker);

// A plan's integers, for as many calls as it serves.
class FlatPlan {
 public:
  explicit FlatPlan(std::vector<int64_t> numbers);
  ~FlatPlan();
  FlatPlan(const FlatPlan&) = delete;
  FlatPlan& operator=(const FlatPlan&) = delete;

  const std::vector<int64_t>& numbers() const { return numbers_; }

 private:
  const std::vector<int64_t> numbers_;
};

}  // namespace mixed_attention
