// The keys of a tile: rows gathered out of ranges, masked ones left out, so that a union of ranges is one run of full
// tiles and a masked key costs nothing.
#pragma once

#include "cpu/simd/convert.h"
#include "params.h"
#include "schedule.h"

namespace mixed_attention::cpu::MIXED_ATTENTION_ISA {

struct Key {
  int64_t row;     // in k and v
  int64_t offset;  // in its range, for dropout
  int64_t range_index;
};

// Yields the keys that the padding mask leaves, range after range.
class KeyCursor {
 public:
  KeyCursor(const Range* ranges, int64_t num_ranges, const bool* mask)
      : ranges_(ranges), num_ranges_(num_ranges), mask_(mask) {}

  // Fills up to capacity keys and returns how many.
  int64_t next(Key* keys, int64_t capacity) {
    int64_t count = 0;
    while (count < capacity && range_index_ < num_ranges_) {
      const Range range = ranges_[range_index_];
      for (; count < capacity && range.begin + offset_ < range.end; ++offset_) {
        const int64_t row = range.begin + offset_;
        if (!mask_ || mask_[row]) keys[count++] = {row, offset_, range_index_};
      }
      if (range.begin + offset_ >= range.end) {
        ++range_index_;
        offset_ = 0;
      }
    }
    return count;
  }

 private:
  const Range* ranges_;
  int64_t num_ranges_;
  const bool* mask_;
  int64_t range_index_ = 0, offset_ = 0;
};

inline const bool* mask_of(const AttentionParams& p, int64_t batch) {
  return p.key_padding_mask ? p.key_padding_mask + batch * p.key_padding_mask_batch_stride : nullptr;
}

// out[i] = row of key i, zero behind it up to stride.
template <class Element, class Acc>
void pack_rows(const Element* base, int64_t row_stride, const Key* keys, int64_t count, int64_t width, Acc* out,
               int64_t stride) {
  for (int64_t i = 0; i < count; ++i) {
    load_row(base + keys[i].row * row_stride, width, Acc(1), out + i * stride);
    for (int64_t d = width; d < stride; ++d) out[i * stride + d] = 0;
  }
}

// out[d][i] = element d of the row of key i, zero for i from count to columns.
template <class Element, class Acc>
void pack_transposed(const Element* base, int64_t row_stride, const Key* keys, int64_t count, int64_t width, Acc* out,
                     int64_t columns) {
  constexpr int64_t kUnroll = 8;  // keys at a time: eight short streams of reads, one of writes
  int64_t i = 0;
  for (; i + kUnroll <= count; i += kUnroll) {
    const Element* rows[kUnroll];
    for (int64_t j = 0; j < kUnroll; ++j) rows[j] = base + keys[i + j].row * row_stride;
    for (int64_t d = 0; d < width; ++d) {
      for (int64_t j = 0; j < kUnroll; ++j) out[d * columns + i + j] = to_accumulator(rows[j][d]);
    }
  }
  for (; i < columns; ++i) {
    for (int64_t d = 0; d < width; ++d) {
      out[d * columns + i] = i < count ? to_accumulator(base[keys[i].row * row_stride + d]) : Acc(0);
    }
  }
}

}  // namespace mixed_attention::cpu::MIXED_ATTENTION_ISA
