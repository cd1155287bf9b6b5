#include <algorithm>

#include "ceil_div.h"
#include "cpu/kernels.h"
#include "cpu/launch.h"
#include "cpu/workers.h"

namespace mixed_attention::cpu {
namespace {

// batches: of how many each has items of its own.
template <class Params>
void run_rows(const Params& params, int64_t batches, void (*kernel)(const Params&, int64_t batch, Range rows),
              int64_t operations) {
  constexpr int64_t kRows = 256;
  const int64_t tiles = ceil_div(params.seqlen, kRows), num_items = batches * tiles;
  operations *= params.batch_size * params.seqlen * params.num_heads * params.head_dim;
  for_each_item(params.parallel_for, num_workers(params, num_items, operations), num_items, 0,
                [&](int64_t index, void*) {
                  const int64_t begin = index % tiles * kRows;
                  kernel(params, index / tiles, {begin, std::min(begin + kRows, params.seqlen)});
                });
}

const AttentionKernels& kernels_of(DType dtype) { return selected_instruction_set().kernels[static_cast<int>(dtype)]; }

}  // namespace

void run_rope(const RopeParams& params) { run_rows(params, params.batch_size, kernels_of(params.dtype).rope, 8); }

void run_rms_rope(const RmsRopeParams& params) {
  run_rows(params, params.batch_size, kernels_of(params.dtype).rms_rope, 12);
}

void run_rope_jvp(const RopeJvpParams& params) {
  run_rows(params, params.batch_size, kernels_of(params.dtype).rope_jvp, 8 + 16 * params.count);
}

void run_rope_backward(const RopeBwdParams& params) {
  run_rows(params, params.shares_freqs ? 1 : params.batch_size, kernels_of(params.dtype).rope_backward,
           16 + 32 * params.count);
}

}  // namespace mixed_attention::cpu
