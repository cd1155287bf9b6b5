// Stores the results of a finished item.
#pragma once

#include <cstdint>

#include "cuda/common/log_sum_exp.cuh"
#include "cuda/hopper/fwd/softmax.cuh"
#include "cuda/hopper/jvp/params.h"
#include "cuda/hopper/jvp/softmax.cuh"
#include "cuda/hopper/plan/work_items.cuh"
#include "cuda/hopper/tile/store_rows.cuh"

namespace mixed_attention::cuda::hopper {

// Writes this warp's 16 rows of a tile, those that exist. The sums become the results.
template <typename Element, int kCount>
__device__ inline void store_tangents(const JvpKernelParams& params, const ItemRows& tile, int first_row,
                                      float (&out)[kCount], float (&out_dot)[kCount], OnlineSoftmax softmax,
                                      const TangentSums& tangents, const RowBases& bases) {
  const int lane = threadIdx.x % 32;
  const int row_begin = tile.row_begin + first_row + lane / 4;
  const int64_t first_number = (int64_t{tile.batch} * params.table.num_heads + tile.head) * params.seqlen_q + row_begin;
  const auto row_of_tensor = [&](void* data, const Strides& strides) {
    return static_cast<Element*>(data) + tile.batch * strides.batch + tile.head * strides.head +
           row_begin * strides.row;
  };
  softmax.finish();
  float shift[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float mass = softmax.row_sum[i], sum = quad_sum(tangents.sum[i]);
    shift[i] = mass == 0 ? 0 : __fdividef(sum, mass);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int row = row_of(i);
    const float mass = softmax.row_sum[row], inverse = mass == 0 ? 0 : __fdividef(1, mass);
    out[i] *= inverse;
    out_dot[i] = mass == 0 ? 0 : fmaf(out_dot[i], inverse, -shift[row] * out[i]);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool exists = row_begin + 8 * i < tile.row_end;
    const auto store = [&](void* data, const Strides& strides, const float (&result)[kCount]) {
      store_row(row_of_tensor(data, strides) + 8 * i * strides.row, params.head_dim, result, i, 1, exists);
    };
    if (params.out != nullptr) store(params.out, params.out_strides, out);
    store(params.out_dot, params.out_dot_strides, out_dot);
    if (!exists || lane % 4 != 0) continue;
    const int64_t number = first_number + 8 * i;
    if (params.lse != nullptr) {
      params.lse[number] = log_sum_exp(softmax.template lse<WithTangents<Element>>(i, bases), params.softmax_scale);
    }
    params.lse_dot[number] = softmax.row_sum[i] == 0 ? 0 : shift[i] + tangents.mean[i];
  }
}

}  // namespace mixed_attention::cuda::hopper
