// Rotary embedding of packed projections: queries and keys turn, values pass.
#include "operator.h"
#include "rotary.h"

namespace busway {

// qkv [T, C], cos [S, R], sin [S, R], (heads, kv_heads) int32, direction -> [T, C]
template <class Real>
void rotary(const Call& call) {
  const Real *cos = call.tensor<Real>(1), *sin = call.tensor<Real>(2);
  const int64_t turned = call.tensor<int32_t>(3)[0] + call.tensor<int32_t>(3)[1];
  const Real direction = call.number(4);
  const int64_t rows = call.dim(0, 0), width = call.dim(0, 1), seq = call.dim(1, 0), half = call.dim(1, 1);
#pragma omp parallel for
  for (int64_t t = 0; t < rows; ++t) {
    const Real* x = call.tensor<Real>(0) + t * width;
    Real* out = call.tensor<Real>(5) + t * width;
    const int64_t angles = t % seq * half;
    for (int64_t h = 0; h < turned; ++h)
      turn(x + h * 2 * half, cos + angles, sin + angles, half, Real(1), direction, out + h * 2 * half);
    std::copy(x + turned * 2 * half, x + width, out + turned * 2 * half);
  }
}

}  // namespace busway

BUSWAY_OPERATOR(busway_rotary, rotary, "rrrin")
