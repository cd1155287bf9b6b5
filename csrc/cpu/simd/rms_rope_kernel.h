// Rows over their root mean square, rotated, and the derivative of both; in place or not.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/simd/convert.h"
#include "params.h"
#include "schedule.h"

namespace mixed_attention::cpu::MIXED_ATTENTION_ISA {

// Neighbouring channels times a frequency; a sum of several at a time, which fills vectors.
template <class Element>
struct PairRotation {
  using Acc = Accumulator<Element>;
  static constexpr int kAtOnce = 8;

  const Acc* freqs;  // or null
  Acc sign;

  void operator()(const Element* x, int64_t i, Acc& even, Acc& odd) const {
    const Acc re = to_accumulator(x[i]), im = to_accumulator(x[i + 1]);
    const Acc cos = freqs == nullptr ? Acc(1) : freqs[i], sin = freqs == nullptr ? Acc(0) : sign * freqs[i + 1];
    even = re * cos - im * sin;
    odd = re * sin + im * cos;
  }
};

template <class Element>
Accumulator<Element> sum_of_squares(const Element* x, int64_t size) {
  using Acc = Accumulator<Element>;
  constexpr int kAtOnce = 16;
  Acc sums[kAtOnce] = {}, sum = 0;
  int64_t i = 0;
  for (; i + kAtOnce <= size; i += kAtOnce) {
    for (int j = 0; j < kAtOnce; ++j) {
      const Acc value = to_accumulator(x[i + j]);
      sums[j] += value * value;
    }
  }
  for (; i < size; ++i) sum += to_accumulator(x[i]) * to_accumulator(x[i]);
  for (const Acc each : sums) sum += each;
  return sum;
}

// The product of the rotated gradient with the row.
template <class Element>
Accumulator<Element> rotated_dot(const PairRotation<Element>& rotate, const Element* gradient, const Element* row,
                                 int64_t size) {
  using Acc = Accumulator<Element>;
  constexpr int kAtOnce = PairRotation<Element>::kAtOnce;
  Acc sums[kAtOnce] = {}, sum = 0;
  const auto product = [&](int64_t i) {
    Acc even, odd;
    rotate(gradient, i, even, odd);
    return even * to_accumulator(row[i]) + odd * to_accumulator(row[i + 1]);
  };
  int64_t i = 0;
  for (; i + 2 * kAtOnce <= size; i += 2 * kAtOnce) {
    for (int j = 0; j < kAtOnce; ++j) sums[j] += product(i + 2 * j);
  }
  for (; i < size; i += 2) sum += product(i);
  for (const Acc each : sums) sum += each;
  return sum;
}

template <class Element>
void rms_rope(const RmsRopeParams& p, int64_t batch, Range rows) {
  using Acc = Accumulator<Element>;
  const Acc size = static_cast<Acc>(p.head_dim);
  const auto row_of = [batch](const void* tensor, const Strides& strides, int64_t row, int64_t head) {
    return static_cast<const Element*>(tensor) + batch * strides.batch + row * strides.row + head * strides.head;
  };
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    PairRotation<Element> rotate{nullptr, p.conjugate ? Acc(-1) : Acc(1)};
    if (p.freqs != nullptr) {
      rotate.freqs = static_cast<const Acc*>(p.freqs) + batch * p.freqs_batch_stride + row * p.freqs_row_stride;
    }
    for (int64_t head = 0; head < p.num_heads; ++head) {
      const Element* x = row_of(p.x, p.x_strides, row, head);
      Element* out = const_cast<Element*>(row_of(p.out, p.out_strides, row, head));
      const Element* divided = p.rows == nullptr ? x : row_of(p.rows, p.rows_strides, row, head);
      const Acc mean = sum_of_squares(divided, p.head_dim) / size;
      const Acc rstd = Acc(1) / std::sqrt(mean + std::numeric_limits<Acc>::epsilon());
      // d(rows * rstd) takes back what lies along the row.
      const Acc along =
          p.rows == nullptr ? Acc(0) : rotated_dot(rotate, x, divided, p.head_dim) / size * rstd * rstd * rstd;
      for (int64_t i = 0; i < p.head_dim; i += 2) {
        Acc even, odd;
        rotate(x, i, even, odd);
        if (p.rows == nullptr) {
          from_accumulator(even * rstd, out[i]);
          from_accumulator(odd * rstd, out[i + 1]);
        } else {
          from_accumulator(even * rstd - to_accumulator(divided[i]) * along, out[i]);
          from_accumulator(odd * rstd - to_accumulator(divided[i + 1]) * along, out[i + 1]);
        }
      }
    }
  }
}

}  // namespace mixed_attention::cpu::MIXED_ATTENTION_ISA
