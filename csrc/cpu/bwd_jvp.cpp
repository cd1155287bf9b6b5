#include <vector>

#include "cpu/kernels.h"
#include "cpu/launch.h"
#include "cpu/work_items.h"
#include "cpu/workers.h"

namespace mixed_attention::cpu {
namespace {

// Half as many keys as the backward: with tangents a tile has twice the operands, and more.
constexpr int64_t kKeysOfItem = kBwdBlockN / 2;

}  // namespace

void run_bwd_jvp(const BwdJvpParams& params) {
  const AttentionKernels& kernels = attention_kernels(params);
  const VisitedTiles plan = visit_tiles_of_keys(*params.schedule, kKeysOfItem);
  const int64_t batch_heads = params.batch_size * params.num_heads, count = params.tangents.count;
  const int64_t operations = params.schedule->num_pairs * batch_heads * 5 * (params.head_dim + params.head_dim_v);
  const int64_t num_rows = batch_heads * params.seqlen_q, acc_size = accumulator_size(params.dtype);

  const MeasuredRows measured = measure_rows(params, params.lse, kernels);
  const AlignedMemory numbers = allocate((count + 1) * num_rows * acc_size);
  char *gamma = numbers.get(), *eps = gamma + num_rows * acc_size;
  for_each_rows(params, operations, [&](int64_t batch, int64_t head, Range rows) {
    kernels.bwd_jvp_rows(params, batch, head, rows, eps, num_rows, gamma);
  });
  for (const Range& rows : plan.unvisited) {
    zero_rows(params, rows, params.dq, params.dq_strides, params.head_dim);
    for (int64_t t = 0; t < count && params.dq_dot; ++t) {
      void* dq_dot = static_cast<char*>(params.dq_dot) + t * params.dq_dot_step * element_size(params.dtype);
      zero_rows(params, rows, dq_dot, params.dq_dot_strides, params.head_dim);
    }
  }

  BwdShared shared{gamma,   params.dq,           params.dq_strides, measured.row_max,   measured.row_log2_sum,
                   nullptr, plan.tiles_per_head, wait_until,        /*wide_keys=*/false};
  BwdJvpShared tangents{eps, num_rows, params.dq_dot, params.dq_dot_strides, params.dq_dot_step};
  // 16-bit types sum in fp32: dq, and behind it the gradients of its tangents.
  const bool is_16_bit = element_size(params.dtype) == 2;
  const int64_t row = params.num_heads * params.head_dim, tensor = params.batch_size * params.seqlen_q * row;
  const AlignedMemory sums = allocate(is_16_bit ? (1 + (params.dq_dot ? count : 0)) * tensor * 4 : 0);
  if (is_16_bit) {
    shared.dq_acc = sums.get();
    shared.dq_acc_strides = tangents.dq_dot_acc_strides = {params.seqlen_q * row, row, params.head_dim};
    tangents.dq_dot_acc = sums.get() + tensor * 4;
    tangents.dq_dot_acc_step = tensor;
  }
  std::vector<int> progress(batch_heads * plan.tiles_per_head, 0);
  shared.progress = progress.data();

  for_each_tile(params, plan, operations, bwd_jvp_scratch_size(params, kernels),
                [&](const BwdItem& item, void* scratch) { kernels.bwd_jvp(params, shared, tangents, item, scratch); });
}

}  // namespace mixed_attention::cpu
