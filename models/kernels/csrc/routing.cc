// Which experts a token goes to, and the way of its copies there and back.
#include <cmath>
#include <vector>

#include "operator.h"

namespace busway {

// The router's rule, as a row of doubles: see `models.kernels.plain_experts.Routing`.
struct Rule {
  int64_t groups, top_groups;
  bool sigmoid, normalise, uniform;
  double scale;
  int64_t first, every;  // the first token's number in whole sequences, and tokens of one

  Rule(const double* row, int64_t tokens, int64_t every)
      : groups(row[0]), top_groups(row[1]), sigmoid(row[2]), normalise(row[3]), uniform(row[4]), scale(row[5]),
        first(row[6] * tokens), every(every) {}
};

constexpr double kTiny = 1e-20;  // added to a sum of scores, as transformers does

// Scores of one token: the softmax of its logits, or their sigmoids. `shares` gets what adds up to one: the scores over
// the sum that is returned.
template <class Real>
Real scores_of(const Real* logits, int64_t experts, bool sigmoid, Real* scores, Real* shares) {
  Real total = 0;
  if (sigmoid) {
    for (int64_t e = 0; e < experts; ++e) total += scores[e] = 1 / (1 + std::exp(-logits[e]));
    for (int64_t e = 0; e < experts; ++e) shares[e] = scores[e] / total;
    return total;
  } else {
    const Real top = *std::max_element(logits, logits + experts);
    for (int64_t e = 0; e < experts; ++e) total += scores[e] = std::exp(logits[e] - top);
    for (int64_t e = 0; e < experts; ++e) shares[e] = scores[e] /= total;
    return 1;
  }
}

// The places of the `count` largest of n values, the largest first and of equal ones the first.
template <class Real, class Index>
void largest(Real* values, int64_t n, int64_t count, Index* places) {
  for (int64_t k = 0; k < count; ++k) {
    int64_t best = 0;
    for (int64_t i = 1; i < n; ++i)
      if (values[i] > values[best]) best = i;
    places[k] = static_cast<Index>(best);
    values[best] = -std::numeric_limits<Real>::infinity();
  }
}

// Takes the experts outside the best groups out of the choice. A group is worth its two best.
template <class Real>
void limit_to_groups(const Rule& rule, int64_t experts, Real* choice, std::vector<Real>& worth, std::vector<int64_t>& best) {
  const int64_t size = experts / rule.groups;
  worth.resize(rule.groups);
  best.resize(rule.top_groups);
  for (int64_t g = 0; g < rule.groups; ++g) {
    const Real* group = choice + g * size;
    Real first = -std::numeric_limits<Real>::infinity(), second = first;
    for (int64_t i = 0; i < size; ++i) {
      if (group[i] > first) {
        second = first;
        first = group[i];
      } else if (group[i] > second) {
        second = group[i];
      }
    }
    worth[g] = size > 1 ? first + second : first;
  }
  largest(worth.data(), rule.groups, rule.top_groups, best.data());
  for (int64_t g = 0; g < rule.groups; ++g)
    if (std::find(best.begin(), best.end(), g) == best.end())
      std::fill_n(choice + g * size, size, -std::numeric_limits<Real>::infinity());
}

// logits [T, E], bias [E], rule [7], cos [S, R] (its shape) -> indices [T, K] int32, weights [T, K], load [B, 2 E],
// entropy [1]. The load of a sequence is how many copies each expert gets, and the sum of the tokens' shares of it.
template <class Real>
void routing(const Call& call) {
  const int64_t tokens = call.dim(0, 0), experts = call.dim(0, 1), top_k = call.dim(4, 1);
  const Rule rule(call.tensor<double>(2), tokens, call.dim(3, 0));
  const Real *logits = call.tensor<Real>(0), *bias = call.tensor<Real>(1);
  int32_t* indices = call.tensor<int32_t>(4);
  Real *weights = call.tensor<Real>(5), *load = call.tensor<Real>(6), *entropy = call.tensor<Real>(7);
  Scratch<Real> shares_of_all(tokens * experts), entropies(tokens);
#pragma omp parallel
  {
    std::vector<Real> scores(experts), choice(experts), worth;
    std::vector<int64_t> best;
#pragma omp for
    for (int64_t t = 0; t < tokens; ++t) {
      Real* shares = shares_of_all.get() + t * experts;
      scores_of(logits + t * experts, experts, rule.sigmoid, scores.data(), shares);
      for (int64_t e = 0; e < experts; ++e) {
        choice[e] = scores[e] + bias[e];
        // Choices stay distinct where nothing compares, so that no rank gets more copies than it has room for.
        if (std::isnan(choice[e])) choice[e] = std::numeric_limits<Real>::lowest() / 4;
      }
      if (rule.uniform) {
        for (int64_t k = 0; k < top_k; ++k) indices[t * top_k + k] = ((rule.first + t) * top_k + k) % experts;
      } else {
        if (rule.top_groups < rule.groups) limit_to_groups(rule, experts, choice.data(), worth, best);
        largest(choice.data(), experts, top_k, indices + t * top_k);
      }
      Real total = 0, bits = 0;
      for (int64_t k = 0; k < top_k; ++k) total += scores[indices[t * top_k + k]];
      const Real factor = static_cast<Real>(rule.normalise ? rule.scale / (total + kTiny) : rule.scale);
      for (int64_t k = 0; k < top_k; ++k) weights[t * top_k + k] = scores[indices[t * top_k + k]] * factor;
      for (int64_t e = 0; e < experts; ++e)
        if (shares[e] > 0) bits -= shares[e] * std::log(shares[e]);
      entropies.get()[t] = bits;
    }
  }
  std::fill_n(load, call.size(6), Real(0));
  *entropy = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    Real *counts = load + (rule.first + t) / rule.every * 2 * experts, *mass = counts + experts;
    const Real* shares = shares_of_all.get() + t * experts;
    for (int64_t k = 0; k < top_k; ++k) counts[indices[t * top_k + k]] += 1;
    for (int64_t e = 0; e < experts; ++e) mass[e] += shares[e];
    *entropy += entropies.get()[t];
  }
}

// logits [T, E], indices [T, K] int32, dweights [T, K], dmass [B, E], rule [7], cos [S, R] (its shape)
// -> dlogits [T, E]
template <class Real>
void routing_backward(const Call& call) {
  const Rule rule(call.tensor<double>(4), call.dim(0, 0), call.dim(5, 0));
  const Real *logits = call.tensor<Real>(0), *dweights = call.tensor<Real>(2), *dmass = call.tensor<Real>(3);
  const int32_t* indices = call.tensor<int32_t>(1);
  Real* dlogits = call.tensor<Real>(6);
  const int64_t tokens = call.dim(0, 0), experts = call.dim(0, 1), top_k = call.dim(1, 1);
#pragma omp parallel
  {
    std::vector<Real> scores(experts), shares(experts), dscores(experts);
#pragma omp for
    for (int64_t t = 0; t < tokens; ++t) {
      const Real sum = scores_of(logits + t * experts, experts, rule.sigmoid, scores.data(), shares.data());
      const int32_t* chosen = indices + t * top_k;
      const Real *dw = dweights + t * top_k, *dshares = dmass + (rule.first + t) / rule.every * experts;
      Real total = kTiny, pull = 0, flow = 0;
      for (int64_t k = 0; k < top_k; ++k) {
        total += scores[chosen[k]];
        pull += dw[k] * scores[chosen[k]];
      }
      for (int64_t e = 0; e < experts; ++e) flow += dshares[e] * shares[e];
      for (int64_t e = 0; e < experts; ++e) dscores[e] = rule.sigmoid ? (dshares[e] - flow) / sum : dshares[e];
      for (int64_t k = 0; k < top_k; ++k)
        dscores[chosen[k]] += static_cast<Real>(rule.scale) * (rule.normalise ? (dw[k] - pull / total) / total : dw[k]);
      Real* to = dlogits + t * experts;
      if (rule.sigmoid) {
        for (int64_t e = 0; e < experts; ++e) to[e] = dscores[e] * scores[e] * (1 - scores[e]);
      } else {
        Real mean = 0;
        for (int64_t e = 0; e < experts; ++e) mean += dscores[e] * scores[e];
        for (int64_t e = 0; e < experts; ++e) to[e] = (dscores[e] - mean) * scores[e];
      }
    }
  }
}

// keys [N] int32, bounds [2] int32 (the first bucket's key, and how many of the keys are there), buckets [E] int32 (its
// shape) -> places [N] int32, ends [E] int32: where each stands once they are sorted by bucket, those of a bucket in
// their order; -1 for keys of no bucket.
template <class>
void sort_places(const Call& call) {
  const int32_t *keys = call.tensor<int32_t>(0), *bounds = call.tensor<int32_t>(1);
  int32_t *places = call.tensor<int32_t>(3), *ends = call.tensor<int32_t>(4);
  const int64_t n = call.size(0), buckets = call.size(2), there = bounds[1];
  std::vector<int32_t> next(buckets + 1, 0);
  const auto bucket = [&](int64_t i) -> int64_t {
    const int64_t key = int64_t(keys[i]) - bounds[0];
    return i < there && key >= 0 && key < buckets ? key : -1;
  };
  for (int64_t i = 0; i < n; ++i)
    if (bucket(i) >= 0) ++next[bucket(i) + 1];
  for (int64_t e = 0; e < buckets; ++e) ends[e] = next[e + 1] += next[e];
  for (int64_t i = 0; i < n; ++i) places[i] = bucket(i) >= 0 ? next[bucket(i)]++ : -1;
}

// x [T, H], places [T K] int32 -> rows [T K, H]: copy i of token i / K goes to its place; -1: nowhere. Rows in which
// nothing is put keep whatever they hold.
template <class Real>
void spread_rows(const Call& call) {
  const Real* x = call.tensor<Real>(0);
  const int32_t* places = call.tensor<int32_t>(1);
  Real* rows = call.tensor<Real>(2);
  const int64_t hidden = call.dim(0, 1), copies = call.size(1), each = copies / call.dim(0, 0);
#pragma omp parallel for
  for (int64_t i = 0; i < copies; ++i)
    if (places[i] >= 0) std::copy_n(x + i / each * hidden, hidden, rows + places[i] * hidden);
}

// rows [R, H], places [T K] int32, x [T, H] (its shape) -> y [T, H]: the sum of a token's rows, in the order of k.
template <class Real>
void collect_rows(const Call& call) {
  const Real* rows = call.tensor<Real>(0);
  const int32_t* places = call.tensor<int32_t>(1);
  Real* y = call.tensor<Real>(3);
  const int64_t tokens = call.dim(3, 0), hidden = call.dim(3, 1), each = call.size(1) / tokens;
#pragma omp parallel for
  for (int64_t t = 0; t < tokens; ++t) {
    Real* __restrict to = y + t * hidden;
    std::fill_n(to, hidden, Real(0));
    for (int64_t k = 0; k < each; ++k) {
      if (places[t * each + k] < 0) continue;
      const Real* __restrict from = rows + places[t * each + k] * hidden;
      for (int64_t i = 0; i < hidden; ++i) to[i] += from[i];
    }
  }
}

// rows [R, H], places [N] int32 -> y [N, H]: the row at each place; -1: not written.
template <class Real>
void take_rows(const Call& call) {
  const Real* rows = call.tensor<Real>(0);
  const int32_t* places = call.tensor<int32_t>(1);
  Real* y = call.tensor<Real>(2);
  const int64_t hidden = call.dim(0, 1), n = call.size(1);
#pragma omp parallel for
  for (int64_t i = 0; i < n; ++i)
    if (places[i] >= 0) std::copy_n(rows + places[i] * hidden, hidden, y + i * hidden);
}

}  // namespace busway

BUSWAY_OPERATOR(busway_routing, routing, "rrdri")
BUSWAY_OPERATOR(busway_routing_backward, routing_backward, "rirrdr")
BUSWAY_OPERATOR(busway_sort_places, sort_places, "iiiii")
BUSWAY_OPERATOR(busway_spread_rows, spread_rows, "ri")
BUSWAY_OPERATOR(busway_collect_rows, collect_rows, "ri")
BUSWAY_OPERATOR(busway_take_rows, take_rows, "ri")
