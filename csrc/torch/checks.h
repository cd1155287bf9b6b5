// Checks whose messages name the argument, what was expected and what was got.
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>

#include "torch/memory.h"
#include "torch/torch_internals.h"

namespace mixed_attention {

using Named = std::pair<const char*, const at::Tensor*>;

inline void check_dense(const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_NOT_IMPLEMENTED(tensor.layout() == at::kStrided && !tensor.is_quantized() && !tensor.is_nested(), name,
                              ": expected a dense tensor, got one that is ",
                              tensor.is_quantized() ? "quantized"
                              : tensor.is_nested()  ? "nested"
                                                    : c10::str("of layout ", tensor.layout()));
}

inline void check_rank(const char* name, const at::Tensor& tensor, int64_t rank, const char* shape) {
  TORCH_CHECK_VALUE(tensor.dim() == rank, name, ": expected shape ", shape, ", got ", tensor.sym_sizes());
}

inline void check_shape(const char* name, const at::Tensor& tensor, at::IntArrayRef expected, const char* why) {
  TORCH_CHECK_VALUE(tensor.sizes() == expected, name, ": expected shape ", expected, " ", why, ", got ",
                    tensor.sizes());
}

inline void check_dtype(const char* name, const at::Tensor& tensor, at::ScalarType expected, const char* why) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == expected, name, ": expected dtype ", expected, " ", why, ", got ",
                    tensor.scalar_type());
}

inline void check_device(const char* name, const at::Tensor& tensor, at::Device expected, const char* why) {
  TORCH_CHECK_VALUE(tensor.device() == expected, name, ": expected device ", expected, " ", why, ", got ",
                    tensor.device());
}

// A storage can be freed or made smaller under a tensor that stays, as those who shard parameters do.
inline void check_memory(const char* name, const at::Tensor& tensor) {
  if (tensor.numel() == 0) return;
  int64_t last = tensor.storage_offset();
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) last += (tensor.size(dim) - 1) * tensor.stride(dim);
  const size_t expected = (static_cast<size_t>(last) + 1) * tensor.element_size();
  const size_t got = tensor.storage().data() == nullptr ? 0 : tensor.storage().nbytes();
  TORCH_CHECK_VALUE(got >= expected, name, ": expected a storage of at least ", expected, " bytes, got ", got,
                    "; it was freed or made smaller");
}

// What is written may share memory with nothing else, nor one element with another. NOTE: after check_memory. Pointers
// for writing come first: a lazy copy gets memory of its own by them.
inline void check_overlap(c10::ArrayRef<Named> written, c10::ArrayRef<Named> read) {
  c10::SmallVector<std::pair<const char*, Footprint>, 12> footprints;
  const auto add = [&](const Named& named, const void* data) {
    const auto& [name, tensor] = named;
    footprints.emplace_back(name, Footprint(data, tensor->sizes(), tensor->strides(), tensor->element_size()));
  };
  for (const Named& each : written) add(each, each.second->mutable_data_ptr());
  for (const Named& each : read) add(each, each.second->const_data_ptr());
  for (size_t i = 0; i < written.size(); ++i) {
    const auto& [name, footprint] = footprints[i];
    TORCH_CHECK_VALUE(!footprint.overlaps_itself(), name, ": expected elements with memory of their own, got strides ",
                      written[i].second->strides(), " for shape ", written[i].second->sizes());
    for (size_t j = i + 1; j < footprints.size(); ++j) {
      TORCH_CHECK_VALUE(!footprint.overlaps(footprints[j].second), name, ": expected memory of its own, but ",
                        footprints[j].first, " lies there, too");
    }
  }
}

}  // namespace mixed_attention
