// Rotation with its tangents, and the gradient of both: every row of a head is read from memory once. The formulas are
// those of cpu/simd/rope_derivatives_kernel.h.
#include <cstdint>
#include <type_traits>

#include "ceil_div.h"
#include "cuda/common/check.h"
#include "cuda/common/pairs.cuh"
#include "cuda/launch.h"

namespace mixed_attention::cuda {
namespace {

// Neighbouring complex numbers of a row in the arithmetic's type.
template <class Real, int kPairs>
struct Numbers {
  Real x[2 * kPairs];

  __device__ static Numbers zero() {
    Numbers result;
#pragma unroll
    for (Real& each : result.x) each = 0;
    return result;
  }

  // Adds a b, or conj(a) b; sign is that of the imaginary parts of a.
  __device__ void add_products(const Numbers& a, Real sign, const Numbers& b) {
#pragma unroll
    for (int i = 0; i < 2 * kPairs; i += 2) {
      const Real a_im = sign * a.x[i + 1];
      x[i] += a.x[i] * b.x[i] - a_im * b.x[i + 1];
      x[i + 1] += a.x[i] * b.x[i + 1] + a_im * b.x[i];
    }
  }

  __device__ void conjugate() {
#pragma unroll
    for (int i = 1; i < 2 * kPairs; i += 2) x[i] = -x[i];
  }
};

// What a thread computes in, and how it moves it: kPairs pairs of a row at a time.
template <class Element, int kPairs, bool kAligned>
struct Rows {
  using Real = std::conditional_t<std::is_same_v<Element, double>, double, float>;
  using Vector = Pairs<Element, kPairs, kAligned>;
  using Values = Numbers<Real, kPairs>;

  __device__ static Values load(const void* data, int64_t offset) {
    const Vector pairs = *reinterpret_cast<const Vector*>(static_cast<const Element*>(data) + offset);
    Values result;
#pragma unroll
    for (int i = 0; i < 2 * kPairs; ++i) result.x[i] = static_cast<Real>(pairs.x[i]);
    return result;
  }

  __device__ static void store(void* data, int64_t offset, const Values& values) {
    Vector pairs;
#pragma unroll
    for (int i = 0; i < 2 * kPairs; ++i) pairs.x[i] = static_cast<Element>(values.x[i]);
    *reinterpret_cast<Vector*>(static_cast<Element*>(data) + offset) = pairs;
  }

  __device__ static Values load_freqs(const void* data, int64_t offset) {
    Values result;
#pragma unroll
    for (int i = 0; i < 2 * kPairs; ++i) result.x[i] = static_cast<const Real*>(data)[offset + i];
    return result;
  }

  __device__ static void store_freqs(void* data, int64_t offset, const Values& values) {
#pragma unroll
    for (int i = 0; i < 2 * kPairs; ++i) static_cast<Real*>(data)[offset + i] = values.x[i];
  }
};

// The place of a thread: kPairs pairs of one row, for all heads.
struct Place {
  int64_t batch, row, col;
  bool exists;

  __device__ Place(const RopeParams& params, int64_t batches, int pairs) {
    const int64_t per_row = params.head_dim / (2 * pairs);
    const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    exists = index < batches * params.seqlen * per_row;
    if (!exists) return;  // nothing to divide by, perhaps
    col = index % per_row * 2 * pairs;
    row = index / per_row % params.seqlen;
    batch = index / per_row / params.seqlen;
  }

  __device__ int64_t of(const Strides& strides, int64_t batch_idx) const {
    return batch_idx * strides.batch + row * strides.row + col;
  }
  __device__ int64_t of_freqs(const RopeJvpParams& params, int64_t batch_idx) const {
    return batch_idx * params.freqs_batch_stride + row * params.freqs_row_stride + col;
  }
  __device__ int64_t of_freqs_dot(const RopeJvpParams& params, int64_t direction, int64_t batch_idx) const {
    return direction * params.freqs_dot_step + batch_idx * params.freqs_dot_batch_stride +
           row * params.freqs_dot_row_stride + col;
  }
};

template <class Element, int kPairs, bool kAligned>
__global__ void rope_jvp_kernel(const __grid_constant__ RopeJvpParams params) {
  using Access = Rows<Element, kPairs, kAligned>;
  using Values = typename Access::Values;
  const Place place(params, params.batch_size, kPairs);
  if (!place.exists) return;
  const typename Access::Real sign = params.conjugate ? -1 : 1;
  const Values freqs = Access::load_freqs(params.freqs, place.of_freqs(params, place.batch));
  for (int64_t head = 0; head < params.num_heads; ++head) {
    const Values x = Access::load(params.x, place.of(params.x_strides, place.batch) + head * params.x_strides.head);
    if (params.out != nullptr) {
      Values out = Values::zero();
      out.add_products(freqs, sign, x);
      Access::store(params.out, place.of(params.out_strides, place.batch) + head * params.out_strides.head, out);
    }
    for (int t = 0; t < params.count; ++t) {
      Values out_dot = Values::zero();
      if (params.x_dot != nullptr) {
        const int64_t offset = t * params.x_dot_step + place.of(params.x_dot_strides, place.batch);
        out_dot.add_products(freqs, sign, Access::load(params.x_dot, offset + head * params.x_dot_strides.head));
      }
      if (params.freqs_dot != nullptr) {
        // Out of the cache, but for the first head.
        const int64_t offset = place.of_freqs_dot(params, t, place.batch);
        out_dot.add_products(Access::load_freqs(params.freqs_dot, offset), sign, x);
      }
      const int64_t offset = t * params.out_dot_step + place.of(params.out_dot_strides, place.batch);
      Access::store(params.out_dot, offset + head * params.out_dot_strides.head, out_dot);
    }
  }
}

// One thread has the sums over all that share a frequency, so that their order is always the same: heads, and the batch
// where one sequence serves it.
template <class Element, int kPairs, bool kAligned>
__global__ void rope_backward_kernel(const __grid_constant__ RopeBwdParams params) {
  using Access = Rows<Element, kPairs, kAligned>;
  using Values = typename Access::Values;
  using Real = typename Access::Real;
  const int64_t batches = params.shares_freqs ? 1 : params.batch_size;
  const Place place(params, batches, kPairs);
  if (!place.exists) return;
  const Real sign = params.conjugate ? -1 : 1;
  const auto for_each_row = [&](const auto& run) {
    const int64_t end = params.shares_freqs ? params.batch_size : place.batch + 1;
    for (int64_t batch = place.batch; batch < end; ++batch) {
      for (int64_t head = 0; head < params.num_heads; ++head) run(batch, head);
    }
  };
  const auto load = [&](const void* data, const Strides& strides, int64_t batch, int64_t head) {
    return Access::load(data, place.of(strides, batch) + head * strides.head);
  };
  const auto load_dot = [&](const void* data, const Strides& strides, int64_t step, int t, int64_t batch,
                            int64_t head) {
    return Access::load(data, t * step + place.of(strides, batch) + head * strides.head);
  };
  const Strides contiguous{params.seqlen * params.num_heads * params.head_dim, params.num_heads * params.head_dim,
                           params.head_dim};
  const auto place_of_freqs = [&](int t) {
    return ((t * batches + place.batch) * params.seqlen + place.row) * params.head_dim + place.col;
  };
  const auto store_freqs = [&](void* data, int t, Values values) {
    if (params.conjugate) values.conjugate();  // as what they are gradients of
    Access::store_freqs(data, place_of_freqs(t), values);
  };

  Values dfreqs = Values::zero();
  if (params.dx_dot != nullptr || params.dfreqs_dot != nullptr ||
      (params.dfreqs != nullptr && params.x_dot != nullptr)) {
    for (int t = 0; t < params.count; ++t) {
      Values dfreqs_dot = Values::zero();
      for_each_row([&](int64_t batch, int64_t head) {
        if (params.dout_dot == nullptr) {
          if (params.dx_dot != nullptr) {
            Access::store(
                params.dx_dot,
                t * params.batch_size * contiguous.batch + place.of(contiguous, batch) + head * contiguous.head,
                Values::zero());
          }
          return;
        }
        const Values dout_dot =
            load_dot(params.dout_dot, params.dout_dot_strides, params.dout_dot_step, t, batch, head);
        if (params.dx_dot != nullptr) {
          Values dx_dot = Values::zero();
          dx_dot.add_products(Access::load_freqs(params.freqs, place.of_freqs(params, batch)), -sign, dout_dot);
          Access::store(params.dx_dot,
                        t * params.batch_size * contiguous.batch + place.of(contiguous, batch) + head * contiguous.head,
                        dx_dot);
        }
        if (params.dfreqs_dot != nullptr) {
          dfreqs_dot.add_products(load(params.x, params.x_strides, batch, head), Real(-1), dout_dot);
        }
        if (params.dfreqs != nullptr && params.x_dot != nullptr) {
          dfreqs.add_products(load_dot(params.x_dot, params.x_dot_strides, params.x_dot_step, t, batch, head), Real(-1),
                              dout_dot);
        }
      });
      if (params.dfreqs_dot != nullptr) store_freqs(params.dfreqs_dot, t, dfreqs_dot);
    }
  }
  // What was read above comes out of the cache here.
  for_each_row([&](int64_t batch, int64_t head) {
    Values dx = Values::zero();
    if (params.dout != nullptr) {
      const Values dout = load(params.dout, params.dout_strides, batch, head);
      if (params.dx != nullptr) {
        dx.add_products(Access::load_freqs(params.freqs, place.of_freqs(params, batch)), -sign, dout);
      }
      if (params.dfreqs != nullptr) dfreqs.add_products(load(params.x, params.x_strides, batch, head), Real(-1), dout);
    }
    if (params.dx == nullptr) return;
    if (params.dout_dot != nullptr && params.freqs_dot != nullptr) {
      for (int t = 0; t < params.count; ++t) {
        dx.add_products(Access::load_freqs(params.freqs_dot, place.of_freqs_dot(params, t, batch)), -sign,
                        load_dot(params.dout_dot, params.dout_dot_strides, params.dout_dot_step, t, batch, head));
      }
    }
    Access::store(params.dx, place.of(contiguous, batch) + head * contiguous.head, dx);
  });
  if (params.dfreqs != nullptr) store_freqs(params.dfreqs, 0, dfreqs);
}

template <class Params>
void launch(void (*kernel)(Params), const Params& params, int64_t batches, int pairs, const char* name) {
  constexpr int kBlock = 128;
  const int64_t threads = batches * params.seqlen * (params.head_dim / (2 * pairs));
  if (threads == 0) return;
  kernel<<<static_cast<unsigned>(ceil_div(threads, kBlock)), kBlock, 0, static_cast<cudaStream_t>(params.stream)>>>(
      params);
  check(cudaGetLastError(), name);
}

// The alignment of what both read.
template <class Element>
Alignment<Element> alignment_of(const RopeJvpParams& params) {
  return Alignment<Element>(params.head_dim)
      .add(params.x, params.x_strides)
      .add(params.x_dot, params.x_dot_strides, params.x_dot_step);
}

}  // namespace

void run_rope_jvp(const RopeJvpParams& params) {
  run_with_element(params.dtype, [&](auto element) {
    using Element = decltype(element);
    constexpr int kPairs = kPairsAtOnce<Element>;
    Alignment<Element> alignment = alignment_of<Element>(params);
    alignment.add(params.out, params.out_strides).add(params.out_dot, params.out_dot_strides, params.out_dot_step);
    const auto run = [&](void (*kernel)(RopeJvpParams), int pairs) {
      launch(kernel, params, params.num_heads == 0 ? 0 : params.batch_size, pairs, "rope_jvp_kernel");
    };
    alignment.holds ? run(rope_jvp_kernel<Element, kPairs, true>, kPairs) : run(rope_jvp_kernel<Element, 1, false>, 1);
  });
}

void run_rope_backward(const RopeBwdParams& params) {
  run_with_element(params.dtype, [&](auto element) {
    using Element = decltype(element);
    constexpr int kPairs = kPairsAtOnce<Element>;
    const Strides contiguous{0, 0, params.head_dim};
    Alignment<Element> alignment = alignment_of<Element>(params);
    alignment.add(params.dout, params.dout_strides).add(params.dout_dot, params.dout_dot_strides, params.dout_dot_step);
    alignment.add(params.dx, contiguous).add(params.dx_dot, contiguous);
    const auto run = [&](void (*kernel)(RopeBwdParams), int pairs) {
      launch(kernel, params, params.shares_freqs ? 1 : params.batch_size, pairs, "rope_backward_kernel");
    };
    alignment.holds ? run(rope_backward_kernel<Element, kPairs, true>, kPairs)
                    : run(rope_backward_kernel<Element, 1, false>, 1);
  });
}

}  // namespace mixed_attention::cuda
