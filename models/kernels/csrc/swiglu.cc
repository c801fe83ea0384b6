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

}  // namespace busway

BUSWAY_OPERATOR(busway_swiglu, swiglu, "r")
BUSWAY_OPERATOR(busway_swiglu_backward, swiglu_backward, "r")
