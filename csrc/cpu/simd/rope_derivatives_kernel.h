// Rotation with its tangents, and the gradient of both: every row of a head is read from memory once.
//
// With pairs of channels for complex numbers, out = f x moves by out' = f x' + f' x. The gradients, for dout and dout',
// are dx = conj(f) dout + conj(f') dout', dx' = conj(f) dout', and of the frequencies, whose heads are summed,
// df = conj(x) dout + conj(x') dout' and df' = conj(x) dout'.
#pragma once

#include <algorithm>

#include "cpu/simd/convert.h"
#include "params.h"
#include "schedule.h"

namespace mixed_attention::cpu::MIXED_ATTENTION_ISA {

// sums += a b, or conj(a) b, with signs of the imaginary parts of a that may be turned: 1 or -1.
template <class A, class B, class Acc>
inline void add_products(const A* __restrict a, Acc sign, const B* __restrict b, int64_t size, Acc* __restrict sums) {
  for (int64_t i = 0; i < size; i += 2) {
    const Acc a_re = to_accumulator(a[i]), a_im = sign * to_accumulator(a[i + 1]);
    const Acc b_re = to_accumulator(b[i]), b_im = to_accumulator(b[i + 1]);
    sums[i] += a_re * b_re - a_im * b_im;
    sums[i + 1] += a_re * b_im + a_im * b_re;
  }
}

// Sums of products over some channels of a row, which are rounded once.
template <class Acc>
struct ChannelSums {
  static constexpr int64_t kMost = 64;

  Acc sums[kMost];
  int64_t size;

  explicit ChannelSums(int64_t count) : size(std::min(count, kMost)) { std::fill_n(sums, size, Acc(0)); }

  template <class Element>
  void write(Element* __restrict out) const {
    for (int64_t i = 0; i < size; ++i) from_accumulator(sums[i], out[i]);
  }
};

// A row of a head, in a tensor that may have directions in front.
template <class Element>
inline Element* row_of(void* data, const Strides& strides, int64_t step, int64_t direction, int64_t batch, int64_t row,
                       int64_t head) {
  if (data == nullptr) return nullptr;
  return static_cast<Element*>(data) + direction * step + batch * strides.batch + row * strides.row +
         head * strides.head;
}

template <class Element>
inline const Element* row_of(const void* data, const Strides& strides, int64_t step, int64_t direction, int64_t batch,
                             int64_t row, int64_t head) {
  return row_of<Element>(const_cast<void*>(data), strides, step, direction, batch, row, head);
}

// The frequencies of a row, and how they move.
template <class Acc>
struct RowFreqs {
  const Acc* still;
  const Acc* dot;  // of the first direction, or null
  int64_t step;

  RowFreqs(const RopeJvpParams& p, int64_t batch, int64_t row)
      : still(static_cast<const Acc*>(p.freqs) + batch * p.freqs_batch_stride + row * p.freqs_row_stride),
        dot(p.freqs_dot == nullptr ? nullptr
                                   : static_cast<const Acc*>(p.freqs_dot) + batch * p.freqs_dot_batch_stride +
                                         row * p.freqs_dot_row_stride),
        step(p.freqs_dot_step) {}
};

template <class Element>
void rope_jvp(const RopeJvpParams& p, int64_t batch, Range rows) {
  using Acc = Accumulator<Element>;
  const Acc sign = p.conjugate ? Acc(-1) : Acc(1);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const RowFreqs<Acc> freqs(p, batch, row);
    for (int64_t head = 0; head < p.num_heads; ++head) {
      const Element* x = row_of<Element>(p.x, p.x_strides, 0, 0, batch, row, head);
      Element* out = row_of<Element>(p.out, p.out_strides, 0, 0, batch, row, head);
      for (int64_t begin = 0; begin < p.head_dim; begin += ChannelSums<Acc>::kMost) {
        if (out != nullptr) {
          ChannelSums<Acc> sums(p.head_dim - begin);
          add_products(freqs.still + begin, sign, x + begin, sums.size, sums.sums);
          sums.write(out + begin);
        }
        for (int64_t t = 0; t < p.count; ++t) {
          ChannelSums<Acc> sums(p.head_dim - begin);
          if (p.x_dot != nullptr) {
            const Element* x_dot = row_of<Element>(p.x_dot, p.x_dot_strides, p.x_dot_step, t, batch, row, head);
            add_products(freqs.still + begin, sign, x_dot + begin, sums.size, sums.sums);
          }
          if (freqs.dot != nullptr) {
            add_products(freqs.dot + t * freqs.step + begin, sign, x + begin, sums.size, sums.sums);
          }
          sums.write(row_of<Element>(p.out_dot, p.out_dot_strides, p.out_dot_step, t, batch, row, head) + begin);
        }
      }
    }
  }
}

// Rows of contiguous gradients, one sequence of them for a direction.
template <class Element>
inline Element* gradient_row(void* data, int64_t direction, int64_t batch_size, int64_t batch, int64_t seqlen,
                             int64_t row, int64_t size) {
  if (data == nullptr) return nullptr;
  return static_cast<Element*>(data) + ((direction * batch_size + batch) * seqlen + row) * size;
}

template <class Element>
void rope_backward(const RopeBwdParams& p, int64_t first_batch, Range rows) {
  using Acc = Accumulator<Element>;
  // Gradients of what is conjugated are conjugated.
  const Acc sign = p.conjugate ? Acc(-1) : Acc(1);
  const int64_t end_batch = p.shares_freqs ? p.batch_size : first_batch + 1;
  const int64_t batches_of_freqs = p.shares_freqs ? 1 : p.batch_size;
  const int64_t width = p.num_heads * p.head_dim;
  const auto conjugate = [&](Acc* freqs) {
    for (int64_t i = 1; i < p.head_dim; i += 2) freqs[i] = -freqs[i];
  };
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const auto dfreqs_of = [&](void* data, int64_t direction) {
      return gradient_row<Acc>(data, direction, batches_of_freqs, first_batch, p.seqlen, row, p.head_dim);
    };
    Acc* dfreqs = dfreqs_of(p.dfreqs, 0);
    if (dfreqs != nullptr) std::fill_n(dfreqs, p.head_dim, Acc(0));
    for (int64_t t = 0; t < p.count && p.dfreqs_dot != nullptr; ++t) {
      std::fill_n(dfreqs_of(p.dfreqs_dot, t), p.head_dim, Acc(0));
    }
    for (int64_t batch = first_batch; batch < end_batch; ++batch) {
      const RowFreqs<Acc> freqs(p, batch, row);
      Element* dx_row = gradient_row<Element>(p.dx, 0, p.batch_size, batch, p.seqlen, row, width);
      for (int64_t head = 0; head < p.num_heads; ++head) {
        const Element* x = row_of<Element>(p.x, p.x_strides, 0, 0, batch, row, head);
        const Element* dout = row_of<Element>(p.dout, p.dout_strides, 0, 0, batch, row, head);
        for (int64_t begin = 0; begin < p.head_dim; begin += ChannelSums<Acc>::kMost) {
          ChannelSums<Acc> dx(p.head_dim - begin);
          if (dout != nullptr) {
            if (dx_row != nullptr) add_products(freqs.still + begin, -sign, dout + begin, dx.size, dx.sums);
            if (dfreqs != nullptr) add_products(x + begin, Acc(-1), dout + begin, dx.size, dfreqs + begin);
          }
          for (int64_t t = 0; t < p.count && p.dout_dot != nullptr; ++t) {
            const Element* dout_dot =
                row_of<Element>(p.dout_dot, p.dout_dot_strides, p.dout_dot_step, t, batch, row, head) + begin;
            if (dx_row != nullptr && freqs.dot != nullptr) {
              add_products(freqs.dot + t * freqs.step + begin, -sign, dout_dot, dx.size, dx.sums);
            }
            if (dfreqs != nullptr && p.x_dot != nullptr) {
              const Element* x_dot = row_of<Element>(p.x_dot, p.x_dot_strides, p.x_dot_step, t, batch, row, head);
              add_products(x_dot + begin, Acc(-1), dout_dot, dx.size, dfreqs + begin);
            }
            if (p.dfreqs_dot != nullptr) {
              add_products(x + begin, Acc(-1), dout_dot, dx.size, dfreqs_of(p.dfreqs_dot, t) + begin);
            }
            if (p.dx_dot != nullptr) {
              ChannelSums<Acc> dx_dot(p.head_dim - begin);
              add_products(freqs.still + begin, -sign, dout_dot, dx.size, dx_dot.sums);
              dx_dot.write(gradient_row<Element>(p.dx_dot, t, p.batch_size, batch, p.seqlen, row, width) +
                           head * p.head_dim + begin);
            }
          }
          if (dx_row != nullptr) dx.write(dx_row + head * p.head_dim + begin);
        }
      }
    }
    if (!p.conjugate) continue;
    if (dfreqs != nullptr) conjugate(dfreqs);
    for (int64_t t = 0; t < p.count && p.dfreqs_dot != nullptr; ++t) conjugate(dfreqs_of(p.dfreqs_dot, t));
  }
}

}  // namespace mixed_attention::cpu::MIXED_ATTENTION_ISA
