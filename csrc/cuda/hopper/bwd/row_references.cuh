// References of queries whose log-sum-exp does not tell their p apart: row_reference.h.
#pragma once

#include <cstdint>
#include <numbers>

#include "cuda/common/row_reference.cuh"
#include "cuda/hopper/bwd/params.h"
#include "cuda/hopper/bwd/query_tiles.cuh"

namespace mixed_attention::cuda::hopper {

// Finds those of a tile's queries, by all threads of a block. lse, references: from the tile's on. keep(row, number)
// takes the log-sum-exp in base 2, relative to the reference, of a row that has one; row: of the tile.
template <typename Element, typename Source, typename Keep>
__device__ inline void find_references(const Source& source, int run, const QueryTile& queries, int64_t batch,
                                       int64_t head, const float* lse, RowReference* references, const Keep& keep) {
  const auto head_of = [&](const void* tensor, const Strides& strides) {
    return static_cast<const Element*>(tensor) + batch * strides.batch + head * strides.head;
  };
  const Element* const q = head_of(source.q, source.q_strides) + queries.row_begin * source.q_strides.row;
  const Element* const k = head_of(source.k, source.k_strides);
  const bool* const mask = source.mask == nullptr ? nullptr : source.mask + batch * source.mask_batch_stride;
  const auto for_each_key = [&](const auto& visit) {
    for (int i = source.first_range[run]; i < source.first_range[run + 1]; ++i) {
      for (int key = source.ranges[i].begin; key < source.ranges[i].end; ++key) {
        if (mask == nullptr || mask[key]) visit(k + key * source.k_strides.row);
      }
    }
  };
  constexpr int kLanes = RowProducts<Element>::kLanes;
  for (int row = threadIdx.x / kLanes; row < queries.num_rows; row += blockDim.x / kLanes) {
    RowReference reference{0, -INFINITY, 0};
    const bool is_large = needs_reference(lse[row] * std::numbers::log2e_v<float>);
    if (is_large) {
      reference =
          find_reference(q + row * source.q_strides.row, source.head_dim, source.scale_log2, source.unit, for_each_key);
    }
    if (threadIdx.x % kLanes != 0) continue;
    references[row] = reference;
    if (is_large) keep(row, reference.sum_log2);
  }
}

}  // namespace mixed_attention::cuda::hopper
