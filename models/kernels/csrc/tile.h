// The matrix products inside attention: small tiles held in vector registers.
#pragma once

#include "vector.h"

namespace busway {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 8;
#else
constexpr int kRows = 4;  // 16 registers: 8 sums, 2 columns of b and a broadcast fit
#endif

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The stride of a row-major matrix of `columns`: whole vectors, and an odd number of them when wide, as a power of two
// would map a column onto few cache sets.
template <class Real>
inline int64_t row_stride(int64_t columns) {
  constexpr int64_t lanes = Lanes<Real>::count;
  const int64_t whole = round_up(columns, lanes);
  return whole % (4 * lanes) == 0 ? whole + lanes : whole;
}

// c[kRows][vectors * lanes] = (add ? c : 0) + sum over k < steps of a[r * a_row + k * a_step] * b[k * b_row + column]
template <class Real, int vectors, bool add>
inline __attribute__((always_inline)) void tile(const Real* a, int64_t a_row, int64_t a_step, const Real* b,
                                                int64_t b_row, int64_t steps, Real* c, int64_t c_row) {
  constexpr int lanes = Lanes<Real>::count;
  typename Lanes<Real>::Vector sum[kRows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v)
      sum[r][v] = add ? load(c + r * c_row + v * lanes) : typename Lanes<Real>::Vector{};
  for (int64_t k = 0; k < steps; ++k) {
    typename Lanes<Real>::Vector column[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) column[v] = load(b + k * b_row + v * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sum[r][v] += a[r * a_row + k * a_step] * column[v];
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) store(sum[r][v], c + r * c_row + v * lanes);
}

// The products are not inlined: within a larger function the tile's loop runs out of registers for addresses.

// kRows rows of c += a times `steps` rows of b. Rows of b and c hold `columns` rounded up to whole vectors.
template <class Real>
__attribute__((noinline)) void multiply_add(const Real* a, int64_t a_row, int64_t a_step, const Real* b, int64_t b_row,
                                            int64_t steps, int64_t columns, Real* c, int64_t c_row) {
  constexpr int64_t lanes = Lanes<Real>::count, panel = Lanes<Real>::panel;
  for (int64_t column = 0; column < columns; column += panel) {
    if (columns - column > lanes) {
      tile<Real, 2, true>(a, a_row, a_step, b + column, b_row, steps, c + column, c_row);
    } else {
      tile<Real, 1, true>(a, a_row, a_step, b + column, b_row, steps, c + column, c_row);
    }
  }
}

// kRows rows of c = a times columns [from, from + columns) of b, which is stored as panels: `panel` columns, row after
// row, so that a tile reads one stream. Whole panels of c are written.
template <class Real>
__attribute__((noinline)) void multiply_panels(const Real* a, int64_t a_row, const Real* b, int64_t from,
                                               int64_t columns, int64_t steps, Real* c, int64_t c_row) {
  constexpr int64_t panel = Lanes<Real>::panel;
  for (int64_t j = 0; j < columns; j += panel)
    tile<Real, 2, false>(a, a_row, 1, b + (from + j) * steps, panel, steps, c + j, c_row);
}

}  // namespace busway
