// The two ends of the model: embedding and cross-entropy. An id outside [0, V) is another rank's or is ignored.
#include <cmath>

#include "exponential.h"
#include "operator.h"
#include "vector.h"

namespace busway {

// logits [T, V], labels [T] int32 -> lse [T], target [T]
template <class Real>
void cross_entropy(const Call& call) {
  const int32_t* labels = call.tensor<int32_t>(1);
  Real *lse = call.tensor<Real>(2), *target = call.tensor<Real>(3);
  const int64_t rows = call.dim(0, 0), vocab = call.dim(0, 1);
#pragma omp parallel for
  for (int64_t t = 0; t < rows; ++t) {
    const Real* x = call.tensor<Real>(0) + t * vocab;
    const Real top = maximum(x, vocab, -std::numeric_limits<Real>::infinity());
    // Chunks, added in double: a float sum of 10^5 terms would lose digits.
    double total = 0;
    for (int64_t begin = 0; begin < vocab; begin += 2048) {
      const int64_t end = std::min(vocab, begin + 2048);
      Real part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t i = begin; i < end; ++i) part += exponential_below(x[i] - top);
      total += part;
    }
    lse[t] = top + static_cast<Real>(std::log(total));
    target[t] = labels[t] >= 0 && labels[t] < vocab ? x[labels[t]] : Real(0);
  }
}

// logits [T, V], labels [T] int32, lse [T], weight [T] -> dlogits [T, V]
template <class Real>
void cross_entropy_backward(const Call& call) {
  const int32_t* labels = call.tensor<int32_t>(1);
  const Real *lse = call.tensor<Real>(2), *weight = call.tensor<Real>(3);
  const int64_t rows = call.dim(0, 0), vocab = call.dim(0, 1);
#pragma omp parallel for
  for (int64_t t = 0; t < rows; ++t) {
    const Real* __restrict x = call.tensor<Real>(0) + t * vocab;
    Real* __restrict dx = call.tensor<Real>(4) + t * vocab;
    const Real shift = lse[t], scale = weight[t];
#pragma omp simd
    for (int64_t i = 0; i < vocab; ++i) dx[i] = exponential(x[i] - shift) * scale;
    if (labels[t] >= 0 && labels[t] < vocab) dx[labels[t]] -= scale;
  }
}

// ids [T] int32, table [V, H] -> x [T, H]
template <class Real>
void embedding(const Call& call) {
  const int32_t* ids = call.tensor<int32_t>(0);
  const Real* table = call.tensor<Real>(1);
  const int64_t rows = call.size(0), vocab = call.dim(1, 0), hidden = call.dim(1, 1);
#pragma omp parallel for
  for (int64_t t = 0; t < rows; ++t) {
    Real* x = call.tensor<Real>(2) + t * hidden;
    if (ids[t] >= 0 && ids[t] < vocab) {
      std::copy_n(table + ids[t] * hidden, hidden, x);
    } else {
      std::fill_n(x, hidden, Real(0));
    }
  }
}

// ids [T] int32, dx [T, H], table [V, H] (its shape) -> dtable [V, H]
// A task owns columns, so that every sum runs over the tokens in their order.
template <class Real>
void embedding_backward(const Call& call) {
  const int32_t* ids = call.tensor<int32_t>(0);
  const Real* dx = call.tensor<Real>(1);
  Real* dtable = call.tensor<Real>(3);
  const int64_t rows = call.size(0), vocab = call.dim(2, 0), hidden = call.dim(2, 1), columns = 64;
#pragma omp parallel
  {
#pragma omp for
    for (int64_t v = 0; v < vocab; ++v) std::fill_n(dtable + v * hidden, hidden, Real(0));
#pragma omp for
    for (int64_t begin = 0; begin < hidden; begin += columns) {
      const int64_t n = std::min(columns, hidden - begin);
      for (int64_t t = 0; t < rows; ++t) {
        if (ids[t] < 0 || ids[t] >= vocab) continue;
        const Real* __restrict from = dx + t * hidden + begin;
        Real* __restrict to = dtable + ids[t] * hidden + begin;
        for (int64_t i = 0; i < n; ++i) to[i] += from[i];
      }
    }
  }
}

}  // namespace busway

BUSWAY_OPERATOR(busway_cross_entropy, cross_entropy, "ri")
BUSWAY_OPERATOR(busway_cross_entropy_backward, cross_entropy_backward, "ri")
BUSWAY_OPERATOR(busway_embedding, embedding, "ir")
BUSWAY_OPERATOR(busway_embedding_backward, embedding_backward, "ir")
