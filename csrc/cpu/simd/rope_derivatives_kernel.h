// Rotation with its tangents, and the gradient of both: every row of a head is read from memory once.
//
// With pairs of channels for complex numbers, out = f x moves by out' = f x' + f' x. The gradients, for dout and dout',
// are dx = conj(f) dout + conj(f') dout', dx' = conj(f) dout', and of the frequencies, whose heads are summed,
// df = conj(x) dout + conj(x') dout' and df' = conj(x) dout'.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/simd/convert.h"
#include "params.h"
#include "schedule.h"

namespace mixed_attention::cpu::MIXED_ATTENTION_ISA {

// One product of complex numbers, pairs of neighbours; sign: of the imaginary parts of a, 1 or -1.
template <class A, class B, class Acc>
inline void multiply_pair(const A* a, Acc sign, const B* b, Acc& even, Acc& odd) {
  const Acc a_re = to_accumulator(a[0]), a_im = sign * to_accumulator(a[1]);
  const Acc b_re = to_accumulator(b[0]), b_im = to_accumulator(b[1]);
  even = a_re * b_re - a_im * b_im;
  odd = a_re * b_im + a_im * b_re;
}

// out = a b
template <class A, class B, class Acc, class Element>
inline void set_product(const A* __restrict a, Acc sign, const B* __restrict b, int64_t size, Element* __restrict out) {
  for (int64_t i = 0; i < size; i += 2) {
    Acc even, odd;
    multiply_pair(a + i, sign, b + i, even, odd);
    from_accumulator(even, out[i]);
    from_accumulator(odd, out[i + 1]);
  }
}

// out = a b + c d, with one sign for a and c
template <class A, class B, class Acc, class Element>
inline void set_products(const A* __restrict a, const B* __restrict b, const A* __restrict c, const B* __restrict d,
                         Acc sign, int64_t size, Element* __restrict out) {
  for (int64_t i = 0; i < size; i += 2) {
    Acc even, odd, more_even, more_odd;
    multiply_pair(a + i, sign, b + i, even, odd);
    multiply_pair(c + i, sign, d + i, more_even, more_odd);
    from_accumulator(even + more_even, out[i]);
    from_accumulator(odd + more_odd, out[i + 1]);
  }
}

// sums += a b
template <class A, class B, class Acc>
inline void add_product(const A* __restrict a, Acc sign, const B* __restrict b, int64_t size, Acc* __restrict sums) {
  for (int64_t i = 0; i < size; i += 2) {
    Acc even, odd;
    multiply_pair(a + i, sign, b + i, even, odd);
    sums[i] += even;
    sums[i + 1] += odd;
  }
}

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

  const Acc* dot_of(int64_t direction) const { return dot + direction * step; }
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
      if (out != nullptr) set_product(freqs.still, sign, x, p.head_dim, out);
      for (int64_t t = 0; t < p.count; ++t) {
        const Element* x_dot = row_of<Element>(p.x_dot, p.x_dot_strides, p.x_dot_step, t, batch, row, head);
        Element* out_dot = row_of<Element>(p.out_dot, p.out_dot_strides, p.out_dot_step, t, batch, row, head);
        if (freqs.dot == nullptr) {
          set_product(freqs.still, sign, x_dot, p.head_dim, out_dot);
        } else if (x_dot == nullptr) {
          set_product(freqs.dot_of(t), sign, x, p.head_dim, out_dot);
        } else {
          set_products(freqs.still, x_dot, freqs.dot_of(t), x, sign, p.head_dim, out_dot);
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

// dx of a row of a head, rounded once, however many directions there are. Either of dout and dout_dot may be null.
template <class Element, class Acc>
void rotate_back(const RopeBwdParams& p, const RowFreqs<Acc>& freqs, Acc sign, const Element* dout,
                 const Element* dout_dot, Element* dx) {
  const int64_t moving = dout_dot == nullptr || freqs.dot == nullptr ? 0 : p.count;
  if (dout != nullptr && moving == 0) return set_product(freqs.still, sign, dout, p.head_dim, dx);
  if (dout != nullptr && moving == 1) {
    return set_products(freqs.still, dout, freqs.dot, dout_dot, sign, p.head_dim, dx);
  }
  constexpr int64_t kAtOnce = 64;
  for (int64_t begin = 0; begin < p.head_dim; begin += kAtOnce) {
    const int64_t size = std::min(kAtOnce, p.head_dim - begin);
    Acc sums[kAtOnce] = {};
    if (dout != nullptr) add_product(freqs.still + begin, sign, dout + begin, size, sums);
    for (int64_t t = 0; t < moving; ++t) {
      add_product(freqs.dot_of(t) + begin, sign, dout_dot + t * p.dout_dot_step + begin, size, sums);
    }
    store_row(sums, size, Acc(1), dx + begin);
  }
}

template <class Element>
void rope_backward(const RopeBwdParams& p, int64_t first_batch, Range rows) {
  using Acc = Accumulator<Element>;
  // Gradients of what is conjugated are conjugated.
  const Acc sign = p.conjugate ? Acc(-1) : Acc(1);
  const int64_t end_batch = p.shares_freqs ? p.batch_size : first_batch + 1;
  const int64_t batches_of_freqs = p.shares_freqs ? 1 : p.batch_size;
  const int64_t width = p.num_heads * p.head_dim;
  const int64_t moving = p.dout_dot == nullptr ? 0 : p.count;
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
        const Element* dout_dot = row_of<Element>(p.dout_dot, p.dout_dot_strides, 0, 0, batch, row, head);
        if (dx_row != nullptr) rotate_back(p, freqs, -sign, dout, dout_dot, dx_row + head * p.head_dim);
        if (dfreqs != nullptr && dout != nullptr) add_product(x, Acc(-1), dout, p.head_dim, dfreqs);
        for (int64_t t = 0; t < p.count && p.dx_dot != nullptr; ++t) {
          Element* dx_dot = gradient_row<Element>(p.dx_dot, t, p.batch_size, batch, p.seqlen, row, width);
          dx_dot += head * p.head_dim;
          if (moving == 0) {
            std::memset(dx_dot, 0, p.head_dim * sizeof(Element));
          } else {
            set_product(freqs.still, -sign, dout_dot + t * p.dout_dot_step, p.head_dim, dx_dot);
          }
        }
        for (int64_t t = 0; t < moving; ++t) {
          const Element* moved = dout_dot + t * p.dout_dot_step;
          if (dfreqs != nullptr && p.x_dot != nullptr) {
            const Element* x_dot = row_of<Element>(p.x_dot, p.x_dot_strides, p.x_dot_step, t, batch, row, head);
            add_product(x_dot, Acc(-1), moved, p.head_dim, dfreqs);
          }
          if (p.dfreqs_dot != nullptr) add_product(x, Acc(-1), moved, p.head_dim, dfreqs_of(p.dfreqs_dot, t));
        }
      }
    }
    if (!p.conjugate) continue;
    if (dfreqs != nullptr) conjugate(dfreqs);
    for (int64_t t = 0; t < p.count && p.dfreqs_dot != nullptr; ++t) conjugate(dfreqs_of(p.dfreqs_dot, t));
  }
}

}  // namespace mixed_attention::cpu::MIXED_ATTENTION_ISA
