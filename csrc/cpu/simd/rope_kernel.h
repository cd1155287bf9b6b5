// Rotation of neighbouring channel pairs, in place or not.
#pragma once

#include "cpu/simd/convert.h"
#include "params.h"
#include "schedule.h"

namespace mixed_attention::cpu::MIXED_ATTENTION_ISA {

template <class Element>
void rope(const RopeParams& p, int64_t batch, Range rows) {
  using Acc = Accumulator<Element>;
  const Acc sign = p.conjugate ? Acc(-1) : Acc(1);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const Acc* freqs = static_cast<const Acc*>(p.freqs) + batch * p.freqs_batch_stride + row * p.freqs_row_stride;
    const Element* x = static_cast<const Element*>(p.x) + batch * p.x_strides.batch + row * p.x_strides.row;
    Element* out = static_cast<Element*>(p.out) + batch * p.out_strides.batch + row * p.out_strides.row;
    for (int64_t head = 0; head < p.num_heads; ++head, x += p.x_strides.head, out += p.out_strides.head) {
      for (int64_t i = 0; i < p.head_dim; i += 2) {
        const Acc re = to_accumulator(x[i]), im = to_accumulator(x[i + 1]);
        const Acc cos = freqs[i], sin = sign * freqs[i + 1];
        from_accumulator(re * cos - im * sin, out[i]);
        from_accumulator(re * sin + im * cos, out[i + 1]);
      }
    }
  }
}

}  // namespace mixed_attention::cpu::MIXED_ATTENTION_ISA
