// The global gradient norm and AdamW, over lists of tensors.
#include <cmath>
#include <vector>

#include "operator.h"

namespace busway {

// All tensors cut into pieces of one size, so that small and large ones share the threads evenly.
struct Piece {
  int tensor;
  int64_t begin, end;
};

inline std::vector<Piece> pieces(const Call& call, int first, int count) {
  constexpr int64_t size = 16384;
  std::vector<Piece> all;
  for (int k = 0; k < count; ++k) {
    const int64_t n = call.size(first + k);
    for (int64_t begin = 0; begin < n; begin += size) all.push_back({k, begin, std::min(n, begin + size)});
  }
  return all;
}

// gradients... -> [1], accumulated in double
template <class Real>
void square_sum(const Call& call) {
  const std::vector<Piece> all = pieces(call, 0, call.count - 1);
  const int64_t count = all.size();
  std::vector<double> sums(count);
#pragma omp parallel for
  for (int64_t p = 0; p < count; ++p) {
    const Real* g = call.tensor<Real>(all[p].tensor);
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = all[p].begin; i < all[p].end; ++i) sum += static_cast<double>(g[i]) * g[i];
    sums[p] = sum;
  }
  double total = 0;
  for (double sum : sums) total += sum;
  *call.tensor<Real>(call.count - 1) = static_cast<Real>(total);
}

// (beta1, beta2, eps) float64, decays [n], factor, lr, step, n weights, n first moments, n second moments,
// n gradients -> [1], the step. Weights and moments change in place.
template <class Real>
void adamw(const Call& call) {
  constexpr int fixed = 5;
  const int n = (call.count - fixed - 1) / 4;
  const double* hyper = call.tensor<double>(0);
  const Real* decays = call.tensor<Real>(1);
  const double lr = call.number(3), step = call.number(4);
  const Real factor = call.number(2), beta1 = hyper[0], rest1 = 1 - hyper[0], beta2 = hyper[1], rest2 = 1 - hyper[1],
             eps = hyper[2];
  const Real rate = lr / (1 - std::pow(hyper[0], step)), root2 = 1 / std::sqrt(1 - std::pow(hyper[1], step));
  const std::vector<Piece> all = pieces(call, fixed, n);
  const int64_t count = all.size();
#pragma omp parallel for
  for (int64_t p = 0; p < count; ++p) {
    const int k = fixed + all[p].tensor;
    const int64_t begin = all[p].begin, length = all[p].end - begin;
    Real* __restrict w = call.tensor<Real>(k) + begin;
    Real* __restrict m = call.tensor<Real>(k + n) + begin;
    Real* __restrict v = call.tensor<Real>(k + 2 * n) + begin;
    const Real* __restrict gradient = call.tensor<Real>(k + 3 * n) + begin;
    const Real kept = 1 - lr * decays[all[p].tensor];
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) {
      const Real g = gradient[i] * factor;
      m[i] = m[i] * beta1 + g * rest1;
      v[i] = v[i] * beta2 + g * g * rest2;
      w[i] = w[i] * kept - rate * m[i] / (std::sqrt(v[i]) * root2 + eps);
    }
  }
  *call.tensor<Real>(call.count - 1) = step;
}

}  // namespace busway

BUSWAY_OPERATOR(busway_square_sum, square_sum, "r")
BUSWAY_OPERATOR(busway_adamw, adamw, "drnnn")
