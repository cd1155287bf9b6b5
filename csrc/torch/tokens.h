// Some tokens of a sequence, as ranges of them.
#pragma once

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <utility>
#include <vector>

namespace mixed_attention {

// Half-open, ascending.
using Ranges = std::vector<std::pair<int64_t, int64_t>>;

// The tokens (batch_size, n, ...) of the ranges out of (batch_size, seqlen, ...); all without ranges.
inline at::Tensor take(const at::Tensor& x, const std::optional<Ranges>& ranges) {
  if (!ranges) return x;
  std::vector<at::Tensor> pieces;
  for (const auto& [start, end] : *ranges) pieces.push_back(x.slice(1, start, end));
  return pieces.empty() ? x.slice(1, 0, 0) : pieces.size() == 1 ? pieces[0] : at::cat(pieces, 1);
}

// Checks that ranges are ascending and inside. Returns how many tokens they are.
inline int64_t check_ranges(const char* name, const Ranges& ranges, int64_t num_tokens) {
  int64_t place = 0, count = 0;
  for (const auto& [start, end] : ranges) {
    TORCH_CHECK_VALUE(place <= start && start <= end && end <= num_tokens, name, ": expected ascending ranges of ",
                      num_tokens, " tokens, got [", start, ", ", end, ") after ", place);
    place = end;
    count += end - start;
  }
  return count;
}

}  // namespace mixed_attention
