// Where the parts of an output row lie, that the combination of a forward whose walks were split reads.
#pragma once

#include <cstdint>

namespace mixed_attention::cuda {

// A row of the output, and where its parts lie among the rows of all parts. Its scores are in units of their own.
struct SplitRow {
  bool exists;
  int64_t batch, head, row;
  int64_t first_part, part_step;
  float scale, scale_log2;  // of raw scores, positive
};

}  // namespace mixed_attention::cuda
