// Grouped-query attention without a matrix of all scores.
//
// A task is one key head of one sequence with the query heads that share it, so that sums over those run in one order
// whatever the number of threads. Queries go by blocks of `kQueries`, keys by blocks too: forward with a running
// maximum and sum (Milakov and Gimelshein 2018, arXiv:1805.02867), backward with probabilities that come back from the
// saved log-sum-exp (Dao 2022, arXiv:2205.14135).
//
// What is attended to comes from a `Source`, which is a `Sizes` with these members:
//   query(b, h, t, out), key(b, kv_head, u, out), value(b, kv_head, u, out)   a head's row, queries times the scale
//   span(b, t)                                                                the keys that query t sees
//   start(b, h, t, sum, top, total)                                           what a query's sums start from
//   store_query, store_key, store_value(b, head, row, gradient)               gradients of what the first line gives
#pragma once

#include <omp.h>

#include <cmath>
#include <limits>

#include "exponential.h"
#include "operator.h"
#include "tile.h"

namespace busway {

constexpr int64_t kQueries = 64;
constexpr int64_t kForwardKeys = 256;
constexpr int64_t kBackwardKeys = 128;

// Outputs are [batch queries, heads dim], their log-sum-exps [batch, heads, queries].
template <class Real_>
struct Sizes {
  using Real = Real_;
  int64_t batch, queries, keys, heads, kv_heads, dim;
  Real scale;

  static constexpr int64_t step = Lanes<Real>::panel > kRows ? Lanes<Real>::panel : kRows;

  int64_t groups() const { return heads / kv_heads; }
  int64_t padded_keys() const { return round_up(keys, step); }
  int64_t stride() const { return row_stride<Real>(dim); }
  int64_t output(int64_t b, int64_t h, int64_t t) const { return ((b * queries + t) * heads + h) * dim; }
  int64_t lse(int64_t b, int64_t h, int64_t t) const { return (b * heads + h) * queries + t; }
};

// Keys [first, last); none unless first < last.
struct Span {
  int64_t first = std::numeric_limits<int64_t>::max(), last = 0;

  void widen(const Span& other) {
    if (other.first >= other.last) return;
    first = std::min(first, other.first);
    last = std::max(last, other.last);
  }
  bool meets(int64_t begin, int64_t end) const { return first < end && last > begin; }
};

// What a block of queries sees: each of them, each kRows of them, and all.
struct Spans {
  Span query[kQueries], group[kQueries / kRows], all;

  template <class Source>
  Spans(const Source& source, int64_t b, int64_t begin, int64_t count) {
    for (int64_t r = 0; r < count; ++r) {
      query[r].widen(source.span(b, begin + r));
      group[r / kRows].widen(query[r]);
    }
    for (const Span& span : group) all.widen(span);
  }
};

// Hands out pieces of a thread's scratch memory.
template <class Real>
struct Arena {
  Real* next;
  Real* take(int64_t n) { return (next += round_up(n, 16)) - round_up(n, 16); }
};

// Writes row-major heads as the panels of their transpose, [dim, padded_keys]; zero past the keys.
template <class Real>
void transpose(const Sizes<Real>& sizes, const Real* rows, Real* panels) {
  constexpr int64_t panel = Lanes<Real>::panel;
  const int64_t dim = sizes.dim, stride = sizes.stride(), padded = sizes.padded_keys();
  for (int64_t t = 0; t < padded; ++t) {
    Real* column = panels + t / panel * panel * dim + t % panel;
    for (int64_t d = 0; d < dim; ++d) column[d * panel] = t < sizes.keys ? rows[t * stride + d] : Real(0);
  }
}

// What a row of scores lets its query see: columns [from, to), widened to whole vectors [begin, end). All 0: nothing.
struct Window {
  int64_t from, to, begin, end;
};

// Columns count from key `key`.
template <class Real>
Window window(const Span& span, int64_t key, int64_t columns) {
  constexpr int64_t lanes = Lanes<Real>::count;
  const int64_t from = std::max<int64_t>(span.first - key, 0), to = std::min(span.last - key, columns);
  if (from >= to) return {0, 0, 0, 0};
  return {from, to, from / lanes * lanes, round_up(to, lanes)};
}

// Scores that exp takes to 0, in the hidden part of the window.
template <class Real>
void hide(const Window& seen, Real* row) {
  std::fill(row + seen.begin, row + seen.from, std::numeric_limits<Real>::lowest());
  std::fill(row + seen.to, row + seen.end, std::numeric_limits<Real>::lowest());
}

// Zeros outside the window, up to `columns`.
template <class Real>
void clear(const Window& seen, int64_t columns, Real* row) {
  std::fill(row, row + seen.begin, Real(0));
  std::fill(row + std::min(seen.end, columns), row + columns, Real(0));
}

template <class Source>
struct Forward {
  using Real = typename Source::Real;
  const Source& source;
  const int64_t dim, stride;
  Real *keys, *values, *q, *sums, *scores;
  Real top[kQueries], total[kQueries];

  static int64_t size(const Source& source) {
    return source.padded_keys() * (source.dim + source.stride()) + 2 * kQueries * source.stride() +
           kRows * kForwardKeys + 5 * 16;
  }
  Forward(const Source& source, Real* scratch) : source(source), dim(source.dim), stride(source.stride()) {
    Arena<Real> arena{scratch};
    keys = arena.take(source.padded_keys() * dim);
    values = arena.take(source.padded_keys() * stride);
    q = arena.take(kQueries * stride);
    sums = arena.take(kQueries * stride);
    scores = arena.take(kRows * kForwardKeys);
  }

  void load_keys(int64_t b, int64_t kv_head) {
    for (int64_t u = 0; u < source.keys; ++u) source.key(b, kv_head, u, row(values, u));
    transpose<Real>(source, values, keys);
    for (int64_t u = 0; u < source.keys; ++u) source.value(b, kv_head, u, row(values, u));
  }

  // One block of queries of head h: o and lse.
  void run(int64_t b, int64_t h, int64_t begin, Real* o, Real* lse) {
    const int64_t count = std::min(kQueries, source.queries - begin), rows = round_up(count, kRows);
    const Spans spans(source, b, begin, count);
    for (int64_t r = 0; r < count; ++r) {
      source.query(b, h, begin + r, row(q, r));
      source.start(b, h, begin + r, row(sums, r), top[r], total[r]);
    }
    std::fill(row(q, count), row(q, rows), Real(0));
    std::fill(row(sums, count), row(sums, rows), Real(0));
    for (int64_t key = spans.all.first / source.step * source.step; key < spans.all.last; key += kForwardKeys)
      for (int64_t g = 0; g < rows; g += kRows) add_keys(spans, g, std::min<int64_t>(kRows, count - g), key);
    for (int64_t r = 0; r < count; ++r) {
      const Real inverse = 1 / total[r], *sum = row(sums, r);
      Real* out = o + source.output(b, h, begin + r);
#pragma omp simd
      for (int64_t d = 0; d < dim; ++d) out[d] = sum[d] * inverse;
      lse[source.lse(b, h, begin + r)] = top[r] + std::log(total[r]);
    }
  }

  // What the block of keys at `key` adds to queries [g, g + live).
  void add_keys(const Spans& spans, int64_t g, int64_t live, int64_t key) {
    const Span& group = spans.group[g / kRows];
    if (!group.meets(key, key + kForwardKeys)) return;
    const int64_t columns = std::min(key + kForwardKeys, group.last) - key;
    multiply_panels(row(q, g), stride, keys, key, columns, dim, scores, kForwardKeys);
    for (int64_t r = 0; r < live; ++r) {
      const auto seen = window<Real>(spans.query[g + r], key, columns);
      const Real correction = take(scores + r * kForwardKeys, seen, columns, top[g + r], total[g + r]);
      if (correction != 1) {
        Real* sum = row(sums, g + r);
#pragma omp simd
        for (int64_t d = 0; d < dim; ++d) sum[d] *= correction;
      }
    }
    multiply_add(scores, kForwardKeys, 1, row(values, key), stride, columns, dim, row(sums, g), stride);
  }

  // Turns a row of scores into exponentials relative to the new top; returns what earlier sums must be scaled by.
  static Real take(Real* row, const Window& seen, int64_t columns, Real& top, Real& total) {
    Real correction = 1;
    if (seen.end > 0) {
      hide(seen, row);
      const Real higher = maximum(row + seen.begin, seen.end - seen.begin, top);
      if (higher > top) correction = exponential_below(top - higher);
#pragma omp simd
      for (int64_t j = seen.begin; j < seen.end; ++j) row[j] = exponential_below(row[j] - higher);
      top = higher;
      total = total * correction + sum(row + seen.begin, seen.end - seen.begin);
    }
    clear(seen, columns, row);
    return correction;
  }

  Real* row(Real* matrix, int64_t r) const { return matrix + r * stride; }
};

template <class Source>
struct Backward {
  using Real = typename Source::Real;
  static constexpr int64_t score_row = kBackwardKeys + Lanes<Real>::count;  // read by columns too: no power of two
  const Source& source;
  const int64_t dim, stride;
  const Real *o, *lse, *grad;
  Real *keys_t, *values_t, *keys, *dk, *dv, *q, *dout, *dq, *p, *ds;
  Real delta[kQueries], block_lse[kQueries];

  static int64_t size(const Source& source) {
    return source.padded_keys() * (2 * source.dim + 3 * source.stride()) + 3 * kQueries * source.stride() +
           2 * kQueries * score_row + 10 * 16;
  }
  Backward(const Source& source, const Real* o, const Real* lse, const Real* grad, Real* scratch)
      : source(source), dim(source.dim), stride(source.stride()), o(o), lse(lse), grad(grad) {
    Arena<Real> arena{scratch};
    for (Real** matrix : {&keys_t, &values_t}) *matrix = arena.take(source.padded_keys() * dim);
    for (Real** matrix : {&keys, &dk, &dv}) *matrix = arena.take(source.padded_keys() * stride);
    for (Real** matrix : {&q, &dout, &dq}) *matrix = arena.take(kQueries * stride);
    for (Real** matrix : {&p, &ds}) *matrix = arena.take(kQueries * score_row);
  }

  void load_keys(int64_t b, int64_t kv_head) {
    for (int64_t u = 0; u < source.keys; ++u) source.value(b, kv_head, u, row(keys, u));
    transpose<Real>(source, keys, values_t);
    for (int64_t u = 0; u < source.keys; ++u) source.key(b, kv_head, u, row(keys, u));
    transpose<Real>(source, keys, keys_t);
    std::fill(dk, row(dk, source.padded_keys()), Real(0));
    std::fill(dv, row(dv, source.padded_keys()), Real(0));
  }

  void store_keys(int64_t b, int64_t kv_head) {
    for (int64_t u = 0; u < source.keys; ++u) {
      source.store_key(b, kv_head, u, row(dk, u));
      source.store_value(b, kv_head, u, row(dv, u));
    }
  }

  // One block of queries of head h: its dq, and its share of dk and dv.
  void run(int64_t b, int64_t h, int64_t begin) {
    const int64_t count = std::min(kQueries, source.queries - begin), rows = round_up(count, kRows);
    const Spans spans(source, b, begin, count);
    load_queries(b, h, begin, count, rows);
    int64_t first = 0;  // queries before it see no key from here on
    for (int64_t key = spans.all.first / kBackwardKeys * kBackwardKeys; key < spans.all.last; key += kBackwardKeys) {
      const int64_t columns = std::min(kBackwardKeys, spans.all.last - key);
      for (int64_t g = 0; g < rows; g += kRows)
        score(spans, g, std::min<int64_t>(kRows, count - g), key, round_up(columns, source.step));
      for (int64_t j = 0; j < columns; j += kRows) {
        while (spans.group[first / kRows].last <= key + j) first += kRows;
        add_key_gradients(spans, first, rows, key, j);
      }
    }
    for (int64_t r = 0; r < count; ++r) source.store_query(b, h, begin + r, row(dq, r));
  }

  void load_queries(int64_t b, int64_t h, int64_t begin, int64_t count, int64_t rows) {
    for (int64_t r = 0; r < count; ++r) {
      const int64_t t = begin + r, at = source.output(b, h, t);
      source.query(b, h, t, row(q, r));
      copy_row(grad + at, dim, row(dout, r));
      delta[r] = dot(grad + at, o + at, dim);
      block_lse[r] = lse[source.lse(b, h, t)];
    }
    std::fill(row(q, count), row(q, rows), Real(0));
    std::fill(row(dout, count), row(dout, rows), Real(0));
    std::fill(dq, row(dq, rows), Real(0));
  }

  // p and ds of queries [g, g + live) against keys [key, key + columns), and what these add to their dq.
  void score(const Spans& spans, int64_t g, int64_t live, int64_t key, int64_t columns) {
    const Span& group = spans.group[g / kRows];
    Real *p_rows = p + g * score_row, *ds_rows = ds + g * score_row;
    const bool any = group.meets(key, key + columns);
    const int64_t seen_end = any ? std::min(columns, group.last - key) : 0, scored = round_up(seen_end, source.step);
    multiply_panels(row(q, g), stride, keys_t, key, scored, dim, p_rows, score_row);
    multiply_panels(row(dout, g), stride, values_t, key, scored, dim, ds_rows, score_row);
    for (int64_t r = 0; r < kRows; ++r) {
      const auto seen = window<Real>(r < live ? spans.query[g + r] : Span(), key, scored);
      probabilities(p_rows + r * score_row, ds_rows + r * score_row, seen, columns, block_lse[g + r], delta[g + r]);
    }
    multiply_add(ds_rows, score_row, 1, row(keys, key), stride, seen_end, dim, row(dq, g), stride);
  }

  // p = exp(s - lse) and ds = p (dp - delta) of one query; zero where it does not see.
  static void probabilities(Real* __restrict p, Real* __restrict ds, const Window& seen, int64_t columns, Real lse,
                            Real delta) {
    hide(seen, p);
#pragma omp simd
    for (int64_t j = seen.begin; j < seen.end; ++j) {
      p[j] = exponential_below(p[j] - lse);
      ds[j] = p[j] * (ds[j] - delta);
    }
    clear(seen, columns, p);
    clear(seen, columns, ds);
  }

  // What queries [first, last) add to dk and dv of keys [key + j, key + j + kRows); the last of them may begin later.
  void add_key_gradients(const Spans& spans, int64_t first, int64_t last, int64_t key, int64_t j) {
    while (first < last && spans.group[last / kRows - 1].first >= key + j + kRows) last -= kRows;
    const int64_t corner = first * score_row + j;
    multiply_add(ds + corner, 1, score_row, row(q, first), stride, last - first, dim, row(dk, key + j), stride);
    multiply_add(p + corner, 1, score_row, row(dout, first), stride, last - first, dim, row(dv, key + j), stride);
  }

  Real* row(Real* matrix, int64_t r) const { return matrix + r * stride; }
};

// -> o and lse
template <class Source>
void attend(const Source& source, typename Source::Real* o, typename Source::Real* lse) {
  using Real = typename Source::Real;
  const int64_t size = Forward<Source>::size(source);
  Scratch<Real> scratch(omp_get_max_threads() * size);
#pragma omp parallel
  {
    Forward<Source> forward(source, scratch.get() + omp_get_thread_num() * size);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < source.batch * source.kv_heads; ++task) {
      const int64_t b = task / source.kv_heads, kv_head = task % source.kv_heads, groups = source.groups();
      forward.load_keys(b, kv_head);
      for (int64_t h = kv_head * groups; h < (kv_head + 1) * groups; ++h)
        for (int64_t begin = 0; begin < source.queries; begin += kQueries) forward.run(b, h, begin, o, lse);
    }
  }
}

// From o, lse and the gradient of o, the gradients to where `source` stores them.
template <class Source>
void attend_backward(const Source& source, const typename Source::Real* o, const typename Source::Real* lse,
                     const typename Source::Real* grad) {
  using Real = typename Source::Real;
  const int64_t size = Backward<Source>::size(source);
  Scratch<Real> scratch(omp_get_max_threads() * size);
#pragma omp parallel
  {
    Backward<Source> backward(source, o, lse, grad, scratch.get() + omp_get_thread_num() * size);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < source.batch * source.kv_heads; ++task) {
      const int64_t b = task / source.kv_heads, kv_head = task % source.kv_heads, groups = source.groups();
      backward.load_keys(b, kv_head);
      for (int64_t h = kv_head * groups; h < (kv_head + 1) * groups; ++h)
        for (int64_t begin = 0; begin < source.queries; begin += kQueries) backward.run(b, h, begin);
      backward.store_keys(b, kv_head);
    }
  }
}

}  // namespace busway
