// What is left of a backward whose walks were split: the splits of a gradient, to be added.
#pragma once

#include <cstdint>

#include "params.h"

namespace mixed_attention::cuda::portable {

// A gradient (batch, row, head, col) and its splits (num_splits, batch, head, row, col).
struct SumArguments {
  const float* partial;
  int num_splits;
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
  const int64_t batch_head = index / args.seqlen, row = index % args.seqlen;
  Element* grad = static_cast<Element*>(args.grad) + batch_head / args.num_heads * args.strides.batch +
                  row * args.strides.row + batch_head % args.num_heads * args.strides.head;
  for (int64_t col = threadIdx.x % 32; col < args.num_cols; col += 32) {
    float value = 0;
    for (int i = 0; i < args.num_splits; ++i) value += args.partial[(i * num_rows + index) * args.num_cols + col];
    grad[col] = Element(value);
  }
}

}  // namespace mixed_attention::cuda::portable
