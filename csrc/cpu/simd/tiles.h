// Products of bfloat16 pairs in tile registers (AMX): eight of them, of 16 rows of 64 bytes each.
#pragma once

#include "cpu/simd/factors.h"

namespace mixed_attention::cpu::MIXED_ATTENTION_ISA {

struct NoTileRegisters {};

#if MIXED_ATTENTION_TILES
inline constexpr int64_t kTileRows = 16, kTileColumns = 16;  // of pairs, and of fp32

// The registers of this thread have their shape as long as it lives; without it they are in use by nobody.
class TileRegisters {
 public:
  TileRegisters() {
    struct alignas(64) Configuration {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static constexpr Configuration kConfiguration;
    _tile_loadconfig(&kConfiguration);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// C (two tiles by two, or one where there is but one left) from so many tiles of depth. Strides are in elements.
template <bool kTwoRows, bool kTwoColumns, bool kAdd>
[[gnu::noinline]] void tile_block(const BFloat16Pair* a, int64_t a_stride, const BFloat16Pair* b, int64_t b_stride,
                                  float* c, int64_t c_stride, int64_t depth) {
  // NOTE: the compiler's own wrappers do not tell it that tiles are loaded from memory.
  asm volatile("" ::: "memory");
  float* const c_below = c + kTileRows * c_stride;
  const int64_t c_bytes = c_stride * 4, a_bytes = a_stride * 4, b_bytes = b_stride * 4;
  if constexpr (kAdd) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (kTwoColumns) _tile_loadd(1, c + kTileColumns, c_bytes);
    if constexpr (kTwoRows) _tile_loadd(2, c_below, c_bytes);
    if constexpr (kTwoRows && kTwoColumns) _tile_loadd(3, c_below + kTileColumns, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (kTwoColumns) _tile_zero(1);
    if constexpr (kTwoRows) _tile_zero(2);
    if constexpr (kTwoRows && kTwoColumns) _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += kTileColumns, a += kTileColumns, b += kTileRows * b_stride) {
    _tile_loadd(4, a, a_bytes);
    _tile_loadd(6, b, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTwoColumns) {
      _tile_loadd(7, b + kTileColumns, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kTwoRows) {
      _tile_loadd(5, a + kTileRows * a_stride, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kTwoColumns) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (kTwoColumns) _tile_stored(1, c + kTileColumns, c_bytes);
  if constexpr (kTwoRows) _tile_stored(2, c_below, c_bytes);
  if constexpr (kTwoRows && kTwoColumns) _tile_stored(3, c_below + kTileColumns, c_bytes);
}

// C (rows, columns) from A (rows, depth), its depth contiguous, and B (depth, columns); all in whole tiles.
template <bool kAdd>
void tiled_gemm(int64_t rows, int64_t columns, int64_t depth, const BFloat16Pair* a, int64_t a_stride,
                const BFloat16Pair* b, int64_t b_stride, float* c, int64_t c_stride) {
  for (int64_t column = 0; column < columns; column += 2 * kTileColumns) {
    const bool two_columns = columns - column > kTileColumns;
    for (int64_t row = 0; row < rows; row += 2 * kTileRows) {
      const bool two_rows = rows - row > kTileRows;
      const auto block = two_rows      ? two_columns ? tile_block<true, true, kAdd> : tile_block<true, false, kAdd>
                         : two_columns ? tile_block<false, true, kAdd>
                                       : tile_block<false, false, kAdd>;
      block(a + row * a_stride, a_stride, b + column, b_stride, c + row * c_stride + column, c_stride, depth);
    }
  }
}

template <class F>
using TileRegistersFor = std::conditional_t<kIsTiled<F>, TileRegisters, NoTileRegisters>;
#else
template <class F>
using TileRegistersFor = NoTileRegisters;
#endif

}  // namespace mixed_attention::cpu::MIXED_ATTENTION_ISA
