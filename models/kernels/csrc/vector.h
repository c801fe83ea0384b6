// Vectors in GCC's extension, which compiles to AVX-512, AVX2 or NEON alike, and sums over rows with them.
//
// A compiler may not reorder a floating-point sum without -ffast-math, and what it makes of OpenMP's reduction ends in
// a chain of dependent additions; these keep one fixed order that is fast.
#pragma once

#include <cstdint>
#include <cstring>

namespace busway {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class Real>
struct Lanes {
  typedef Real Vector __attribute__((vector_size(kVectorBytes)));
  static constexpr int count = kVectorBytes / sizeof(Real);
  static constexpr int panel = 2 * count;
};

template <class Real>
inline typename Lanes<Real>::Vector load(const Real* from) {
  typename Lanes<Real>::Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class Real>
inline void store(typename Lanes<Real>::Vector v, Real* to) {
  std::memcpy(to, &v, sizeof v);
}

// n numbers combined in pairs, by halves.
template <class Real, int n, class Combine>
inline __attribute__((always_inline)) Real fold(const Real* from, Combine combine) {
  if constexpr (n == 1) {
    return *from;
  } else {
    typedef Real Half __attribute__((vector_size(n / 2 * sizeof(Real))));
    Half low, high;
    std::memcpy(&low, from, sizeof low);
    std::memcpy(&high, from + n / 2, sizeof high);
    low = combine(low, high);
    Real next[n / 2];
    std::memcpy(next, &low, sizeof low);
    return fold<Real, n / 2>(next, combine);
  }
}

// Combines term(i) for whole vectors and rest(i) for what is left, from `start`; two vectors at a time, as each waits
// for its predecessor.
template <class Real, class Combine, class Term, class Rest>
inline __attribute__((always_inline)) Real reduce(int64_t n, Real start, Combine combine, Term term, Rest rest) {
  constexpr int lanes = Lanes<Real>::count;
  typename Lanes<Real>::Vector even = start - typename Lanes<Real>::Vector{}, odd = even;
  int64_t i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    even = combine(even, term(i));
    odd = combine(odd, term(i + lanes));
  }
  if (i + lanes <= n) {
    even = combine(even, term(i));
    i += lanes;
  }
  Real part[lanes];
  store<Real>(combine(even, odd), part);
  Real total = fold<Real, lanes>(part, combine);
  for (; i < n; ++i) total = combine(total, rest(i));
  return total;
}

template <class Real>
inline Real sum(const Real* x, int64_t n) {
  return reduce(n, Real(0), [](auto a, auto b) { return a + b; }, [=](int64_t i) { return load(x + i); },
                [=](int64_t i) { return x[i]; });
}

template <class Real>
inline Real dot(const Real* x, const Real* y, int64_t n) {
  return reduce(n, Real(0), [](auto a, auto b) { return a + b; },
                [=](int64_t i) { return load(x + i) * load(y + i); }, [=](int64_t i) { return x[i] * y[i]; });
}

// The largest of x and `start`. NaN is passed over: what is computed from x next carries it on.
template <class Real>
inline Real maximum(const Real* x, int64_t n, Real start) {
  return reduce(n, start, [](auto a, auto b) { return b > a ? b : a; }, [=](int64_t i) { return load(x + i); },
                [=](int64_t i) { return x[i]; });
}

// Copies a short row without a call.
template <class Real>
inline void copy_row(const Real* from, int64_t n, Real* to) {
  int64_t i = 0;
  for (; i + Lanes<Real>::count <= n; i += Lanes<Real>::count) store(load(from + i), to + i);
  for (; i < n; ++i) to[i] = from[i];
}

}  // namespace busway
