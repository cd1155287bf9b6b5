// Which memory a strided array takes, and whether two arrays share any of it.
#pragma once

#include <c10/util/ArrayRef.h>
#include <c10/util/SmallVector.h>

#include <cstdint>

namespace mixed_attention {

// Equal runs of bytes, at places that are combinations of strides.
class Footprint {
 public:
  Footprint(const void* data, c10::IntArrayRef sizes, c10::IntArrayRef strides, int64_t element_size);

  // Whether two elements share memory. Strides of which none spans all that lies within it count as such.
  bool overlaps_itself() const;

  // Whether an element shares memory with one of another array. Exact, but that very many combinations of strides that
  // nobody would use count as such unseen.
  bool overlaps(const Footprint& other) const;

 private:
  struct Dim {
    int64_t stride, size;
  };

  int64_t begin_;                  // address
  int64_t run_;                    // bytes that lie together; 0 without elements
  int64_t extent_;                 // from the first byte to the one behind the last
  c10::SmallVector<Dim, 4> dims_;  // in bytes, by ascending strides
};

}  // namespace mixed_attention
