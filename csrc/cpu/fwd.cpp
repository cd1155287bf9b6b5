#include "cpu/kernels.h"
#include "cpu/launch.h"
#include "cpu/tasks.h"
#include "cpu/workers.h"

namespace mixed_attention::cpu {

void run_fwd(const FwdParams& params) {
  const AttentionKernels& kernels = selected_instruction_set().kernels[static_cast<int>(params.dtype)];
  const std::vector<FwdTask> tasks = fwd_tasks(params, rows_of_task(params, kFwdBlockM));
  const FwdWork work = work_of(params, tasks);
  const int64_t num_tasks = static_cast<int64_t>(tasks.size());
  for_each_task(params.parallel_for, num_workers(params, num_tasks, work.operations), num_tasks,
                fwd_scratch_size(params, kernels, work.rows),
                [&](int64_t index, void* scratch) { kernels.fwd(params, tasks[index], scratch); });
}

}  // namespace mixed_attention::cpu
