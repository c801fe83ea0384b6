// Rotary embedding and causal grouped-query attention on packed projections, without an S x S matrix.
//
// Forward: a task is a block of queries of one head; it walks blocks of keys with a running maximum and sum (Milakov
// and Gimelshein 2018, arXiv:1805.02867). Backward: a task is one head; probabilities come back from the saved
// log-sum-exp (Dao 2022, arXiv:2205.14135), and the heads that share keys are added afterwards in their order, so that
// no result depends on which thread ran what. Rotated keys and values are laid out in panels first, once a key head.
#include <omp.h>

#include <cmath>
#include <limits>

#include "exponential.h"
#include "operator.h"
#include "tile.h"

namespace busway {

constexpr int64_t kQueries = 64;       // queries of a block
constexpr int64_t kForwardKeys = 256;  // keys of a block
constexpr int64_t kBackwardKeys = 128;

template <class Real>
struct Attention {
  const Real *qkv, *cos, *sin;
  const int32_t* first_key;
  Real scale;
  int64_t batch, seq, heads, kv_heads, groups, dim, half, width, out_width;
  int64_t keys;    // seq rounded up to whole tiles
  int64_t stride;  // dim rounded up to a panel

  static constexpr int64_t step = Lanes<Real>::panel > kRows ? Lanes<Real>::panel : kRows;

  // The four inputs at `first` are qkv, cos, sin, first_key; `out_width` is heads * dim.
  Attention(const Call& call, int first, int64_t out_width, double scale)
      : qkv(call.tensor<Real>(first)), cos(call.tensor<Real>(first + 1)), sin(call.tensor<Real>(first + 2)),
        first_key(call.tensor<int32_t>(first + 3)), scale(scale), seq(call.dim(first + 1, 0)),
        half(call.dim(first + 1, 1)), width(call.dim(first, 1)), out_width(out_width) {
    dim = 2 * half;
    batch = call.dim(first, 0) / seq;
    heads = out_width / dim;
    kv_heads = (width / dim - heads) / 2;
    groups = heads / kv_heads;
    keys = round_up(seq, step);
    stride = round_up(dim, Lanes<Real>::panel);
  }

  const Real* projection(int64_t b, int64_t token, int64_t head) const {
    return qkv + (b * seq + token) * width + head * dim;
  }

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

  // The first key that any of the queries [begin, end) of sequence b sees.
  int64_t first_seen(int64_t b, int64_t begin, int64_t end) const {
    return *std::min_element(first_key + b * seq + begin, first_key + b * seq + end);
  }
};

// Tokens of one head as the columns of a matrix: `rows(token, out)` gives a token's vector.
template <class Real, class Rows>
void pack_transposed(const Panels<Real>& out, int64_t tokens, Real* row, Rows rows) {
  for (int64_t t = 0; t < out.columns; ++t) {
    if (t < tokens) {
      rows(t, row);
    } else {
      std::fill_n(row, out.rows, Real(0));
    }
    Real* column = &out.at(0, t);
    for (int64_t d = 0; d < out.rows; ++d) column[d * Panels<Real>::width] = row[d];
  }
}

// scores[kRows][columns] = a[kRows][dim] times columns [from, from + columns) of a transposed matrix
template <class Real>
void score(const Real* a, const Panels<Real>& transposed, int64_t from, int64_t columns, Real* scores, int64_t row) {
  for (int64_t j = 0; j < columns; j += Panels<Real>::width)
    tile<Real, 2, false>(a, transposed.rows, 1, transposed.panel(from + j, 0), transposed.rows, scores + j, row);
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

template <class Real>
void hide(const Window& seen, Real value, Real* row) {
  std::fill(row + seen.begin, row + seen.from, value);
  std::fill(row + seen.to, row + seen.end, value);
}

// Running softmax of one query over blocks of keys.
template <class Real>
struct Running {
  Real top, total;

  // Turns a row of scores into probabilities relative to the new top; returns what earlier sums must be scaled by.
  Real take(Real* row, const Window& seen, int64_t columns) {
    Real correction = 1;
    if (seen.from < seen.to) {
      hide(seen, std::numeric_limits<Real>::lowest(), row);
      const Real higher = maximum(row + seen.begin, seen.end - seen.begin, top);
      if (higher > top) correction = std::exp(top - higher);
#pragma omp simd
      for (int64_t j = seen.begin; j < seen.end; ++j) row[j] = exponential_below(row[j] - higher);
      top = higher;
      total = total * correction + sum(row + seen.begin, seen.end - seen.begin);
    }
    std::fill(row, row + std::min(seen.begin, columns), Real(0));
    std::fill(row + std::min(seen.end, columns), row + columns, Real(0));
    return correction;
  }
};

// One block of queries [begin, begin + count) of head h: o and lse.
template <class Real>
void forward_block(const Attention<Real>& at, int64_t b, int64_t h, int64_t begin, const Panels<Real>& keys,
                   const Panels<Real>& values, Real* scratch, Real* o, Real* lse) {
  const int64_t count = std::min(kQueries, at.seq - begin), rows = round_up(count, kRows);
  Real *q = scratch, *sums = q + kQueries * at.dim, *scores = sums + kQueries * at.stride;
  Running<Real> running[kQueries];
  for (int64_t r = 0; r < rows; ++r) {
    running[r] = {-std::numeric_limits<Real>::infinity(), 0};
    if (r < count) {
      at.rotate(at.projection(b, begin + r, h), begin + r, at.scale, 1, q + r * at.dim);
    } else {
      std::fill_n(q + r * at.dim, at.dim, Real(0));
    }
  }
  std::fill_n(sums, rows * at.stride, Real(0));
  const int64_t from = at.first_seen(b, begin, begin + count) / at.step * at.step;
  for (int64_t key = from; key < begin + count; key += kForwardKeys) {
    for (int64_t g = 0; g < rows; g += kRows) {
      const int64_t live = std::min<int64_t>(kRows, count - g);
      const int64_t columns = std::min(key + kForwardKeys, begin + g + live) - key;
      if (columns <= 0) continue;
      score(q + g * at.dim, keys, key, columns, scores, kForwardKeys);
      for (int64_t r = 0; r < live; ++r) {
        const int64_t token = begin + g + r;
        const auto seen = window<Real>(at.first_key[b * at.seq + token] - key, token + 1 - key, columns);
        const Real correction = running[g + r].take(scores + r * kForwardKeys, seen, columns);
        Real* sum = sums + (g + r) * at.stride;
        if (correction != 1)
          for (int64_t d = 0; d < at.dim; ++d) sum[d] *= correction;
      }
      multiply<Real, true>(scores, kForwardKeys, 1, values, key, columns, sums + g * at.stride, at.stride);
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    const Real inverse = 1 / running[r].total, *sum = sums + r * at.stride;
    Real* out = o + (b * at.seq + begin + r) * at.out_width + h * at.dim;
    for (int64_t d = 0; d < at.dim; ++d) out[d] = sum[d] * inverse;
    lse[(b * at.heads + h) * at.seq + begin + r] = running[r].top + std::log(running[r].total);
  }
}

// qkv [T, C], cos [S, R], sin [S, R], first_key [T] int32, scale -> o [T, heads D], lse [B heads S]
template <class Real>
void attention(const Call& call) {
  const Attention<Real> at(call, 0, call.dim(5, 1), call.number(4));
  Real *o = call.tensor<Real>(5), *lse = call.tensor<Real>(6);
  const int64_t pairs = at.batch * at.kv_heads, blocks = (at.seq + kQueries - 1) / kQueries;
  const int64_t key_size = Panels<Real>::size(at.dim, at.keys), value_size = Panels<Real>::size(at.keys, at.dim);
  const int64_t own = round_up(kQueries * (at.dim + at.stride) + kRows * kForwardKeys, 16);
  Scratch<Real> packed(pairs * (key_size + value_size)), threads(omp_get_max_threads() * own);
  const auto keys = [&](int64_t pair) { return Panels<Real>{packed.get() + pair * key_size, at.dim, at.keys}; };
  const auto values = [&](int64_t pair) {
    return Panels<Real>{packed.get() + pairs * key_size + pair * value_size, at.keys, at.dim};
  };
#pragma omp parallel
  {
    Real* scratch = threads.get() + omp_get_thread_num() * own;
#pragma omp for
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const int64_t b = pair / at.kv_heads, h = at.heads + pair % at.kv_heads;
      pack_transposed(keys(pair), at.seq, scratch,
                      [&](int64_t t, Real* row) { at.rotate(at.projection(b, t, h), t, 1, 1, row); });
      for (int64_t t = 0; t < at.seq; ++t) values(pair).set_row(t, at.projection(b, t, h + at.kv_heads));
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < at.batch * at.heads * blocks; ++task) {
      const int64_t b = task / (at.heads * blocks), h = task / blocks % at.heads;
      const int64_t pair = b * at.kv_heads + h / at.groups;
      forward_block(at, b, h, task % blocks * kQueries, keys(pair), values(pair), scratch, o, lse);
    }
  }
}

// What the backward of one head works on; every pointer is the thread's own but dk and dv, which are the head's.
template <class Real>
struct Backward {
  static constexpr int64_t row = kBackwardKeys + Lanes<Real>::count;  // off a power of two: read by columns too
  Real *q, *grad, *p, *ds, *dq, *dk, *dv;
  Panels<Real> q_panels, grad_panels;
  Real delta[kQueries], lse[kQueries];

  static int64_t size(const Attention<Real>& at) {
    return 2 * kQueries * (at.dim + at.stride + row) + kQueries * at.stride;
  }
  Backward(const Attention<Real>& at, Real* scratch, Real* dk, Real* dv) : dk(dk), dv(dv) {
    const auto take = [&](int64_t n) { return (scratch += n) - n; };
    q_panels = {take(kQueries * at.stride), kQueries, at.dim};
    grad_panels = {take(kQueries * at.stride), kQueries, at.dim};
    dq = take(kQueries * at.stride);
    p = take(kQueries * row);
    ds = take(kQueries * row);
    q = take(kQueries * at.dim);
    grad = take(kQueries * at.dim);
  }
};

// Rotated queries, incoming gradients and their row sums for queries [begin, begin + count) of head h.
template <class Real>
void load_queries(const Attention<Real>& at, int64_t b, int64_t h, int64_t begin, int64_t count, const Real* o,
                  const Real* lse, const Real* grad, Backward<Real>& own) {
  const int64_t rows = round_up(count, kRows);
  for (int64_t r = 0; r < rows; ++r) {
    Real *q = own.q + r * at.dim, *g = own.grad + r * at.dim;
    if (r < count) {
      const int64_t offset = (b * at.seq + begin + r) * at.out_width + h * at.dim;
      at.rotate(at.projection(b, begin + r, h), begin + r, at.scale, 1, q);
      copy_row(grad + offset, at.dim, g);
      own.delta[r] = dot(grad + offset, o + offset, at.dim);
      own.lse[r] = lse[(b * at.heads + h) * at.seq + begin + r];
    } else {
      std::fill_n(q, at.dim, Real(0));
      std::fill_n(g, at.dim, Real(0));
    }
    own.q_panels.set_row(r, q);
    own.grad_panels.set_row(r, g);
  }
  std::fill_n(own.dq, rows * at.stride, Real(0));
}

// p = exp(s - lse) and ds = p (dp - delta) for one query; zero where it does not see.
template <class Real>
void probabilities(Real* __restrict p, Real* __restrict ds, const Window& seen, int64_t columns, Real lse,
                   Real delta) {
  hide(seen, std::numeric_limits<Real>::lowest(), p);
#pragma omp simd
  for (int64_t j = seen.begin; j < seen.end; ++j) {
    p[j] = exponential_below(p[j] - lse);
    ds[j] = p[j] * (ds[j] - delta);
  }
  for (Real* row : {p, ds}) {
    std::fill(row, row + std::min(seen.begin, columns), Real(0));
    std::fill(row + std::min(seen.end, columns), row + columns, Real(0));
  }
}

// All queries of head h: dq into dqkv, dk and dv [keys, stride] of this head alone.
template <class Real>
void backward_head(const Attention<Real>& at, int64_t b, int64_t h, const Panels<Real>& keys_t,
                   const Panels<Real>& values_t, const Panels<Real>& keys, const Real* o, const Real* lse,
                   const Real* grad, Backward<Real>& own, Real* dqkv) {
  constexpr int64_t row = Backward<Real>::row;
  std::fill_n(own.dk, at.keys * at.stride, Real(0));
  std::fill_n(own.dv, at.keys * at.stride, Real(0));
  for (int64_t begin = 0; begin < at.seq; begin += kQueries) {
    const int64_t count = std::min(kQueries, at.seq - begin), rows = round_up(count, kRows);
    load_queries(at, b, h, begin, count, o, lse, grad, own);
    const int64_t from = at.first_seen(b, begin, begin + count) / kBackwardKeys * kBackwardKeys;
    for (int64_t key = from; key < begin + count; key += kBackwardKeys) {
      for (int64_t g = 0; g < rows; g += kRows) {
        const int64_t live = std::min<int64_t>(kRows, count - g);
        const int64_t seen_end = std::min(key + kBackwardKeys, begin + g + live) - key;
        if (seen_end <= 0) continue;
        const int64_t columns = round_up(seen_end, at.step);
        Real *p = own.p + g * row, *ds = own.ds + g * row;
        score(own.q + g * at.dim, keys_t, key, columns, p, row);
        score(own.grad + g * at.dim, values_t, key, columns, ds, row);
        for (int64_t r = 0; r < kRows; ++r) {
          const int64_t token = begin + g + r;
          const auto seen = r < live ? window<Real>(at.first_key[b * at.seq + token] - key, token + 1 - key, columns)
                                     : Window{0, 0, 0, 0};
          probabilities(p + r * row, ds + r * row, seen, columns, own.lse[g + r], own.delta[g + r]);
        }
        multiply<Real, true>(ds, row, 1, keys, key, seen_end, own.dq + g * at.stride, at.stride);
      }
      const int64_t end = std::min(key + kBackwardKeys, begin + count);
      for (int64_t j = key; j < end; j += kRows) {
        const int64_t first = std::max<int64_t>(0, j - begin) / kRows * kRows;  // earlier queries do not see key j
        const Real *p = own.p + first * row + j - key, *ds = own.ds + first * row + j - key;
        multiply<Real, true>(ds, 1, row, own.q_panels, first, rows - first, own.dk + j * at.stride, at.stride);
        multiply<Real, true>(p, 1, row, own.grad_panels, first, rows - first, own.dv + j * at.stride, at.stride);
      }
    }
    for (int64_t r = 0; r < count; ++r)
      at.rotate(own.dq + r * at.stride, begin + r, at.scale, -1,
                dqkv + (b * at.seq + begin + r) * at.width + h * at.dim);
  }
}

// The sum over the query heads that share a key head, at one token.
template <class Real>
void add_heads(const Attention<Real>& at, const Real* part, Real* sum) {
  copy_row(part, at.dim, sum);
  for (int64_t g = 1; g < at.groups; ++g) {
    part += at.keys * at.stride;
#pragma omp simd
    for (int64_t d = 0; d < at.dim; ++d) sum[d] += part[d];
  }
}

// qkv, cos, sin, first_key, o, lse, do, scale -> dqkv [T, C]
template <class Real>
void attention_backward(const Call& call) {
  const Attention<Real> at(call, 0, call.dim(4, 1), call.number(7));
  const Real *o = call.tensor<Real>(4), *lse = call.tensor<Real>(5), *grad = call.tensor<Real>(6);
  Real* dqkv = call.tensor<Real>(8);
  const int64_t pairs = at.batch * at.kv_heads, all_heads = at.batch * at.heads, head_size = at.keys * at.stride;
  const int64_t column_size = Panels<Real>::size(at.dim, at.keys), row_size = Panels<Real>::size(at.keys, at.dim);
  const int64_t own_size = round_up(Backward<Real>::size(at), 16);
  Scratch<Real> packed(pairs * (2 * column_size + row_size)), partial(2 * all_heads * head_size),
      threads(omp_get_max_threads() * own_size);
  const auto keys_t = [&](int64_t pair) { return Panels<Real>{packed.get() + pair * column_size, at.dim, at.keys}; };
  const auto values_t = [&](int64_t pair) { return keys_t(pairs + pair); };
  const auto keys = [&](int64_t pair) {
    return Panels<Real>{packed.get() + 2 * pairs * column_size + pair * row_size, at.keys, at.dim};
  };
  Real *dk = partial.get(), *dv = dk + all_heads * head_size;
#pragma omp parallel
  {
    Real* scratch = threads.get() + omp_get_thread_num() * own_size;
#pragma omp for
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const int64_t b = pair / at.kv_heads, h = at.heads + pair % at.kv_heads;
      pack_transposed(keys_t(pair), at.seq, scratch, [&](int64_t t, Real* row) {
        at.rotate(at.projection(b, t, h), t, 1, 1, row);
        keys(pair).set_row(t, row);
      });
      pack_transposed(values_t(pair), at.seq, scratch, [&](int64_t t, Real* row) {
        copy_row(at.projection(b, t, h + at.kv_heads), at.dim, row);
      });
    }
#pragma omp for schedule(dynamic)
    for (int64_t head = 0; head < all_heads; ++head) {
      const int64_t b = head / at.heads, h = head % at.heads, pair = b * at.kv_heads + h / at.groups;
      Backward<Real> own(at, scratch, dk + head * head_size, dv + head * head_size);
      backward_head(at, b, h, keys_t(pair), values_t(pair), keys(pair), o, lse, grad, own, dqkv);
    }
#pragma omp for
    for (int64_t token = 0; token < at.batch * at.seq; ++token)
      for (int64_t head = 0; head < at.kv_heads; ++head) {
        const int64_t b = token / at.seq, t = token % at.seq;
        const int64_t part = ((b * at.heads + head * at.groups) * at.keys + t) * at.stride;
        Real* out = dqkv + token * at.width + (at.heads + head) * at.dim;
        add_heads(at, dk + part, scratch);
        at.rotate(scratch, t, 1, -1, out);
        add_heads(at, dv + part, out + at.kv_heads * at.dim);
      }
  }
}

}  // namespace busway

BUSWAY_OPERATOR(busway_attention, attention, 0)
BUSWAY_OPERATOR(busway_attention_backward, attention_backward, 0)
