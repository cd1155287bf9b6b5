// The places of the parts of an output row, for the combination of a forward whose walks were split.
#pragma once

#include <cstdint>

namespace mixed_attention::cuda {

// A row of the output, and where its parts lie among the rows of all parts. Its scores have a scale of their own.
struct SplitRow {
  bool exists;
  int64_t batch, head, row;
  int64_t first_part, part_step;
  float scale, scale_log2;  // of raw scores, positive
};

}  // namespace mixed_attention::cuda
