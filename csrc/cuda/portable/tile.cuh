// Tiles of tensors in shared memory: how they get there and back.
#pragma once

#include <cstdint>

#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "params.h"

namespace mixed_attention::cuda::portable {

// Rows are 16 bytes longer than their elements: eight neighbouring rows then start in different banks, so that ldmatrix
// reads them, and reads down a column, without conflicts.
template <class Element, int kRows_, int kCols_>
struct alignas(16) SharedTile {
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr int kPerChunk = 16 / sizeof(Element);
  static constexpr int kPitch = kCols + kPerChunk;
  Element data[kRows * kPitch];

  __device__ Element* row(int index) { return data + index * kPitch; }
  __device__ const Element* row(int index) const { return data + index * kPitch; }
};

// Writes two neighbouring elements, the first of an even column, rounded.
template <class Element>
__device__ void put_pair(Element* target, float first, float second) {
  if constexpr (sizeof(Element) == 2) {
    *reinterpret_cast<uint32_t*>(target) = ptx::pack<Element>(first, second);
  } else {
    *reinterpret_cast<float2*>(target) = make_float2(first, second);
  }
}

// Rows of one head of one batch entry in global memory.
template <class Element>
struct GlobalRows {
  Element* data;
  int64_t stride;
  int num_cols;
  bool aligned;  // every row starts at a multiple of 16 bytes

  __device__ Element* row(int index) const { return data + index * stride; }
};

template <class Element>
__device__ GlobalRows<Element> rows_of(const void* tensor, const Strides& strides, int batch, int head,
                                       int64_t num_cols, bool aligned) {
  Element* data = static_cast<Element*>(const_cast<void*>(tensor)) + batch * strides.batch + head * strides.head;
  return {data, strides.row, static_cast<int>(num_cols), aligned};
}

// Starts to copy one 16-byte chunk: `count` elements, then zeros.
template <class Element>
__device__ void copy_chunk(Element* target, const Element* source, int count, const GlobalRows<Element>& rows) {
  constexpr int kPerChunk = 16 / sizeof(Element);
  if (rows.aligned) {
    // Nothing is read where count is 0, but the address must be one of the tensor's all the same.
    ptx::cp_async_16(target, count > 0 ? source : rows.data, count * static_cast<int>(sizeof(Element)));
  } else {
#pragma unroll
    for (int e = 0; e < kPerChunk; ++e) target[e] = e < count ? source[e] : Element(0.0f);
  }
}

// Starts to copy rows row_begin to row_begin + num_rows - 1. All else in the tile becomes zero: rows behind them,
// columns behind the tensor's, and rows that `mask`, if there is one, blocks. So what a query may not see never enters
// a product, not even as NaN.
template <int kThreads, class Element, int kRows, int kCols>
__device__ void load_tile(SharedTile<Element, kRows, kCols>& tile, const GlobalRows<Element>& rows, int row_begin,
                          int num_rows, const bool* mask = nullptr) {
  using Tile = SharedTile<Element, kRows, kCols>;
  constexpr int kChunks = kCols / Tile::kPerChunk, kRowsAtOnce = kThreads / kChunks;
  // Neighbours copy the chunks of one row; threads that are left over of that rest.
  const int thread_row = threadIdx.x / kChunks, col = threadIdx.x % kChunks * Tile::kPerChunk;
  if (kThreads % kChunks != 0 && thread_row >= kRowsAtOnce) return;
  const Element* source = rows.row(row_begin + thread_row) + col;
  const int64_t step = kRowsAtOnce * rows.stride;
  const auto is_row = [&](int row) { return kRows % kRowsAtOnce == 0 || row < kRows; };
  if (rows.aligned && mask == nullptr && num_rows == kRows && rows.num_cols == kCols) {
#pragma unroll
    for (int i = 0; i < kRows; i += kRowsAtOnce, source += step) {
      if (is_row(thread_row + i)) ptx::cp_async_16(tile.row(thread_row + i) + col, source);
    }
  } else {
#pragma unroll 1  // seldom taken: unrolled, its addresses would take the registers of the common case
    for (int row = thread_row; row < kRows; row += kRowsAtOnce, source += step) {
      const bool visible = row < num_rows && (mask == nullptr || mask[row_begin + row]);
      const int count = visible ? max(0, min(Tile::kPerChunk, rows.num_cols - col)) : 0;
      copy_chunk(tile.row(row) + col, source, count, rows);
    }
  }
}

// Stores a warp's part of a tile: rows from tile_row on, kWarpRows or fewer, to rows row_begin and following; of each
// kWarpCols columns from first_col on.
template <int kWarpRows, int kWarpCols, class Element, int kRows, int kCols>
__device__ void store_rows(const SharedTile<Element, kRows, kCols>& tile, int tile_row, int first_col,
                           const GlobalRows<Element>& rows, int row_begin, int num_rows) {
  using Tile = SharedTile<Element, kRows, kCols>;
  constexpr int kChunks = kWarpCols / Tile::kPerChunk;
  const int lane = threadIdx.x % 32;
  for (int index = lane; index < kWarpRows * kChunks; index += 32) {
    const int row = index / kChunks, col = first_col + index % kChunks * Tile::kPerChunk;
    if (row >= num_rows || col >= rows.num_cols) continue;
    const Element* source = tile.row(tile_row + row) + col;
    Element* target = rows.row(row_begin + row) + col;
    if (rows.aligned && col + Tile::kPerChunk <= rows.num_cols) {
      *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(source);
    } else {
      for (int e = 0; e < min(Tile::kPerChunk, rows.num_cols - col); ++e) target[e] = source[e];
    }
  }
}

}  // namespace mixed_attention::cuda::portable
