// Rotary embedding and causal grouped-query attention on packed projections, without an S x S matrix.
//
// A task is one key head of one sequence with the query heads that share it, so that sums over those run in one order
// whatever the number of threads. Queries go by blocks of `kQueries`, keys by blocks too: forward with a running
// maximum and sum (Milakov and Gimelshein 2018, arXiv:1805.02867), backward with probabilities that come back from the
// saved log-sum-exp (Dao 2022, arXiv:2205.14135).
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

template <class Real>
struct Shape {
  const Real *qkv, *cos, *sin;
  const int32_t* first_key;
  Real scale;
  int64_t batch, seq, heads, kv_heads, groups, dim, half, width, out_width;
  int64_t keys;    // seq rounded up to whole tiles
  int64_t stride;  // of a row-major matrix of heads

  static constexpr int64_t step = Lanes<Real>::panel > kRows ? Lanes<Real>::panel : kRows;

  // Inputs 0 to 3 are qkv, cos, sin and first_key; `out_width` is heads * dim.
  Shape(const Call& call, int64_t out_width, double scale)
      : qkv(call.tensor<Real>(0)), cos(call.tensor<Real>(1)), sin(call.tensor<Real>(2)),
        first_key(call.tensor<int32_t>(3)), scale(scale), seq(call.dim(1, 0)), half(call.dim(1, 1)),
        width(call.dim(0, 1)), out_width(out_width) {
    dim = 2 * half;
    batch = call.dim(0, 0) / seq;
    heads = out_width / dim;
    kv_heads = (width / dim - heads) / 2;
    groups = heads / kv_heads;
    keys = round_up(seq, step);
    stride = row_stride<Real>(dim);
  }

  int64_t projection(int64_t b, int64_t token, int64_t head) const { return (b * seq + token) * width + head * dim; }
  int64_t output(int64_t b, int64_t token, int64_t head) const { return (b * seq + token) * out_width + head * dim; }

  // Turns a head by its token's angles; direction -1 turns it back.
  void rotate(const Real* __restrict x, int64_t token, Real factor, Real direction, Real* __restrict out) const {
    const Real *__restrict c = cos + token * half, *__restrict s = sin + token * half;
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      const Real turn_cos = c[i] * factor, turn_sin = s[i] * factor * direction;
      out[i] = x[i] * turn_cos - x[i + half] * turn_sin;
      out[i + half] = x[i + half] * turn_cos + x[i] * turn_sin;
    }
  }

  // The first key that any of the queries [begin, begin + count) sees, down to a multiple of `to`.
  int64_t first_seen(int64_t b, int64_t begin, int64_t count, int64_t to) const {
    const int32_t* first = first_key + b * seq + begin;
    return *std::min_element(first, first + count) / to * to;
  }
};

// Hands out pieces of a thread's scratch memory.
template <class Real>
struct Arena {
  Real* next;
  Real* take(int64_t n) { return (next += round_up(n, 16)) - round_up(n, 16); }
};

// Writes row-major heads as the panels of their transpose, [dim, keys]; zero past the sequence.
template <class Real>
void transpose(const Shape<Real>& shape, const Real* rows, Real* panels) {
  constexpr int64_t panel = Lanes<Real>::panel;
  for (int64_t t = 0; t < shape.keys; ++t) {
    Real* column = panels + t / panel * panel * shape.dim + t % panel;
    for (int64_t d = 0; d < shape.dim; ++d) column[d * panel] = t < shape.seq ? rows[t * shape.stride + d] : Real(0);
  }
}

// What a row of scores lets its query see: columns [from, to), widened to whole vectors [begin, end). All 0: nothing.
struct Window {
  int64_t from, to, begin, end;
};

template <class Real>
Window window(int64_t first, int64_t last, int64_t columns) {
  constexpr int64_t lanes = Lanes<Real>::count;
  const int64_t from = std::max<int64_t>(first, 0), to = std::min(last, columns);
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

template <class Real>
struct Forward {
  const Shape<Real>& shape;
  Real *keys, *values, *q, *sums, *scores;
  Real top[kQueries], total[kQueries];

  static int64_t size(const Shape<Real>& shape) {
    return shape.keys * (shape.dim + shape.stride) + 2 * kQueries * shape.stride + kRows * kForwardKeys + 5 * 16;
  }
  Forward(const Shape<Real>& shape, Real* scratch) : shape(shape) {
    Arena<Real> arena{scratch};
    keys = arena.take(shape.keys * shape.dim);
    values = arena.take(shape.keys * shape.stride);
    q = arena.take(kQueries * shape.stride);
    sums = arena.take(kQueries * shape.stride);
    scores = arena.take(kRows * kForwardKeys);
  }

  void load_keys(int64_t b, int64_t kv_head) {
    const int64_t h = shape.heads + kv_head;
    for (int64_t t = 0; t < shape.seq; ++t)
      shape.rotate(shape.qkv + shape.projection(b, t, h), t, 1, 1, row(values, t));
    transpose(shape, values, keys);
    for (int64_t t = 0; t < shape.seq; ++t)
      copy_row(shape.qkv + shape.projection(b, t, h + shape.kv_heads), shape.dim, row(values, t));
  }

  // One block of queries of head h: o and lse.
  void run(int64_t b, int64_t h, int64_t begin, Real* o, Real* lse) {
    const int64_t count = std::min(kQueries, shape.seq - begin), rows = round_up(count, kRows);
    std::fill(row(q, count), row(q, rows), Real(0));
    std::fill(sums, row(sums, rows), Real(0));
    for (int64_t r = 0; r < count; ++r) {
      top[r] = -std::numeric_limits<Real>::infinity();
      total[r] = 0;
      shape.rotate(shape.qkv + shape.projection(b, begin + r, h), begin + r, shape.scale, 1, row(q, r));
    }
    const int64_t end = begin + count;
    for (int64_t key = shape.first_seen(b, begin, count, shape.step); key < end; key += kForwardKeys)
      for (int64_t g = 0; g < rows; g += kRows) add_keys(b, begin, g, std::min<int64_t>(kRows, count - g), key);
    for (int64_t r = 0; r < count; ++r) {
      const Real inverse = 1 / total[r], *sum = row(sums, r);
      Real* out = o + shape.output(b, begin + r, h);
#pragma omp simd
      for (int64_t d = 0; d < shape.dim; ++d) out[d] = sum[d] * inverse;
      lse[(b * shape.heads + h) * shape.seq + begin + r] = top[r] + std::log(total[r]);
    }
  }

  // What the block of keys at `key` adds to queries [g, g + live) of the block at `begin`.
  void add_keys(int64_t b, int64_t begin, int64_t g, int64_t live, int64_t key) {
    const int64_t columns = std::min(key + kForwardKeys, begin + g + live) - key;
    if (columns <= 0) return;
    multiply_panels(row(q, g), shape.stride, keys, key, columns, shape.dim, scores, kForwardKeys);
    for (int64_t r = 0; r < live; ++r) {
      const int64_t token = begin + g + r;
      const auto seen = window<Real>(shape.first_key[b * shape.seq + token] - key, token + 1 - key, columns);
      const Real correction = take(scores + r * kForwardKeys, seen, columns, top[g + r], total[g + r]);
      if (correction != 1) {
        Real* sum = row(sums, g + r);
#pragma omp simd
        for (int64_t d = 0; d < shape.dim; ++d) sum[d] *= correction;
      }
    }
    multiply_add(scores, kForwardKeys, 1, row(values, key), shape.stride, columns, shape.dim, row(sums, g),
                 shape.stride);
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

  Real* row(Real* matrix, int64_t r) const { return matrix + r * shape.stride; }
};

template <class Real>
struct Backward {
  static constexpr int64_t score_row = kBackwardKeys + Lanes<Real>::count;  // read by columns too: no power of two
  const Shape<Real>& shape;
  const Real *o, *lse, *grad;
  Real* dqkv;
  Real *keys_t, *values_t, *keys, *dk, *dv, *q, *dout, *dq, *p, *ds;
  Real delta[kQueries], block_lse[kQueries];

  static int64_t size(const Shape<Real>& shape) {
    return shape.keys * (2 * shape.dim + 3 * shape.stride) + 3 * kQueries * shape.stride + 2 * kQueries * score_row +
           10 * 16;
  }
  Backward(const Shape<Real>& shape, const Real* o, const Real* lse, const Real* grad, Real* dqkv, Real* scratch)
      : shape(shape), o(o), lse(lse), grad(grad), dqkv(dqkv) {
    Arena<Real> arena{scratch};
    for (Real** matrix : {&keys_t, &values_t}) *matrix = arena.take(shape.keys * shape.dim);
    for (Real** matrix : {&keys, &dk, &dv}) *matrix = arena.take(shape.keys * shape.stride);
    for (Real** matrix : {&q, &dout, &dq}) *matrix = arena.take(kQueries * shape.stride);
    for (Real** matrix : {&p, &ds}) *matrix = arena.take(kQueries * score_row);
  }

  void load_keys(int64_t b, int64_t kv_head) {
    const int64_t h = shape.heads + kv_head;
    for (int64_t t = 0; t < shape.seq; ++t)
      copy_row(shape.qkv + shape.projection(b, t, h + shape.kv_heads), shape.dim, row(keys, t));
    transpose(shape, keys, values_t);
    for (int64_t t = 0; t < shape.seq; ++t) shape.rotate(shape.qkv + shape.projection(b, t, h), t, 1, 1, row(keys, t));
    transpose(shape, keys, keys_t);
    std::fill(dk, row(dk, shape.keys), Real(0));
    std::fill(dv, row(dv, shape.keys), Real(0));
  }

  void store_keys(int64_t b, int64_t kv_head) {
    const int64_t h = shape.heads + kv_head;
    for (int64_t t = 0; t < shape.seq; ++t) {
      shape.rotate(row(dk, t), t, 1, -1, dqkv + shape.projection(b, t, h));
      copy_row(row(dv, t), shape.dim, dqkv + shape.projection(b, t, h + shape.kv_heads));
    }
  }

  // One block of queries of head h: its dq, and its share of dk and dv.
  void run(int64_t b, int64_t h, int64_t begin) {
    const int64_t count = std::min(kQueries, shape.seq - begin), rows = round_up(count, kRows), end = begin + count;
    load_queries(b, h, begin, count, rows);
    for (int64_t key = shape.first_seen(b, begin, count, kBackwardKeys); key < end; key += kBackwardKeys) {
      for (int64_t g = 0; g < rows; g += kRows) score(b, begin, g, std::min<int64_t>(kRows, count - g), key);
      for (int64_t j = key; j < std::min(key + kBackwardKeys, end); j += kRows) {
        const int64_t first = std::max<int64_t>(0, j - begin) / kRows * kRows;  // earlier queries do not see key j
        const int64_t corner = first * score_row + j - key;
        multiply_add(ds + corner, 1, score_row, row(q, first), shape.stride, rows - first, shape.dim, row(dk, j),
                     shape.stride);
        multiply_add(p + corner, 1, score_row, row(dout, first), shape.stride, rows - first, shape.dim, row(dv, j),
                     shape.stride);
      }
    }
    for (int64_t r = 0; r < count; ++r)
      shape.rotate(row(dq, r), begin + r, shape.scale, -1, dqkv + shape.projection(b, begin + r, h));
  }

  void load_queries(int64_t b, int64_t h, int64_t begin, int64_t count, int64_t rows) {
    for (int64_t r = 0; r < count; ++r) {
      const int64_t token = begin + r, at = shape.output(b, token, h);
      shape.rotate(shape.qkv + shape.projection(b, token, h), token, shape.scale, 1, row(q, r));
      copy_row(grad + at, shape.dim, row(dout, r));
      delta[r] = dot(grad + at, o + at, shape.dim);
      block_lse[r] = lse[(b * shape.heads + h) * shape.seq + token];
    }
    std::fill(row(q, count), row(q, rows), Real(0));
    std::fill(row(dout, count), row(dout, rows), Real(0));
    std::fill(dq, row(dq, rows), Real(0));
  }

  // p and ds of queries [g, g + live) against the block of keys at `key`, and what it adds to their dq.
  void score(int64_t b, int64_t begin, int64_t g, int64_t live, int64_t key) {
    const int64_t seen_end = std::min(key + kBackwardKeys, begin + g + live) - key;
    if (seen_end <= 0) return;
    const int64_t columns = round_up(seen_end, shape.step);
    Real *p_rows = p + g * score_row, *ds_rows = ds + g * score_row;
    multiply_panels(row(q, g), shape.stride, keys_t, key, columns, shape.dim, p_rows, score_row);
    multiply_panels(row(dout, g), shape.stride, values_t, key, columns, shape.dim, ds_rows, score_row);
    for (int64_t r = 0; r < kRows; ++r) {
      const int64_t token = begin + g + r;
      Window seen{0, 0, 0, 0};
      if (r < live) seen = window<Real>(shape.first_key[b * shape.seq + token] - key, token + 1 - key, columns);
      probabilities(p_rows + r * score_row, ds_rows + r * score_row, seen, columns, block_lse[g + r], delta[g + r]);
    }
    multiply_add(ds_rows, score_row, 1, row(keys, key), shape.stride, seen_end, shape.dim, row(dq, g), shape.stride);
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

  Real* row(Real* matrix, int64_t r) const { return matrix + r * shape.stride; }
};

// qkv [T, C], cos [S, R], sin [S, R], first_key [T] int32, scale -> o [T, heads D], lse [B heads S]
template <class Real>
void attention(const Call& call) {
  const Shape<Real> shape(call, call.dim(5, 1), call.number(4));
  const int64_t size = Forward<Real>::size(shape);
  Scratch<Real> scratch(omp_get_max_threads() * size);
#pragma omp parallel
  {
    Forward<Real> forward(shape, scratch.get() + omp_get_thread_num() * size);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < shape.batch * shape.kv_heads; ++task) {
      const int64_t b = task / shape.kv_heads, kv_head = task % shape.kv_heads;
      forward.load_keys(b, kv_head);
      for (int64_t h = kv_head * shape.groups; h < (kv_head + 1) * shape.groups; ++h)
        for (int64_t begin = 0; begin < shape.seq; begin += kQueries)
          forward.run(b, h, begin, call.tensor<Real>(5), call.tensor<Real>(6));
    }
  }
}

// qkv, cos, sin, first_key, o, lse, do, scale -> dqkv [T, C]
template <class Real>
void attention_backward(const Call& call) {
  const Shape<Real> shape(call, call.dim(4, 1), call.number(7));
  const int64_t size = Backward<Real>::size(shape);
  Scratch<Real> scratch(omp_get_max_threads() * size);
#pragma omp parallel
  {
    Backward<Real> backward(shape, call.tensor<Real>(4), call.tensor<Real>(5), call.tensor<Real>(6),
                            call.tensor<Real>(8), scratch.get() + omp_get_thread_num() * size);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < shape.batch * shape.kv_heads; ++task) {
      const int64_t b = task / shape.kv_heads, kv_head = task % shape.kv_heads;
      backward.load_keys(b, kv_head);
      for (int64_t h = kv_head * shape.groups; h < (kv_head + 1) * shape.groups; ++h)
        for (int64_t begin = 0; begin < shape.seq; begin += kQueries) backward.run(b, h, begin);
      backward.store_keys(b, kv_head);
    }
  }
}

}  // namespace busway

BUSWAY_OPERATOR(busway_attention, attention, "rrrin")
BUSWAY_OPERATOR(busway_attention_backward, attention_backward, "rrrirrrn")
