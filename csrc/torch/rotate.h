// Rotation of packed buffers, in place and not, without derivatives.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "torch/autograd.h"
#include "torch/tokens.h"

namespace mixed_attention {

// The first slots of a buffer (batch_size, seqlen, slots, num_heads, head_dim) as so many heads more.
at::Tensor first_heads(const at::Tensor& buffer, const std::vector<int64_t>& shape, int64_t count);

// Calls for neighbouring rows and their frequencies, of those for more tokens than there are.
template <class Step>
void for_each_run(const std::optional<at::Tensor>& freqs, const std::optional<Ranges>& tokens, int64_t seqlen,
                  Step step) {
  if (!freqs || !tokens) {
    step(0, seqlen, freqs);
    return;
  }
  int64_t place = 0;
  for (const auto& [start, end] : *tokens) {
    step(place, place + end - start, std::optional(freqs->slice(1, start, end)));
    place += end - start;
  }
}

// Multiplies the first `count` slots by frequencies (batch_size or 1, tokens, head_dim / 2, 2), where they lie.
// Where there are frequencies for more tokens than there are, the ranges say which.
void rotate_in_place(const at::Tensor& buffer, const std::vector<int64_t>& shape, int64_t count,
                     const at::Tensor& freqs, const std::optional<Ranges>& tokens, bool conjugate);

// Heads (batch_size, tokens, num_heads, head_dim) times the same, by an operation that returns what it makes; as they
// are without.
at::Tensor rotated(const at::Tensor& heads, const std::optional<at::Tensor>& freqs, const std::optional<Ranges>& tokens,
                   bool conjugate);

// The first `count` slots of a buffer rotated into new memory, the others copied.
at::Tensor rotate_copy(const at::Tensor& buffer, const std::vector<int64_t>& shape, int64_t count,
                       const at::Tensor& freqs, const std::optional<Ranges>& tokens);

// Whether somebody may see a product beside the one who hands it over: another tensor over its memory, or whoever
// watches.
inline bool is_seen(const at::Tensor& buffer) { return is_watched() || num_holders(buffer) != 1; }

}  // namespace mixed_attention
