// p, g, ds and p h over the fragments of wgmma, and the numbers of queries that they take: a thread keeps those of its
// two queries where these are rows, and reads those of a tile where they are columns.
#pragma once

#include <cstdint>

#include "cuda/common/bwd_jvp_rows.h"
#include "cuda/common/row_reference.cuh"
#include "cuda/hopper/bwd/scores.cuh"
#include "cuda/hopper/bwd_jvp/config.h"
#include "cuda/hopper/plan/work_items.cuh"
#include "cuda/hopper/tile/fragment_values.cuh"
#include "cuda/ptx/lane.cuh"
#include "cuda/ptx/math.cuh"

namespace mixed_attention::cuda::hopper {

struct NumbersOfRows {
  RowNumbers lse_log2, mu, eps, gamma;

  // query: the first one of this thread's. Those from num_rows on do not exist.
  __device__ void read(const BwdJvpRows& rows, int64_t query, int num_rows) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool exists = 8 * i < num_rows;
      lse_log2.of_row[i] = exists ? rows.lse_log2[query + 8 * i] : INFINITY;
      mu.of_row[i] = exists ? rows.mu[query + 8 * i] : 0;
      eps.of_row[i] = exists ? rows.eps[query + 8 * i] : 0;
      gamma.of_row[i] = exists ? rows.gamma[query + 8 * i] : 0;
    }
  }
};

template <int kColumns>
struct NumbersOfColumns {
  ColumnStats<kColumns> mu, eps, gamma;

  __device__ NumbersOfColumns(const ColumnNumbersOfTile& tile, int first_column) {
    mu.load(tile.mu + first_column);
    eps.load(tile.eps + first_column);
    gamma.load(tile.gamma + first_column);
  }
};

// Writes the numbers of a tile's queries, of which num_rows from row_begin on exist, by the warps behind the first one,
// a thread for each. first_query: of the sequence; owned: rows of the item. wait: until they may be written.
template <typename Wait>
__device__ inline void write_columns(ColumnNumbersOfTile& tile, const BwdJvpRows& rows, int64_t first_query,
                                     const ItemRows& owned, int row_begin, int num_rows, const Wait& wait) {
  const auto column = [] { return ptx::thread_anew() - 32; };
  const bool exists = column() < num_rows;
  const int64_t query = first_query + row_begin + column();
  const float lse_log2 = exists ? rows.lse_log2[query] : INFINITY;
  const float mu = exists ? rows.mu[query] : 0;
  const float eps = exists ? rows.eps[query] : 0;
  const float gamma = exists ? rows.gamma[query] : 0;
  wait();
  const int place = place_of_stats(column());
  tile.lse_log2[place] = lse_log2;
  tile.mu[place] = mu;
  tile.eps[place] = eps;
  tile.gamma[place] = gamma;
  tile.row_begin = row_begin;
  tile.num_rows = num_rows;
  tile.has_references = *rows.has_references;
  tile.num_owned = owned.row_end - owned.row_begin;
}

// Scores become relative to the references of their queries, columns or rows, of which num_queries exist. references:
// that of the first column, or of the thread's first row.
template <int kCount>
__device__ inline void relate_existing_columns(float (&s)[kCount], const RowReference* references, int num_queries) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int column = 8 * (i / 4) + ptx::lane_anew() % 4 * 2 + i % 2;
    if (column < num_queries) s[i] = relative_score(s[i], references[column]);
  }
}

template <int kCount>
__device__ inline void relate_existing_rows(float (&s)[kCount], const RowReference* references, int num_queries) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (8 * row_of(i) < num_queries) s[i] = relative_score(s[i], references[8 * row_of(i)]);
  }
}

template <int kCount, typename Numbers>
__device__ inline void exponentiate_pairs(float (&s)[kCount], const Numbers& lse_log2, float scale_log2) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) s[i] = ptx::exp2(fmaf(s[i], scale_log2, -lse_log2[i]));
}

// Makes of products what they are multiplied as: x becomes ds, e becomes g, z becomes p h. kHasX: whether there is an x
// at all.
template <bool kHasX, int kCount, typename Numbers>
__device__ inline void differentiate_pairs(const float (&p)[kCount], float (&z)[kCount], float (&e)[kCount],
                                           float (&x)[kCount], const Numbers& numbers, float scale) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float h = fmaf(z[i], scale, -numbers.mu[i]);
    const float g = p[i] * (e[i] - numbers.eps[i]);
    x[i] = fmaf(h, g, p[i] * (kHasX ? x[i] - numbers.gamma[i] : -numbers.gamma[i]));
    e[i] = g;
    z[i] = p[i] * h;
  }
}

}  // namespace mixed_attention::cuda::hopper
