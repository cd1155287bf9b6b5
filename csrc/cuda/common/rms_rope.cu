// Rows of a head over their root mean square, then rotated, and the derivative of both.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "ceil_div.h"
#include "cuda/common/check.h"
#include "cuda/common/pairs.cuh"
#include "cuda/launch.h"

namespace mixed_attention::cuda {
namespace {

constexpr int kWarp = 32;

__device__ inline float inverse_root(float x) { return rsqrtf(x); }
__device__ inline double inverse_root(double x) { return rsqrt(x); }

// Sums over neighbouring lanes, a power of two of them.
template <class Real>
__device__ inline Real sum_over(int lanes, Real x) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xFFFFFFFF, x, distance);
  return x;
}

// `lanes` neighbouring threads take a row of a head, chunk by chunk, twice: the second time out of the cache. Each
// writes what it alone has read, so that results may lie where the rows did.
template <class Element, int kPairs, bool kAligned, bool kDerivative>
__global__ void rms_rope_kernel(const __grid_constant__ RmsRopeParams params, int lanes) {
  using Real = std::conditional_t<std::is_same_v<Element, double>, double, float>;
  using Vector = Pairs<Element, kPairs, kAligned>;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t index = thread / lanes;
  const bool is_row = index < params.batch_size * params.seqlen * params.num_heads;
  const int64_t head = index % params.num_heads, row = index / params.num_heads % params.seqlen;
  const int64_t batch = index / params.num_heads / params.seqlen;
  // Threads behind the last row only take part in the sums.
  const int first = is_row ? static_cast<int>(thread % lanes) * 2 * kPairs : static_cast<int>(params.head_dim);

  const auto place = [&](const Strides& strides) {
    return batch * strides.batch + row * strides.row + head * strides.head;
  };
  const Element* x = static_cast<const Element*>(params.x) + place(params.x_strides);
  const Element* divided = kDerivative ? static_cast<const Element*>(params.rows) + place(params.rows_strides) : x;
  Element* out = static_cast<Element*>(params.out) + place(params.out_strides);
  const Real* freqs = static_cast<const Real*>(params.freqs);
  if (freqs != nullptr) freqs += batch * params.freqs_batch_stride + row * params.freqs_row_stride;
  const Real sign = params.conjugate ? -1 : 1;

  const auto rotated = [&](const Vector& pairs, int col, int i, Real& even, Real& odd) {
    const Real re = static_cast<Real>(pairs.x[2 * i]), im = static_cast<Real>(pairs.x[2 * i + 1]);
    const Real cos = freqs == nullptr ? Real(1) : freqs[col + 2 * i];
    const Real sin = freqs == nullptr ? Real(0) : sign * freqs[col + 2 * i + 1];
    even = re * cos - im * sin;
    odd = re * sin + im * cos;
  };

  Real squares = 0, dot = 0;
  for (int col = first; col < params.head_dim; col += lanes * 2 * kPairs) {
    const Vector values = *reinterpret_cast<const Vector*>(divided + col);
#pragma unroll
    for (int i = 0; i < 2 * kPairs; ++i) squares += static_cast<Real>(values.x[i]) * static_cast<Real>(values.x[i]);
    if constexpr (kDerivative) {
      const Vector gradient = *reinterpret_cast<const Vector*>(x + col);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        Real even, odd;
        rotated(gradient, col, i, even, odd);
        dot += even * static_cast<Real>(values.x[2 * i]) + odd * static_cast<Real>(values.x[2 * i + 1]);
      }
    }
  }
  const Real size = static_cast<Real>(params.head_dim);
  const Real eps = std::numeric_limits<Real>::epsilon();
  const Real rstd = inverse_root(sum_over(lanes, squares) / size + eps);
  // The derivative takes back what lies along the row.
  const Real along = kDerivative ? sum_over(lanes, dot) / size * rstd * rstd * rstd : Real(0);

  for (int col = first; col < params.head_dim; col += lanes * 2 * kPairs) {
    Vector pairs = *reinterpret_cast<const Vector*>(x + col), values;
    if constexpr (kDerivative) values = *reinterpret_cast<const Vector*>(divided + col);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      Real even, odd;
      rotated(pairs, col, i, even, odd);
      even *= rstd;
      odd *= rstd;
      if constexpr (kDerivative) {
        even -= static_cast<Real>(values.x[2 * i]) * along;
        odd -= static_cast<Real>(values.x[2 * i + 1]) * along;
      }
      pairs.x[2 * i] = static_cast<Element>(even);
      pairs.x[2 * i + 1] = static_cast<Element>(odd);
    }
    *reinterpret_cast<Vector*>(out + col) = pairs;
  }
}

template <class Element, int kPairs, bool kAligned>
void launch(const RmsRopeParams& params) {
  constexpr int kBlock = 128;
  const auto chunks = static_cast<unsigned>(params.head_dim / (2 * kPairs));
  const int lanes = std::min(kWarp, static_cast<int>(std::bit_ceil(chunks)));
  const int64_t threads = params.batch_size * params.seqlen * params.num_heads * lanes;
  const auto blocks = static_cast<unsigned>(ceil_div(threads, kBlock));
  const auto stream = static_cast<cudaStream_t>(params.stream);
  params.rows == nullptr
      ? rms_rope_kernel<Element, kPairs, kAligned, false><<<blocks, kBlock, 0, stream>>>(params, lanes)
      : rms_rope_kernel<Element, kPairs, kAligned, true><<<blocks, kBlock, 0, stream>>>(params, lanes);
  check(cudaGetLastError(), "rms_rope_kernel");
}

template <class Element>
void run(const RmsRopeParams& params) {
  Alignment<Element> alignment(params.head_dim);
  alignment.add(params.x, params.x_strides).add(params.out, params.out_strides).add(params.rows, params.rows_strides);
  alignment.holds ? launch<Element, kPairsAtOnce<Element>, true>(params) : launch<Element, 1, false>(params);
}

}  // namespace

void run_rms_rope(const RmsRopeParams& params) {
  if (params.batch_size * params.seqlen * params.num_heads * params.head_dim == 0) return;
  run_with_element(params.dtype, [&](auto element) { run<decltype(element)>(params); });
}

}  // namespace mixed_attention::cuda
