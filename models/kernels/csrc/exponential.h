// exp as straight-line code, so that a loop over it becomes vector instructions on any CPU. libm's exp is a call a
// number.
//
// x = n ln 2 + r with |r| <= ln 2 / 2; exp(r) by its Taylor series, cut where the next term is below the rounding of
// the type; times 2^n, written as exponent bits. Within 2 ulp. Outside the range of n the arithmetic yields rubbish,
// which the last selections replace: 0 below the smallest normal number, infinity above the largest; NaN stays NaN.
// It relies on rounding being kept: no -ffast-math.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

namespace busway {

template <class Real>
struct ExpConstants;

// Adding `round` to n leaves n + the exponent's bias, as an integer, in the low bits: it is 1.5 * 2^mantissa + bias.
template <>
struct ExpConstants<float> {
  using Bits = uint32_t;
  static constexpr int mantissa = 23;
  static constexpr float lowest = -87.3f, highest = 88.3f, round = 12582912.0f + 127;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
};

template <>
struct ExpConstants<double> {
  using Bits = uint64_t;
  static constexpr int mantissa = 52;
  static constexpr double lowest = -708.0, highest = 709.4, round = 6755399441055744.0 + 1023;
  static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
};

// sum of r^(k-2) / k! for k from 2
inline float exp_tail(float r) {
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  return p * r + 0.5f;
}

inline double exp_tail(double r) {
  double p = 1.0 / 6227020800;
  p = p * r + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  return p * r + 0.5;
}

// exp(x) for x that is at most slightly above 0, as a softmax has it: no check for overflow.
template <class Real>
inline __attribute__((always_inline)) Real exponential_below(Real x) {
  using C = ExpConstants<Real>;
  typename C::Bits bits;
  const Real shifted = x * Real(1.44269504088896340736) + C::round;
  const Real n = shifted - C::round;
  const Real r = x - n * C::ln2_high - n * C::ln2_low;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits <<= C::mantissa;
  Real power;
  std::memcpy(&power, &bits, sizeof power);
  const Real y = ((exp_tail(r) * r + 1) * r + 1) * power;
  return x < C::lowest ? Real(0) : y;
}

template <class Real>
inline __attribute__((always_inline)) Real exponential(Real x) {
  const Real y = exponential_below(x);
  return x > ExpConstants<Real>::highest ? std::numeric_limits<Real>::infinity() : y;
}

}  // namespace busway
