// Rotary embedding in Hugging Face's half-split form: elements i and i + half of a head turn together.
#pragma once

#include <cstdint>

namespace busway {

// out = factor times x turned by the angles of `cos` and `sin` [half]; direction -1 turns back.
template <class Real>
inline void turn(const Real* __restrict x, const Real* __restrict cos, const Real* __restrict sin, int64_t half,
                 Real factor, Real direction, Real* __restrict out) {
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const Real turn_cos = cos[i] * factor, turn_sin = sin[i] * factor * direction;
    out[i] = x[i] * turn_cos - x[i + half] * turn_sin;
    out[i + half] = x[i + half] * turn_cos + x[i] * turn_sin;
  }
}

}  // namespace busway
