// A whole layer in plain eager mode: the three nodes of its graph by one call from Python.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <vector>

#include "torch/attend_in_place.h"
#include "torch/attend_over_ranks.h"
#include "torch/project.h"

namespace mixed_attention {

// What a layer computes, but for its tensors: which tokens go through which rows of its weights, and the attention over
// what they make.
struct LayerCall {
  std::vector<ProjectedPart> parts;
  PackedCall attention;
};

// The same of a layer whose tokens are spread over ranks: the queries of this rank attend to the keys of all.
struct SpreadLayerCall {
  std::vector<ProjectedPart> parts;
  SpreadCall attention;
};

// Linear maps that are read as one: weights (rows, channels), one under the other, and their biases.
struct LinearMaps {
  std::vector<at::Tensor> weights;
  OptionalTensors biases;
};

// Whether this is plain eager mode on a device with kernels, and tensors fit each other.
bool fits_layer(const at::Tensor& x, const LinearMaps& in, const LinearMaps& out,
                const std::optional<at::Tensor>& freqs, int64_t num_heads, int64_t head_dim);

// Projects tokens (batch_size, seqlen, channels) to q, k and v, rotates them by complex freqs (batch_size or 1, seqlen,
// head_dim / 2), attends, and projects the output. Tensors are of torch's own class.
//
// Returns the tokens (batch_size, seqlen, channels) and behind them the buffers of q, k and v, as parts of the graph;
// where slots were normalised, these in front of the buffers.
// Nothing, and nothing done, where this is no plain eager mode on a device with kernels, or something does not fit:
// then the layer is composed of framework operators, which know what is wrong.
std::optional<std::vector<at::Tensor>> run_layer(const at::Tensor& x, const LinearMaps& in, const LinearMaps& out,
                                                 const std::optional<at::Tensor>& freqs,
                                                 const std::optional<at::Tensor>& key_padding_mask,
                                                 const LayerCall& call);

// The same over ranks. Returns the tokens (batch_size, seqlen, channels) of this rank, and its buffers likewise.
std::optional<std::vector<at::Tensor>> run_layer_over_ranks(const at::Tensor& x, const LinearMaps& in,
                                                            const LinearMaps& out,
                                                            const std::optional<at::Tensor>& freqs,
                                                            const SpreadLayerCall& call);

}  // namespace mixed_attention
