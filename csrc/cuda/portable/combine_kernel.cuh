// What is left to do where walks were split: parts of an output by their log-sum-exps, parts of a gradient by adding.
#pragma once

#include <cstdint>

#include "params.h"

namespace mixed_attention::cuda::portable {

// One warp to a row of out: (batch, head, query).
template <class Element>
__global__ void portable_combine_kernel(const FwdParams params, const float* partial_out, const float* partial_lse,
                                        int num_splits) {
  const int64_t num_rows = params.batch_size * params.num_heads * params.seqlen_q;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (row >= num_rows) return;
  const int lane = threadIdx.x % 32;
  float max = -INFINITY;
  for (int i = 0; i < num_splits; ++i) max = fmaxf(max, partial_lse[i * num_rows + row]);
  const float offset = max == -INFINITY ? 0.0f : max;
  float sum = 0;
  for (int i = 0; i < num_splits; ++i) sum += expf(partial_lse[i * num_rows + row] - offset);
  const float inverse = sum == 0 ? 0.0f : 1 / sum;

  const int64_t copy = row / params.seqlen_q;
  const Strides& strides = params.out_strides;
  Element* out = static_cast<Element*>(params.out) + copy / params.num_heads * strides.batch +
                 copy % params.num_heads * strides.head + row % params.seqlen_q * strides.row;
  for (int64_t col = lane; col < params.head_dim_v; col += 32) {
    float value = 0;
    for (int i = 0; i < num_splits; ++i) {
      const float weight = expf(partial_lse[i * num_rows + row] - offset) * inverse;
      value += weight * partial_out[(i * num_rows + row) * params.head_dim_v + col];
    }
    out[col] = Element(value);
  }
  if (lane == 0) static_cast<float*>(params.lse)[row] = sum == 0 ? -INFINITY : offset + logf(sum);
}

// A gradient (batch, row, head, col) and its parts (num_splits, batch, head, row, col), to be multiplied by factor.
struct SumArguments {
  const float* partial;
  int num_splits;
  float factor;
  int64_t batch_size, num_heads, seqlen, num_cols;
  void* grad;
  Strides strides;
};

// One warp to a row.
template <class Element>
__global__ void portable_sum_kernel(const SumArguments args) {
  const int64_t num_rows = args.batch_size * args.num_heads * args.seqlen;
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (index >= num_rows) return;
  const int64_t copy = index / args.seqlen, row = index % args.seqlen;
  Element* grad = static_cast<Element*>(args.grad) + copy / args.num_heads * args.strides.batch +
                  row * args.strides.row + copy % args.num_heads * args.strides.head;
  for (int64_t col = threadIdx.x % 32; col < args.num_cols; col += 32) {
    float value = 0;
    for (int i = 0; i < args.num_splits; ++i) value += args.partial[(i * num_rows + index) * args.num_cols + col];
    grad[col] = Element(value * args.factor);
  }
}

}  // namespace mixed_attention::cuda::portable
