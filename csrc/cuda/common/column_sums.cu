// The sums of a matrix' columns, as the gradient of a bias is one: by one launch and without memory for parts of sums.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "ceil_div.h"
#include "cuda/common/check.h"
#include "cuda/launch.h"

namespace mixed_attention::cuda {
namespace {

constexpr int kThreads = 1024, kWarp = 32, kWarps = kThreads / kWarp;
// A thread reads eight columns of a row at once, two neighbours a sector of memory; a warp reads sixteen rows.
constexpr int kVector = 8, kVectors = 2, kColumns = kVector * kVectors, kRows = kThreads / kVectors;
constexpr int kRowsInFlight = 8;  // of a thread

__device__ inline float2 as_floats(__nv_bfloat162 pair) { return __bfloat1622float2(pair); }
__device__ inline float2 as_floats(__half2 pair) { return __half22float2(pair); }

template <class Pair>
__device__ inline void add(float (&sums)[kVector], const uint4& vector) {
  const auto* pairs = reinterpret_cast<const Pair*>(&vector);
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    const float2 numbers = as_floats(pairs[i]);
    sums[2 * i] += numbers.x;
    sums[2 * i + 1] += numbers.y;
  }
}

// A block has all rows of its columns, so that equal calls add in equal order.
// NOTE: without the promise that a multiprocessor need not hold two blocks, ptxas spares registers for a second one,
// and makes each load only when the numbers of the one before are added.
template <class Pair>
__global__ void __launch_bounds__(kThreads, 1) column_sums_kernel(const __grid_constant__ ColumnSumsParams params) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x % kVectors * kVector;
  float sums[kVector] = {};
  if (column < params.num_columns) {
    const auto* rows = static_cast<const uint16_t*>(params.rows) + column;
    for (int64_t row = threadIdx.x / kVectors; row < params.num_rows; row += kRows * kRowsInFlight) {
      uint4 vectors[kRowsInFlight];
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        const int64_t place = row + i * kRows;
        vectors[i] = place < params.num_rows ? *reinterpret_cast<const uint4*>(rows + place * params.row_stride)
                                             : uint4{};  // zeros add nothing
      }
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) add<Pair>(sums, vectors[i]);
    }
  }

  __shared__ float of_warp[kWarps][kColumns];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
#pragma unroll
    for (int distance = kWarp / 2; distance >= kVectors; distance /= 2) {
      sums[i] += __shfl_xor_sync(0xffffffff, sums[i], distance);
    }
  }
  const int lane = threadIdx.x % kWarp;
  if (lane < kVectors) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) of_warp[threadIdx.x / kWarp][lane * kVector + i] = sums[i];
  }
  __syncthreads();
  const int64_t own = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  if (threadIdx.x >= kColumns || own >= params.num_columns) return;
  float sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += of_warp[warp][threadIdx.x];
  params.sums[own] = sum;
}

}  // namespace

void run_column_sums(const ColumnSumsParams& params) {
  if (params.num_columns == 0) return;
  const auto num_blocks = static_cast<unsigned>(ceil_div(params.num_columns, int64_t{kColumns}));
  const auto stream = static_cast<cudaStream_t>(params.stream);
  if (params.dtype == DType::kFloat16) {
    column_sums_kernel<__half2><<<num_blocks, kThreads, 0, stream>>>(params);
  } else {
    column_sums_kernel<__nv_bfloat162><<<num_blocks, kThreads, 0, stream>>>(params);
  }
  check(cudaGetLastError(), "column_sums_kernel");
}

}  // namespace mixed_attention::cuda
