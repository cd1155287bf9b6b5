// Schedules of plans, each made once.
#pragma once

#include <c10/util/ArrayRef.h>

#include <cstdint>
#include <memory>

#include "schedule.h"

namespace mixed_attention {

enum class Pass { kForward, kBackward };

// The schedule of a plan's integers, as make_schedule has it; without the inverse for a forward, which does not read
// it. It is kept for later calls, the backward of the same step among them. Any thread may call this.
//
// Throws std::invalid_argument where the plan does not fit.
std::shared_ptr<const Schedule> schedule_of(c10::IntArrayRef segments, int64_t seqlen_q, int64_t seqlen_k, Pass pass);

}  // namespace mixed_attention
