// A whole layer in plain eager mode: the three nodes of its graph by one call from Python.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "torch/attend_in_place.h"
#include "torch/project.h"

namespace mixed_attention {

// What a layer computes, but for its tensors: which tokens go through which rows of its weights, and the attention over
// what they make.
struct LayerCall {
  std::vector<ProjectedPart> parts;
  PackedCall attention;
};

// Linear maps that are read as one: weights (rows, channels), one under the other, and their biases.
struct LinearMaps {
  std::vector<at::Tensor> weights;
  OptionalTensors biases;
};

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

}  // namespace mixed_attention
