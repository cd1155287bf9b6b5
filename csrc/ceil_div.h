// Quotients of whole numbers, rounded up.
#pragma once

namespace mixed_attention {

// How many parts of `size` cover `count`; both are of one sign.
template <typename Count, typename Size>
constexpr auto ceil_div(Count count, Size size) {
  return (count + size - 1) / size;
}

}  // namespace mixed_attention
