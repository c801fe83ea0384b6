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

// c[kRows][vectors * lanes] = (add ? c : 0) + sum over k < steps of a[r * a_row + k * a_step] * b[k * panel + column]
template <class Real, int vectors, bool add>
inline __attribute__((always_inline)) void tile(const Real* a, int64_t a_row, int64_t a_step, const Real* b,
                                                int64_t steps, Real* c, int64_t c_row) {
  using Vector = typename Lanes<Real>::Vector;
  constexpr int lanes = Lanes<Real>::count, panel = Lanes<Real>::panel;
  Vector sum[kRows][vectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < vectors; ++v) {
      if (add) {
        std::memcpy(&sum[r][v], c + r * c_row + v * lanes, sizeof(Vector));
      } else {
        sum[r][v] = Vector{};
      }
    }
  for (int64_t k = 0; k < steps; ++k) {
    Vector column[vectors];
    for (int v = 0; v < vectors; ++v) std::memcpy(&column[v], b + k * panel + v * lanes, sizeof(Vector));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sum[r][v] += a[r * a_row + k * a_step] * column[v];
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < vectors; ++v) std::memcpy(c + r * c_row + v * lanes, &sum[r][v], sizeof(Vector));
}

// A matrix stored as panels of `Lanes::panel` columns, each panel row after row: a tile reads one stream, and no row
// stride that is a power of two maps a column onto few cache sets. The last panel is padded.
template <class Real>
struct Panels {
  Real* data;
  int64_t rows, columns;

  static constexpr int width = Lanes<Real>::panel;
  static int64_t size(int64_t rows, int64_t columns) { return rows * round_up(columns, width); }

  Real& at(int64_t row, int64_t column) const {
    return data[(column / width) * rows * width + row * width + column % width];
  }
  const Real* panel(int64_t column, int64_t row) const { return &at(row, column); }
  void set_row(int64_t row, const Real* values) const {
    Real* out = data + row * width;
    for (int64_t left = columns; left > 0; left -= width, values += width, out += rows * width) {
      if (left >= width) {
        std::memcpy(out, values, width * sizeof(Real));  // a constant size: vector moves, no call
      } else {
        for (int64_t i = 0; i < width; ++i) out[i] = i < left ? values[i] : Real(0);
      }
    }
  }
};

// kRows rows of c (+)= a times the rows [row, row + steps) of b; c's row must hold `columns` rounded up to a panel.
template <class Real, bool add>
inline void multiply(const Real* a, int64_t a_row, int64_t a_step, const Panels<Real>& b, int64_t row, int64_t steps,
                     Real* c, int64_t c_row) {
  constexpr int lanes = Lanes<Real>::count;
  for (int64_t column = 0; column < b.columns; column += Panels<Real>::width) {
    if (b.columns - column > lanes) {
      tile<Real, 2, add>(a, a_row, a_step, b.panel(column, row), steps, c + column, c_row);
    } else {
      tile<Real, 1, add>(a, a_row, a_step, b.panel(column, row), steps, c + column, c_row);
    }
  }
}

}  // namespace busway
