// Tiles of tensors in shared memory: how they get there and back.
#pragma once

#include <cstdint>

#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/keep.cuh"
#include "cuda/ptx/shared_address.cuh"
#include "params.h"

namespace mixed_attention::cuda::portable {

// Rows are 16 bytes longer than their elements: eight neighbouring rows then start in different banks, so that ldmatrix
// reads them, and reads down a column, without conflicts.
template <class Element, int kRows_, int kCols_>
struct alignas(16) SharedTile {
  using Value = Element;
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr int kPerChunk = 16 / sizeof(Element);
  static constexpr int kPitch = kCols + kPerChunk;
  Element data[kRows * kPitch];

  __device__ Element* row(int index) { return data + index * kPitch; }
  __device__ const Element* row(int index) const { return data + index * kPitch; }

  // What a lane gives to ldmatrix for four matrices from `row` and `col` on, in the order upper left, lower left, upper
  // right, lower right; or upper left, upper right, lower left, lower right.
  __device__ uint32_t columnwise(int row_index, int col) const {
    const int lane = threadIdx.x % 32;
    return ptx::shared_address(row(row_index + lane % 16) + col + lane / 16 * kPerChunk);
  }
  __device__ uint32_t rowwise(int row_index, int col) const {
    const int lane = threadIdx.x % 32;
    return ptx::shared_address(row(row_index + lane / 16 * 8 + lane % 8) + col + lane / 8 % 2 * kPerChunk);
  }
};

// A tile as one lane reads it in a loop: what depends on the lane stays in registers, for all tiles of one pitch.
template <class Tile>
class LaneTile {
 public:
  using Value = typename Tile::Value;
  static constexpr int kRows = Tile::kRows, kCols = Tile::kCols, kPitch = Tile::kPitch, kPerChunk = Tile::kPerChunk;

  __device__ explicit LaneTile(const Tile& tile)
      : LaneTile(tile, ptx::keep(tile.columnwise(0, 0)), ptx::keep(tile.rowwise(0, 0))) {}
  __device__ LaneTile(const Tile& tile, uint32_t columnwise, uint32_t rowwise)
      : tile_(tile), columnwise_(columnwise), rowwise_(rowwise) {}

  template <class OtherTile>
  __device__ LaneTile<OtherTile> at(const OtherTile& tile) const {
    static_assert(OtherTile::kPitch == kPitch && sizeof(typename OtherTile::Value) == sizeof(Value),
                  "the tiles have rows of other lengths");
    const auto distance =
        static_cast<uint32_t>(reinterpret_cast<const char*>(&tile) - reinterpret_cast<const char*>(&tile_));
    return {tile, columnwise_ + distance, rowwise_ + distance};
  }

  __device__ const Value* row(int index) const { return tile_.row(index); }
  __device__ uint32_t columnwise(int row, int col) const { return columnwise_ + bytes(row, col); }
  __device__ uint32_t rowwise(int row, int col) const { return rowwise_ + bytes(row, col); }

 private:
  __device__ static uint32_t bytes(int row, int col) { return (row * kPitch + col) * sizeof(Value); }

  const Tile& tile_;
  uint32_t columnwise_, rowwise_;  // of row 0 and column 0
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

// Copies rows of one tensor to tiles, by all threads of a block. What a thread's copies of all tiles have in common
// stays in registers: found anew for each tile, addresses and conditions would be a fifth of a loop's instructions.
template <int kThreads, class Tile>
class TileLoader {
 public:
  using Element = typename Tile::Value;

  // tiles: the first of those to load. mask: null, or which of the rows are not blocked.
  __device__ TileLoader(Tile* tiles, const GlobalRows<Element>& rows, const bool* mask = nullptr)
      : tiles_(tiles),
        rows_(rows),
        mask_(mask),
        target_(ptx::keep(ptx::shared_address(tiles->row(thread_row()) + thread_col()))),
        source_(ptx::keep(rows.row(thread_row()) + thread_col())),
        whole_(ptx::keep(rows.aligned && mask == nullptr && rows.num_cols == Tile::kCols ? Tile::kRows : -1)) {}

  // Starts to copy rows row_begin to row_begin + num_rows - 1. All else in the tile becomes zero: rows behind them,
  // columns behind the tensor's, and blocked rows. So what a query may not see never enters an MMA, not even as NaN.
  __device__ void load(int index, int row_begin, int num_rows) const {
    // Threads that are left over of a row's chunks rest.
    if (kThreads % kChunks != 0 && thread_row() >= kRowsAtOnce) return;
    if (num_rows == whole_) {
      load_all(index, row_begin);
    } else {
      load_some(tiles_[index], row_begin, num_rows);
    }
  }

 private:
  // Neighbours copy the chunks of one row.
  static constexpr int kChunks = Tile::kCols / Tile::kPerChunk, kRowsAtOnce = kThreads / kChunks;
  __device__ static int thread_row() { return threadIdx.x / kChunks; }
  __device__ static int thread_col() { return threadIdx.x % kChunks * Tile::kPerChunk; }

  __device__ void load_all(int index, int row_begin) const {
    const uint32_t target = target_ + index * static_cast<int>(sizeof(Tile));
    const Element* source = source_ + static_cast<uint32_t>(row_begin) * rows_.stride;
    const int64_t step = kRowsAtOnce * rows_.stride;
#pragma unroll
    for (int row = 0; row < Tile::kRows; row += kRowsAtOnce, source += step) {
      if (Tile::kRows % kRowsAtOnce != 0 && thread_row() + row >= Tile::kRows) continue;
      ptx::cp_async_16(target + row * Tile::kPitch * static_cast<int>(sizeof(Element)), source);
    }
  }

  __device__ void load_some(Tile& tile, int row_begin, int num_rows) const {
    const int col = thread_col();
#pragma unroll 1  // seldom taken: unrolled, its addresses would take the registers of the common case
    for (int row = thread_row(); row < Tile::kRows; row += kRowsAtOnce) {
      const bool visible = row < num_rows && (mask_ == nullptr || mask_[row_begin + row]);
      const int count = visible ? max(0, min(Tile::kPerChunk, rows_.num_cols - col)) : 0;
      copy_chunk(tile.row(row) + col, rows_.row(row_begin + row) + col, count, rows_);
    }
  }

  Tile* tiles_;
  GlobalRows<Element> rows_;
  const bool* mask_;
  uint32_t target_;        // this thread's first chunk in the first tile
  const Element* source_;  // and in the tensor
  int whole_;              // rows of a tile that is copied without checks; -1: of none
};

// The only tile of its tensor.
template <int kThreads, class Tile>
__device__ void load_tile(Tile& tile, const GlobalRows<typename Tile::Value>& rows, int row_begin, int num_rows,
                          const bool* mask = nullptr) {
  TileLoader<kThreads, Tile>(&tile, rows, mask).load(0, row_begin, num_rows);
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
