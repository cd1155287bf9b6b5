// Some tokens of a sequence, as ranges of them.
#pragma once

#include <ATen/DimVector.h>
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

// The inverse of take: rows of the tokens that were taken, with zeros between them.
inline at::Tensor put_back(const at::Tensor& rows, const Ranges& ranges, int64_t num_tokens) {
  std::vector<at::Tensor> pieces;
  const auto skip = [&](int64_t from, int64_t to) {
    if (from == to) return;
    at::DimVector shape(rows.sizes());
    shape[1] = to - from;
    pieces.push_back(at::zeros(shape, rows.options()));
  };
  int64_t place = 0, taken = 0;
  for (const auto& [start, end] : ranges) {
    skip(place, start);
    pieces.push_back(rows.slice(1, taken, taken + end - start));
    taken += end - start;
    place = end;
  }
  skip(place, num_tokens);
  return at::cat(pieces, 1);
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
