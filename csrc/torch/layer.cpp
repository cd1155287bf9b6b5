#include "torch/layer.h"

#include <ATen/Functions.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

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
  const at::DeviceType device = x.device().type();
  const at::ScalarType dtype =
      at::autocast::is_autocast_enabled(device) ? at::autocast::get_autocast_dtype(device) : x.scalar_type();
  return is_number_of_ours(dtype, x.is_cpu()) ? std::optional(dtype) : std::nullopt;
}

// Whether a tensor may take part beside x: autocast casts what is not fp64, nobody else casts.
bool goes_with(const Tensor& x, at::ScalarType dtype, const Tensor& other) {
  if (!is_ordinary(other) || other.device() != x.device()) return false;
  const at::ScalarType own = other.scalar_type();
  if (!at::autocast::is_autocast_enabled(x.device().type())) return own == dtype;
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

bool can_rotate(const Tensor& x, const Tensor& freqs, at::IntArrayRef shape) {
  return is_ordinary(freqs) && freqs.is_complex() && !freqs.requires_grad() && freqs.device() == x.device() &&
         freqs.dim() == 3 && (freqs.size(0) == 1 || freqs.size(0) == x.size(0)) && freqs.size(1) == x.size(1) &&
         shape[4] % 2 == 0 && freqs.size(2) == shape[4] / 2;
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
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
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

std::optional<variable_list> run_layer(const Tensor& x, const LinearMaps& in, const LinearMaps& out,
                                       const std::optional<Tensor>& freqs,
                                       const std::optional<Tensor>& key_padding_mask, const LayerCall& call) {
  const PackedCall& attention = call.attention;
  const at::IntArrayRef shape = attention.shapes[0];
  const int64_t channels = shape[3] * shape[4];
  const std::optional<at::ScalarType> dtype = dtype_of(x);
  if (!dtype || is_mapped() || !goes_with(x, *dtype, x) || x.dim() != 3 || x.size(0) != shape[0] ||
      !fits(in, x, *dtype, x.size(2), 3 * channels) || !fits(out, x, *dtype, channels, out.weights[0].size(0)) ||
      (freqs && !can_rotate(x, *freqs, shape))) {
    return {};
  }
  const LinearMap into = joined(in), out_of = joined(out);
  variable_list given{x, into.weight, out_of.weight};
  for (const LinearMap* map : {&into, &out_of}) {
    if (map->bias) given.push_back(*map->bias);
  }
  variable_list cast = cast_all(given, *dtype);
  variable_list cast_in{std::move(cast[0]), std::move(cast[1])}, cast_out{Tensor(), std::move(cast[2])};
  if (into.bias) cast_in.push_back(std::move(cast[3]));
  if (out_of.bias) cast_out.push_back(std::move(cast.back()));
  variable_list buffers = project_cast(x, into.weight, into.bias, call.parts, cast_in);
  cast_in.clear();  // cast tokens take as much memory as the output
  const std::optional<Tensor> pairs = freqs ? std::optional(as_pairs(*freqs, *dtype)) : std::nullopt;
  const std::optional<Tensor> seed = attention.dropout_p > 0 ? std::optional(draw_seed(x)) : std::nullopt;
  variable_list attended =
      attend_in_place(buffers, OptionalTensors(buffers.size(), pairs), key_padding_mask, seed, attention);
  cast_out[0] = attended[0];
  const ProjectedPart all{0, out_of.weight.size(0), std::nullopt};
  variable_list result = project_cast(attended[0], out_of.weight, out_of.bias, {all}, cast_out);
  // Each buffer was rotated or normalised, and what came of it is the part of the graph. Values were not normalised.
  const bool is_normalised = attention.normalised[0] > 0;
  if (freqs || is_normalised) result.insert(result.end(), attended.begin() + 1, attended.end());
  if (!freqs || is_normalised) result.insert(result.end(), buffers.begin(), buffers.end());
  return result;
}

}  // namespace mixed_attention
