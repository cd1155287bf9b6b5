// Quotients of whole numbers, rounded up.
#pragma once

namespace mixed_attention {

// How many parts of `size` cover `count`; both are of one sign.
template <typename Count, typename Size>
constexpr auto ceil_div(Count count, Size size) {
  return (count + size - 1) / size;
}

// The least multiple that is not less.
template <typename Count, typename Size>
constexpr auto round_up(Count count, Size multiple) {
  return ceil_div(count, multiple) * multiple;
}

}  // namespace mixed_attention
