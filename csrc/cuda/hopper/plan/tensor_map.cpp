#include "cuda/hopper/plan/tensor_map.h"

#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <array>
#include <limits>
#include <stdexcept>
#include <string>

#include "cuda/common/check.h"
#include "cuda/hopper/config.h"

namespace mixed_attention::cuda::hopper {
namespace {

constexpr int64_t kElementBytes = 2;
constexpr int64_t kAlignment = 16;
constexpr int64_t kMaxStride = int64_t{1} << 40;

// From the driver that the process has loaded: nothing to link against.
PFN_cuTensorMapEncodeTiled_v12000 encode_function() {
  static const auto function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found),
          "cudaGetDriverEntryPointByVersion");
    if (found != cudaDriverEntryPointSuccess)
      throw std::runtime_error("this CUDA driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
  }();
  return function;
}

// One dimension of a map: how many, how far apart, and how many of them a tile takes.
struct Dimension {
  int64_t extent, stride_bytes, box;
};

template <size_t kOuter>
CUtensorMap encode(const void* base, DType dtype, int64_t head_dim, int columns,
                   const std::array<Dimension, kOuter>& outer) {
  cuuint64_t extents[1 + kOuter] = {static_cast<cuuint64_t>(head_dim)};
  cuuint32_t box[1 + kOuter] = {static_cast<cuuint32_t>(columns)};
  cuuint32_t steps[1 + kOuter] = {1};
  cuuint64_t strides[kOuter];
  for (size_t i = 0; i < kOuter; ++i) {
    extents[i + 1] = outer[i].extent;
    box[i + 1] = outer[i].box;
    steps[i + 1] = 1;
    // The stride of a single entry is never used and may be anything, which the encoder would refuse.
    strides[i] = outer[i].extent > 1 ? outer[i].stride_bytes : kAlignment;
  }
  CUtensorMap map;
  const CUresult status = encode_function()(
      &map, dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 1 + kOuter,
      const_cast<void*>(base), extents, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      columns == kSlabColumns ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled failed with " + std::to_string(status));
  return map;
}

Dimension heads(const TensorView& tensor) { return {tensor.num_heads, tensor.strides.head * kElementBytes, 1}; }

// One sequence that serves all is a single entry.
Dimension batches(const TensorView& tensor) {
  return {tensor.strides.batch == 0 ? 1 : tensor.batch_size, tensor.strides.batch * kElementBytes, 1};
}

bool can_map_stride(int64_t extent, int64_t stride) {
  const int64_t bytes = stride * kElementBytes;
  return extent <= 1 || (bytes > 0 && bytes % kAlignment == 0 && bytes < kMaxStride);
}

}  // namespace

bool can_map(const TensorView& tensor) {
  constexpr int64_t kMaxExtent = std::numeric_limits<int>::max() / 2;
  const Strides& strides = tensor.strides;
  return reinterpret_cast<uintptr_t>(tensor.data) % kAlignment == 0 && tensor.seqlen > 0 &&
         tensor.seqlen < kMaxExtent && tensor.num_heads < kMaxExtent && tensor.batch_size < kMaxExtent &&
         can_map_stride(tensor.seqlen, strides.row) && can_map_stride(tensor.num_heads, strides.head) &&
         (strides.batch == 0 || can_map_stride(tensor.batch_size, strides.batch));
}

bool can_store(const void* data, const Strides& strides, int64_t element_bytes) {
  const int64_t chunk = kAlignment / element_bytes;
  return reinterpret_cast<uintptr_t>(data) % kAlignment == 0 && strides.batch % chunk == 0 &&
         strides.row % chunk == 0 && strides.head % chunk == 0;
}

CUtensorMap make_tile_map(const TensorView& tensor, int block_rows, int columns) {
  const Dimension rows{tensor.seqlen, tensor.strides.row * kElementBytes, block_rows};
  return encode<3>(tensor.data, tensor.dtype, tensor.head_dim, columns, {rows, heads(tensor), batches(tensor)});
}

CUtensorMap make_clipped_tile_map(const TensorView& tensor, int block_rows, int columns) {
  const int64_t row_bytes = tensor.seqlen > 1 ? tensor.strides.row * kElementBytes : kAlignment;
  const Dimension rows_of_tile{block_rows, row_bytes, block_rows};
  const Dimension first_row{tensor.seqlen + 1, row_bytes, 1};
  return encode<4>(static_cast<const char*>(tensor.data) - block_rows * row_bytes, tensor.dtype, tensor.head_dim,
                   columns, {rows_of_tile, first_row, heads(tensor), batches(tensor)});
}

}  // namespace mixed_attention::cuda::hopper
