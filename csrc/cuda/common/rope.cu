// Rotation: every pair of neighbouring channels, read as a complex number, times its frequency.
#include <cstdint>
#include <type_traits>

#include "ceil_div.h"
#include "cuda/common/check.h"
#include "cuda/common/pairs.cuh"
#include "cuda/launch.h"

namespace mixed_attention::cuda {
namespace {

// One thread rotates kPairs pairs of one row for all heads: they share the frequencies.
template <class Element, int kPairs, bool kAligned>
__global__ void rope_kernel(const __grid_constant__ RopeParams params) {
  using Real = std::conditional_t<std::is_same_v<Element, double>, double, float>;
  using Vector = Pairs<Element, kPairs, kAligned>;
  const int64_t per_row = params.head_dim / (2 * kPairs);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= params.batch_size * params.seqlen * per_row) return;
  const int64_t col = index % per_row * 2 * kPairs, row = index / per_row % params.seqlen;
  const int64_t batch = index / per_row / params.seqlen;

  const Real* freqs =
      static_cast<const Real*>(params.freqs) + batch * params.freqs_batch_stride + row * params.freqs_row_stride + col;
  Real cos[kPairs], sin[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    cos[i] = freqs[2 * i];
    sin[i] = params.conjugate ? -freqs[2 * i + 1] : freqs[2 * i + 1];
  }
  const Element* x =
      static_cast<const Element*>(params.x) + batch * params.x_strides.batch + row * params.x_strides.row + col;
  Element* out =
      static_cast<Element*>(params.out) + batch * params.out_strides.batch + row * params.out_strides.row + col;
  for (int64_t head = 0; head < params.num_heads; ++head) {
    Vector pairs = *reinterpret_cast<const Vector*>(x + head * params.x_strides.head);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const Real even = static_cast<Real>(pairs.x[2 * i]), odd = static_cast<Real>(pairs.x[2 * i + 1]);
      pairs.x[2 * i] = static_cast<Element>(even * cos[i] - odd * sin[i]);
      pairs.x[2 * i + 1] = static_cast<Element>(even * sin[i] + odd * cos[i]);
    }
    *reinterpret_cast<Vector*>(out + head * params.out_strides.head) = pairs;
  }
}

template <class Element, int kPairs, bool kAligned>
void launch(const RopeParams& params) {
  const int64_t threads = params.batch_size * params.seqlen * (params.head_dim / (2 * kPairs));
  constexpr int kBlock = 128;
  rope_kernel<Element, kPairs, kAligned>
      <<<static_cast<unsigned>(ceil_div(threads, kBlock)), kBlock, 0, static_cast<cudaStream_t>(params.stream)>>>(
          params);
  check(cudaGetLastError(), "rope_kernel");
}

template <class Element>
void run(const RopeParams& params) {
  Alignment<Element> alignment(params.head_dim);
  alignment.add(params.x, params.x_strides).add(params.out, params.out_strides);
  alignment.holds ? launch<Element, kPairsAtOnce<Element>, true>(params) : launch<Element, 1, false>(params);
}

}  // namespace

void run_rope(const RopeParams& params) {
  if (params.batch_size * params.seqlen * params.num_heads * params.head_dim == 0) return;
  run_with_element(params.dtype, [&](auto element) { run<decltype(element)>(params); });
}

}  // namespace mixed_attention::cuda
