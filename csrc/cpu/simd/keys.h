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

// Row i of the gathered keys in k or v; null behind the last.
template <class Element>
struct KeyRows {
  const Element* base;
  int64_t row_stride;
  const Key* keys;
  int64_t count;

  const Element* operator()(int64_t i) const { return i < count ? base + keys[i].row * row_stride : nullptr; }
};

}  // namespace mixed_attention::cpu::MIXED_ATTENTION_ISA
