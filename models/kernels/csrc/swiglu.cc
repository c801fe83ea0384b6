// SwiGLU: silu(gate) * up, gate and up being the two halves of a row.
#include "exponential.h"
#include "operator.h"

namespace busway {

// gate_up [T, 2F] -> y [T, F]
template <class Real>
void swiglu(const Call& call) {
  const int64_t rows = call.dim(0, 0), width = call.dim(0, 1) / 2;
#pragma omp parallel for
  for (int64_t t = 0; t < rows; ++t) {
    const Real* __restrict gate = call.tensor<Real>(0) + t * 2 * width;
    const Real* __restrict up = gate + width;
    Real* __restrict y = call.tensor<Real>(1) + t * width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) y[i] = gate[i] / (1 + exponential(-gate[i])) * up[i];
  }
}

// gate_up [T, 2F], dy [T, F] -> dgate_up [T, 2F]
template <class Real>
void swiglu_backward(const Call& call) {
  const int64_t rows = call.dim(0, 0), width = call.dim(0, 1) / 2;
#pragma omp parallel for
  for (int64_t t = 0; t < rows; ++t) {
    const Real* __restrict gate = call.tensor<Real>(0) + t * 2 * width;
    const Real* __restrict up = gate + width;
    const Real* __restrict dy = call.tensor<Real>(1) + t * width;
    Real* __restrict dgate = call.tensor<Real>(2) + t * 2 * width;
    Real* __restrict dup = dgate + width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const Real s = 1 / (1 + exponential(-gate[i])), silu = gate[i] * s;
      dgate[i] = dy[i] * up[i] * (s + silu * (1 - s));
      dup[i] = dy[i] * silu;
    }
  }
}

// gate_up [R, 2F], weight [R], ends [E] int32 -> y [R, F]: as above times the row's weight, of rows before the last
// end.
template <class Real>
void expert_swiglu(const Call& call) {
  const Real* weight = call.tensor<Real>(1);
  const int64_t rows = call.tensor<int32_t>(2)[call.size(2) - 1], width = call.dim(0, 1) / 2;
#pragma omp parallel for
  for (int64_t t = 0; t < rows; ++t) {
    const Real* __restrict gate = call.tensor<Real>(0) + t * 2 * width;
    const Real* __restrict up = gate + width;
    Real* __restrict y = call.tensor<Real>(3) + t * width;
    const Real factor = weight[t];
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) y[i] = gate[i] / (1 + exponential(-gate[i])) * up[i] * factor;
  }
}

// gate_up [R, 2F], weight [R], ends [E] int32, dy [R, F] -> dgate_up [R, 2F], dweight [R], y [R, F]
template <class Real>
void expert_swiglu_backward(const Call& call) {
  const Real* weight = call.tensor<Real>(1);
  Real* dweight = call.tensor<Real>(5);
  const int64_t rows = call.tensor<int32_t>(2)[call.size(2) - 1], width = call.dim(0, 1) / 2;
#pragma omp parallel for
  for (int64_t t = 0; t < rows; ++t) {
    const Real* __restrict gate = call.tensor<Real>(0) + t * 2 * width;
    const Real* __restrict up = gate + width;
    const Real* __restrict dy = call.tensor<Real>(3) + t * width;
    Real* __restrict dgate = call.tensor<Real>(4) + t * 2 * width;
    Real* __restrict dup = dgate + width;
    Real* __restrict y = call.tensor<Real>(6) + t * width;
    const Real factor = weight[t];
    Real total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < width; ++i) {
      const Real s = 1 / (1 + exponential(-gate[i])), silu = gate[i] * s, dh = dy[i] * factor;
      total += dy[i] * silu * up[i];
      y[i] = silu * up[i] * factor;
      dgate[i] = dh * up[i] * (s + silu * (1 - s));
      dup[i] = dh * silu;
    }
    dweight[t] = total;
  }
}

}  // namespace busway

BUSWAY_OPERATOR(busway_swiglu, swiglu, "r")
BUSWAY_OPERATOR(busway_swiglu_backward, swiglu_backward, "r")
BUSWAY_OPERATOR(busway_expert_swiglu, expert_swiglu, "rri")
BUSWAY_OPERATOR(busway_expert_swiglu_backward, expert_swiglu_backward, "rri")
