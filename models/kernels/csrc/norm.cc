// RMSNorm over rows, and over the heads of packed q and k.
#include <cmath>

#include "operator.h"
#include "vector.h"

namespace busway {

template <class Real>
Real inverse_rms(const Real* x, int64_t n, Real eps) {
  return 1 / std::sqrt(dot(x, x, n) * (Real(1) / n) + eps);
}

template <class Real>
void norm_row(const Real* __restrict x, const Real* __restrict w, int64_t n, Real eps, Real* __restrict y) {
  const Real r = inverse_rms(x, n, eps);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] * r * w[i];
}

// Writes dx and adds this row's share to dw.
template <class Real>
void norm_row_backward(const Real* __restrict x, const Real* __restrict w, const Real* __restrict dy, int64_t n,
                       Real eps, Real* __restrict dx, Real* __restrict dw) {
  const Real r = inverse_rms(x, n, eps);
  const Real product = reduce(n, Real(0), [](auto a, auto b) { return a + b; },
                              [=](int64_t i) { return load(x + i) * load(dy + i) * load(w + i); },
                              [=](int64_t i) { return x[i] * dy[i] * w[i]; });
  const Real along = product * r * r * r * (Real(1) / n);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Real g = dy[i] * r;
    dx[i] = g * w[i] - x[i] * along;
    dw[i] += g * x[i];
  }
}

// x [T, H], w [H], eps -> y [T, H]
template <class Real>
void rms_norm(const Call& call) {
  const Real* x = call.tensor<Real>(0);
  const Real* w = call.tensor<Real>(1);
  const Real eps = call.number(2);
  Real* y = call.tensor<Real>(3);
  const int64_t hidden = call.last_dim(0), rows = call.size(0) / hidden;
#pragma omp parallel for
  for (int64_t t = 0; t < rows; ++t) norm_row(x + t * hidden, w, hidden, eps, y + t * hidden);
}

// x [T, H], w [H], dy [T, H], eps -> dx [T, H], dw [H]
template <class Real>
void rms_norm_backward(const Call& call) {
  const Real* x = call.tensor<Real>(0);
  const Real* w = call.tensor<Real>(1);
  const Real* dy = call.tensor<Real>(2);
  const Real eps = call.number(3);
  Real* dx = call.tensor<Real>(4);
  const int64_t hidden = call.last_dim(0);
  const RowBlocks blocks(call.size(0) / hidden);
  Scratch<Real> partial(blocks.count * hidden);
#pragma omp parallel for
  for (int64_t b = 0; b < blocks.count; ++b) {
    Real* dw = partial.get() + b * hidden;
    std::fill(dw, dw + hidden, Real(0));
    for (int64_t t = blocks.begin(b); t < blocks.end(b); ++t)
      norm_row_backward(x + t * hidden, w, dy + t * hidden, hidden, eps, dx + t * hidden, dw);
  }
  add_blocks(partial.get(), blocks.count, hidden, call.tensor<Real>(5));
}

// qkv [T, C], wq [D], wk [D], (heads, kv_heads) int32, eps -> [T, C]
template <class Real>
void head_norm(const Call& call) {
  const Real* qkv = call.tensor<Real>(0);
  const Real* w[2] = {call.tensor<Real>(1), call.tensor<Real>(2)};
  const int64_t heads = call.tensor<int32_t>(3)[0], kv_heads = call.tensor<int32_t>(3)[1];
  const Real eps = call.number(4);
  Real* y = call.tensor<Real>(5);
  const int64_t rows = call.dim(0, 0), width = call.dim(0, 1), dim = call.dim(1, 0), values = (heads + kv_heads) * dim;
#pragma omp parallel for
  for (int64_t t = 0; t < rows; ++t) {
    const Real* x = qkv + t * width;
    Real* out = y + t * width;
    for (int64_t h = 0; h < heads + kv_heads; ++h) norm_row(x + h * dim, w[h >= heads], dim, eps, out + h * dim);
    std::copy(x + values, x + width, out + values);
  }
}

// qkv [T, C], wq [D], wk [D], dy [T, C], (heads, kv_heads) int32, eps -> dqkv [T, C], dwq [D], dwk [D]
template <class Real>
void head_norm_backward(const Call& call) {
  const Real* qkv = call.tensor<Real>(0);
  const Real* w[2] = {call.tensor<Real>(1), call.tensor<Real>(2)};
  const Real* dy = call.tensor<Real>(3);
  const int64_t heads = call.tensor<int32_t>(4)[0], kv_heads = call.tensor<int32_t>(4)[1];
  const Real eps = call.number(5);
  Real* dqkv = call.tensor<Real>(6);
  const int64_t width = call.dim(0, 1), dim = call.dim(1, 0), values = (heads + kv_heads) * dim;
  const RowBlocks blocks(call.dim(0, 0));
  Scratch<Real> partial(2 * blocks.count * dim);
  Real* dw[2] = {partial.get(), partial.get() + blocks.count * dim};
#pragma omp parallel for
  for (int64_t b = 0; b < blocks.count; ++b) {
    for (Real* part : dw) std::fill(part + b * dim, part + (b + 1) * dim, Real(0));
    for (int64_t t = blocks.begin(b); t < blocks.end(b); ++t) {
      const Real *x = qkv + t * width, *g = dy + t * width;
      Real* dx = dqkv + t * width;
      for (int64_t h = 0; h < heads + kv_heads; ++h)
        norm_row_backward(x + h * dim, w[h >= heads], g + h * dim, dim, eps, dx + h * dim, dw[h >= heads] + b * dim);
      std::copy(g + values, g + width, dx + values);
    }
  }
  add_blocks(dw[0], blocks.count, dim, call.tensor<Real>(7));
  add_blocks(dw[1], blocks.count, dim, call.tensor<Real>(8));
}

}  // namespace busway

BUSWAY_OPERATOR(busway_rms_norm, rms_norm, "rrn")
BUSWAY_OPERATOR(busway_rms_norm_backward, rms_norm_backward, "rrrn")
BUSWAY_OPERATOR(busway_head_norm, head_norm, "rrrin")
BUSWAY_OPERATOR(busway_head_norm_backward, head_norm_backward, "rrrrin")
