#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/launch.h"
#include "cpu/workers.h"

namespace mixed_attention::cpu {

void run_rope(const RopeParams& params) {
  const AttentionKernels& kernels = selected_instruction_set().kernels[static_cast<int>(params.dtype)];
  constexpr int64_t kRows = 256;
  const int64_t tiles = (params.seqlen + kRows - 1) / kRows, num_tasks = params.batch_size * tiles;
  const int64_t operations = 8 * params.batch_size * params.seqlen * params.num_heads * params.head_dim;
  for_each_task(params.parallel_for, num_workers(params, num_tasks, operations), num_tasks, 0,
                [&](int64_t index, void*) {
                  const int64_t begin = index % tiles * kRows;
                  kernels.rope(params, index / tiles, {begin, std::min(begin + kRows, params.seqlen)});
                });
}

}  // namespace mixed_attention::cpu
