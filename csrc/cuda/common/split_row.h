// The places of the splits of an output row, for the combination of a forward whose walks were split.
#pragma once

#include <cstdint>

namespace mixed_attention::cuda {

// A row of the output, and where its splits lie among the rows of all splits. Its scores have a scale of their own.
struct SplitRow {
  bool exists;
  int64_t batch, head, row;
  int64_t first_split, split_step;
  float scale, scale_log2;  // of raw scores, positive
};

}  // namespace mixed_attention::cuda
