// Tile sizes of the portable kernels of tangents, and for which numbers there are any.
#pragma once

#include "cuda/portable/config.h"
#include "derivatives_params.h"

namespace mixed_attention::cuda::portable {

// The widths of heads that are compiled, of those that the build wants at all. Others are filled up with zeros to the
// next one. Tiles of fp32 at 128 would be so small that the reference is no slower.
constexpr bool has_tangents(Arithmetic arithmetic, int head_dim) {
  return head_dim == 32 || head_dim == 64 || (head_dim == 128 && is_16_bit(arithmetic));
}

// What moves in a launch of the forward's tangents, for which it has kernels of their own: q alone, in one direction or
// in up to kMaxTangents, which share s and p; or anything, in one direction.
enum class Moving { kQuery, kQueries, kAll };

constexpr int directions_of(Moving moving) { return moving == Moving::kQueries ? kMaxTangents : 1; }

constexpr bool has_moving(Arithmetic arithmetic, int head_dim, Moving moving) {
  // Beyond 64 columns two sums fill the registers already. fp32 gains nothing from its own kernel for one direction.
  if (moving == Moving::kAll) return true;
  return head_dim <= 64 && (moving == Moving::kQueries || is_16_bit(arithmetic));
}

// That of a call's launches, of which there are more where it has more directions.
constexpr Moving moving_of(Arithmetic arithmetic, int head_dim, const Tangents& tangents) {
  if (tangents.k != nullptr || tangents.v != nullptr) return Moving::kAll;
  const Moving moving = tangents.count > 1 ? Moving::kQueries : Moving::kQuery;
  return has_moving(arithmetic, head_dim, moving) ? moving : Moving::kAll;
}

// Beside the scores there are those of tangents, beside the output its tangents: 16 rows to a warp instead of 32 leave
// registers for them. Shared memory holds the owned rows of q and its tangents, and streams k, v and their tangents.
// Where these are not moved there is room for twice as many keys, whose MMAs overlap better.
constexpr Tile jvp_tile(Arithmetic arithmetic, int head_dim, Moving moving) {
  if (moving == Moving::kQuery) return {128, 64, 16, 2, 1};
  const int row_bytes = (is_16_bit(arithmetic) ? 2 : 4) * head_dim;
  return row_bytes <= 128 ? Tile{128, 32, 16, 2, 1} : Tile{64, 32, 16, 1, 1};
}

// dq and the gradient of q's tangent, or dk and dv: of both kernels a tile owns rows of four tensors and streams four.
constexpr Tile bwd_jvp_tile(Arithmetic arithmetic, int head_dim) {
  const int row_bytes = (is_16_bit(arithmetic) ? 2 : 4) * head_dim;
  if (row_bytes <= 64) return {128, 32, 16, 2, 1};
  if (row_bytes <= 128) return {64, 32, 16, 2, 1};
  return {64, 16, 16, 1, 1};
}

}  // namespace mixed_attention::cuda::portable
