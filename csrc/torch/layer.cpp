#include "torch/layer.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "kernels.h"

namespace mixed_attention {
namespace {

using at::Tensor;
using variable_list = std::vector<Tensor>;

bool is_number_of_ours(at::ScalarType dtype, bool is_cpu) {
  return dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16 || (is_cpu && dtype == at::kDouble);
}

// A dense tensor that no transform has wrapped.
bool is_ordinary(const Tensor& tensor) {
  return tensor.layout() == at::kStrided && !tensor.is_nested() && !tensor.is_quantized() && !is_transformed(tensor);
}

// The dtype that a layer over tokens computes in: autocast's or its own; none where no kernel serves it.
std::optional<at::ScalarType> dtype_of(const Tensor& x) {
  if (!x.is_cpu() && !(x.is_cuda() && kernels::are_there())) return {};
  const at::ScalarType dtype = autocast_dtype(x.device().type()).value_or(x.scalar_type());
  return is_number_of_ours(dtype, x.is_cpu()) ? std::optional(dtype) : std::nullopt;
}

// Whether a tensor may take part beside x: autocast casts what is not fp64, nobody else casts.
bool goes_with(const Tensor& x, at::ScalarType dtype, const Tensor& other) {
  if (!is_ordinary(other) || other.device() != x.device()) return false;
  const at::ScalarType own = other.scalar_type();
  if (!autocast_dtype(x.device().type())) return own == dtype;
  return own == at::kFloat || own == at::kHalf || own == at::kBFloat16;
}

// Whether maps take so many channels to so many rows, equal shares of them. The tensors of several have one dtype.
bool fits(const LinearMaps& maps, const Tensor& x, at::ScalarType dtype, int64_t channels, int64_t num_rows) {
  const at::ScalarType first = maps.weights[0].scalar_type();
  for (size_t i = 0; i < maps.weights.size(); ++i) {
    const Tensor& weight = maps.weights[i];
    if (!goes_with(x, dtype, weight) || weight.dim() != 2 || weight.size(1) != channels) return false;
    const std::optional<Tensor>& bias = maps.biases[i];
    if (bias && (!goes_with(x, dtype, *bias) || bias->dim() != 1 || bias->size(0) != weight.size(0))) return false;
    if (maps.weights.size() > 1 && (weight.scalar_type() != first || (bias && bias->scalar_type() != first))) {
      return false;
    }
    if (weight.size(0) * static_cast<int64_t>(maps.weights.size()) != num_rows) return false;
  }
  return true;
}

bool can_rotate(const Tensor& x, const Tensor& freqs, int64_t head_dim) {
  return is_ordinary(freqs) && freqs.is_complex() && !freqs.requires_grad() && freqs.device() == x.device() &&
         freqs.dim() == 3 && (freqs.size(0) == 1 || freqs.size(0) == x.size(0)) && freqs.size(1) == x.size(1) &&
         head_dim % 2 == 0 && freqs.size(2) == head_dim / 2;
}

// Complex frequencies as kernels take them: (..., 2) in fp32, or in fp64 beside fp64.
Tensor as_pairs(const Tensor& freqs, at::ScalarType dtype) {
  const Tensor exact = freqs.to(dtype == at::kDouble ? at::kComplexDouble : at::kComplexFloat);
  return at::view_as_real(exact.resolve_conj());
}

struct LinearMap {
  Tensor weight;
  std::optional<Tensor> bias;
};

LinearMap joined(const LinearMaps& maps) {
  if (maps.weights.size() == 1) return {maps.weights[0], maps.biases[0]};
  // NOTE: autocast would promote, and refuses numbers of 16 bits that are not its own.
  const WithoutAutocast no_autocast;
  LinearMap map{at::cat(maps.weights), std::nullopt};
  if (std::none_of(maps.biases.begin(), maps.biases.end(), [](const auto& bias) { return bias.has_value(); })) {
    return map;
  }
  variable_list biases;
  for (size_t i = 0; i < maps.biases.size(); ++i) {
    const Tensor& weight = maps.weights[i];
    biases.push_back(maps.biases[i] ? *maps.biases[i] : at::zeros({weight.size(0)}, weight.options()));
  }
  map.bias = at::cat(biases);
  return map;
}

// A seed for Philox from torch's own generator of the device, so that seeding, checkpointing and graphs work.
Tensor draw_seed(const Tensor& x) {
  return at::randint(std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max(), {1},
                     x.options().dtype(at::kLong));
}

}  // namespace

bool fits_layer(const Tensor& x, const LinearMaps& in, const LinearMaps& out, const std::optional<Tensor>& freqs,
                int64_t num_heads, int64_t head_dim) {
  const int64_t channels = num_heads * head_dim;
  const std::optional<at::ScalarType> dtype = dtype_of(x);
  return dtype && !is_mapped() && goes_with(x, *dtype, x) && x.dim() == 3 &&
         fits(in, x, *dtype, x.size(2), 3 * channels) && fits(out, x, *dtype, channels, out.weights[0].size(0)) &&
         (!freqs || can_rotate(x, *freqs, head_dim));
}

namespace {

// Tokens, weights and biases of a layer, cast together.
struct CastLayer {
  LinearMap into, out_of;
  std::optional<Tensor> pairs;      // frequencies as kernels take them
  variable_list cast_in, cast_out;  // tokens, weight, and bias if there is one, in the dtype of the layer

  Tensor project_out(const Tensor& attended) {
    cast_out[0] = attended;
    const ProjectedPart all{0, out_of.weight.size(0), std::nullopt};
    return project_cast(attended, out_of.weight, out_of.bias, {all}, cast_out)[0];
  }
};

// None, and nothing done, where this is no plain eager mode or something does not fit. shape: of the queries.
std::optional<CastLayer> cast_layer(const Tensor& x, const LinearMaps& in, const LinearMaps& out,
                                    const std::optional<Tensor>& freqs, at::IntArrayRef shape) {
  if (x.dim() != 3 || x.size(0) != shape[0] || !fits_layer(x, in, out, freqs, shape[3], shape[4])) return {};
  const std::optional<at::ScalarType> dtype = dtype_of(x);
  CastLayer layer{joined(in), joined(out), freqs ? std::optional(as_pairs(*freqs, *dtype)) : std::nullopt, {}, {}};
  variable_list given{x, layer.into.weight, layer.out_of.weight};
  for (const LinearMap* map : {&layer.into, &layer.out_of}) {
    if (map->bias) given.push_back(*map->bias);
  }
  variable_list cast = cast_all(given, *dtype);
  layer.cast_in = {std::move(cast[0]), std::move(cast[1])};
  layer.cast_out = {Tensor(), std::move(cast[2])};
  if (layer.into.bias) layer.cast_in.push_back(std::move(cast[3]));
  if (layer.out_of.bias) layer.cast_out.push_back(std::move(cast.back()));
  return layer;
}

std::optional<Tensor> seed_of(const Tensor& x, const PackedCall& call) {
  return call.dropout_p > 0 ? std::optional(draw_seed(x)) : std::nullopt;
}

}  // namespace

std::optional<variable_list> run_layer(const Tensor& x, const LinearMaps& in, const LinearMaps& out,
                                       const std::optional<Tensor>& freqs,
                                       const std::optional<Tensor>& key_padding_mask, const LayerCall& call) {
  std::optional<CastLayer> layer = cast_layer(x, in, out, freqs, call.attention.shapes[0]);
  if (!layer) return {};
  variable_list buffers = project_cast(x, layer->into.weight, layer->into.bias, call.parts, layer->cast_in);
  layer->cast_in.clear();  // cast tokens take as much memory as the output
  variable_list attended = attend_in_place(buffers, OptionalTensors(buffers.size(), layer->pairs), key_padding_mask,
                                           seed_of(x, call.attention), call.attention);
  variable_list result{layer->project_out(attended[0])};
  // Each buffer was rotated or normalised, and what came of it is the part of the graph. Values were not normalised.
  const bool is_normalised = call.attention.normalised[0] > 0;
  if (freqs || is_normalised) result.insert(result.end(), attended.begin() + 1, attended.end());
  if (!freqs || is_normalised) result.insert(result.end(), buffers.begin(), buffers.end());
  return result;
}

std::optional<variable_list> run_layer_over_ranks(const Tensor& x, const LinearMaps& in, const LinearMaps& out,
                                                  const std::optional<Tensor>& freqs, const SpreadLayerCall& call) {
  std::optional<CastLayer> layer = cast_layer(x, in, out, freqs, call.attention.here.shapes[0]);
  if (!layer) return {};
  variable_list buffers = project_cast(x, layer->into.weight, layer->into.bias, call.parts, layer->cast_in);
  layer->cast_in.clear();
  variable_list attended = attend_over_ranks(buffers, OptionalTensors(buffers.size(), layer->pairs),
                                             seed_of(x, call.attention.attention), call.attention);
  variable_list result{layer->project_out(attended[0])};
  if (freqs) buffers.assign(attended.begin() + 1, attended.end());
  result.insert(result.end(), buffers.begin(), buffers.end());
  return result;
}

}  // namespace mixed_attention
