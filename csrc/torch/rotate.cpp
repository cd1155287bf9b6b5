#include "torch/rotate.h"

#include <ATen/Functions.h>

#include "torch/dispatched.h"
#include "torch/ops.h"

namespace mixed_attention {

using at::Tensor;

Tensor first_heads(const Tensor& buffer, const std::vector<int64_t>& shape, int64_t count) {
  const int64_t num_heads = shape[3], head_dim = shape[4], row = shape[2] * num_heads * head_dim;
  return buffer.as_strided({shape[0], shape[1], count * num_heads, head_dim}, {shape[1] * row, row, head_dim, 1});
}

void rotate_in_place(const Tensor& buffer, const std::vector<int64_t>& shape, int64_t count, const Tensor& freqs,
                     const std::optional<Ranges>& tokens, bool conjugate) {
  const auto& op = dispatched<&mixed_attention::rope_out>("mixed_attention::rope_out");
  const Tensor heads = first_heads(buffer, shape, count);
  for_each_run(freqs, tokens, shape[1], [&](int64_t begin, int64_t end, const std::optional<Tensor>& of_rows) {
    const Tensor run = heads.slice(1, begin, end);
    op.call(run, *of_rows, conjugate, run);
  });
}

Tensor rotated(const Tensor& heads, const std::optional<Tensor>& freqs, const std::optional<Ranges>& tokens,
               bool conjugate) {
  const auto& op = dispatched<&mixed_attention::rope>("mixed_attention::rope");
  return freqs ? op.call(heads, take(*freqs, tokens), conjugate) : heads;
}

Tensor rotate_copy(const Tensor& buffer, const std::vector<int64_t>& shape, int64_t count, const Tensor& freqs,
                   const std::optional<Ranges>& tokens) {
  const int64_t num_heads = shape[3], num_rotated = count * num_heads;
  const Tensor heads = buffer.view({shape[0], shape[1], shape[2] * num_heads, shape[4]});
  const Tensor turned = rotated(heads.slice(2, 0, num_rotated), freqs, tokens, false);
  return at::cat({turned, heads.slice(2, num_rotated)}, 2).view(buffer.sizes());
}

}  // namespace mixed_attention
