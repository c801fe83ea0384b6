// Attention over whole sequences, with rotary embedding, and over one block of keys of a ring (Liu et al. 2023,
// arXiv:2310.01889).
#include "flash.h"
#include "rotary.h"

namespace busway {

// Causal attention on packed projections [batch seq, (heads + 2 kv_heads) dim]; queries and keys turn on their way.
template <class Real>
struct Sequences : Sizes<Real> {
  const Real *qkv, *cos, *sin;
  const int32_t* first_key;
  Real* gradient = nullptr;
  int64_t width;

  // Inputs 0 to 3 are qkv, cos, sin and first_key; `out_width` is heads * dim.
  Sequences(const Call& call, int64_t out_width, double scale)
      : Sizes<Real>(sizes(call, out_width, scale)), qkv(call.tensor<Real>(0)), cos(call.tensor<Real>(1)),
        sin(call.tensor<Real>(2)), first_key(call.tensor<int32_t>(3)), width(call.dim(0, 1)) {}

  static Sizes<Real> sizes(const Call& call, int64_t out_width, double scale) {
    const int64_t seq = call.dim(1, 0), dim = 2 * call.dim(1, 1), heads = out_width / dim;
    return {call.dim(0, 0) / seq, seq, seq, heads, (call.dim(0, 1) / dim - heads) / 2, dim, Real(scale)};
  }

  int64_t at(int64_t b, int64_t t, int64_t head) const { return (b * this->keys + t) * width + head * this->dim; }
  int64_t key_head(int64_t kv_head) const { return this->heads + kv_head; }
  int64_t value_head(int64_t kv_head) const { return this->heads + this->kv_heads + kv_head; }
  void turned(const Real* x, int64_t t, Real factor, Real direction, Real* out) const {
    const int64_t half = this->dim / 2;
    turn(x, cos + t * half, sin + t * half, half, factor, direction, out);
  }

  void query(int64_t b, int64_t h, int64_t t, Real* out) const { turned(qkv + at(b, t, h), t, this->scale, 1, out); }
  void key(int64_t b, int64_t kv_head, int64_t t, Real* out) const {
    turned(qkv + at(b, t, key_head(kv_head)), t, 1, 1, out);
  }
  void value(int64_t b, int64_t kv_head, int64_t t, Real* out) const {
    copy_row(qkv + at(b, t, value_head(kv_head)), this->dim, out);
  }
  Span span(int64_t b, int64_t t) const { return {first_key[b * this->keys + t], t + 1}; }
  void start(int64_t, int64_t, int64_t, Real* sum, Real& top, Real& total) const {
    std::fill(sum, sum + this->dim, Real(0));
    top = -std::numeric_limits<Real>::infinity();
    total = 0;
  }

  void store_query(int64_t b, int64_t h, int64_t t, const Real* dq) const {
    turned(dq, t, this->scale, -1, gradient + at(b, t, h));
  }
  void store_key(int64_t b, int64_t kv_head, int64_t t, const Real* dk) const {
    turned(dk, t, 1, -1, gradient + at(b, t, key_head(kv_head)));
  }
  void store_value(int64_t b, int64_t kv_head, int64_t t, const Real* dv) const {
    copy_row(dv, this->dim, gradient + at(b, t, value_head(kv_head)));
  }
};

// Queries [T, heads dim] against a block of keys and values [U, 2 kv_heads dim], carried on from o and lse of others.
template <class Real>
struct Block : Sizes<Real> {
  const Real *q, *kv, *o = nullptr, *earlier_lse = nullptr;
  const int32_t *first, *last;
  Real *dq = nullptr, *dkv = nullptr;

  // Inputs 0 to 3 are q, kv, first and last; `heads` is (heads, kv_heads).
  Block(const Call& call, const int32_t* heads, double scale)
      : Sizes<Real>{1, call.dim(0, 0), call.dim(1, 0), heads[0], heads[1], call.dim(0, 1) / heads[0], Real(scale)},
        q(call.tensor<Real>(0)), kv(call.tensor<Real>(1)), first(call.tensor<int32_t>(2)),
        last(call.tensor<int32_t>(3)) {}

  int64_t key_at(int64_t kv_head, int64_t u) const { return (u * 2 * this->kv_heads + kv_head) * this->dim; }
  int64_t value_at(int64_t kv_head, int64_t u) const { return key_at(this->kv_heads + kv_head, u); }

  void query(int64_t b, int64_t h, int64_t t, Real* out) const { scaled(q + this->output(b, h, t), out); }
  void key(int64_t, int64_t kv_head, int64_t u, Real* out) const { copy_row(kv + key_at(kv_head, u), this->dim, out); }
  void value(int64_t, int64_t kv_head, int64_t u, Real* out) const {
    copy_row(kv + value_at(kv_head, u), this->dim, out);
  }
  Span span(int64_t, int64_t t) const {
    return {std::max<int64_t>(first[t], 0), std::min<int64_t>(last[t], this->keys)};
  }
  // An output is a sum over exponentials relative to its log-sum-exp, whose total is 1.
  void start(int64_t b, int64_t h, int64_t t, Real* sum, Real& top, Real& total) const {
    copy_row(o + this->output(b, h, t), this->dim, sum);
    top = earlier_lse[this->lse(b, h, t)];
    total = 1;
  }

  void store_query(int64_t b, int64_t h, int64_t t, const Real* row) const { scaled(row, dq + this->output(b, h, t)); }
  void store_key(int64_t, int64_t kv_head, int64_t u, const Real* dk) const {
    copy_row(dk, this->dim, dkv + key_at(kv_head, u));
  }
  void store_value(int64_t, int64_t kv_head, int64_t u, const Real* dv) const {
    copy_row(dv, this->dim, dkv + value_at(kv_head, u));
  }

  void scaled(const Real* __restrict from, Real* __restrict to) const {
#pragma omp simd
    for (int64_t d = 0; d < this->dim; ++d) to[d] = from[d] * this->scale;
  }
};

// qkv [T, C], cos [S, R], sin [S, R], first_key [T] int32, scale -> o [T, heads D], lse [B heads S]
template <class Real>
void attention(const Call& call) {
  attend(Sequences<Real>(call, call.dim(5, 1), call.number(4)), call.tensor<Real>(5), call.tensor<Real>(6));
}

// qkv, cos, sin, first_key, o, lse, do, scale -> dqkv [T, C]
template <class Real>
void attention_backward(const Call& call) {
  Sequences<Real> sequences(call, call.dim(4, 1), call.number(7));
  sequences.gradient = call.tensor<Real>(8);
  attend_backward(sequences, call.tensor<Real>(4), call.tensor<Real>(5), call.tensor<Real>(6));
}

// q [T, heads D], kv [U, 2 kv_heads D], first [T] int32, last [T] int32, o [T, heads D], lse [heads T],
// (heads, kv_heads) int32, scale -> o, lse
template <class Real>
void block_attention(const Call& call) {
  Block<Real> block(call, call.tensor<int32_t>(6), call.number(7));
  block.o = call.tensor<Real>(4);
  block.earlier_lse = call.tensor<Real>(5);
  attend(block, call.tensor<Real>(8), call.tensor<Real>(9));
}

// q, kv, first, last, o, lse, do, (heads, kv_heads), scale -> dq [T, heads D], dkv [U, 2 kv_heads D]
template <class Real>
void block_attention_backward(const Call& call) {
  Block<Real> block(call, call.tensor<int32_t>(7), call.number(8));
  block.dq = call.tensor<Real>(9);
  block.dkv = call.tensor<Real>(10);
  attend_backward(block, call.tensor<Real>(4), call.tensor<Real>(5), call.tensor<Real>(6));
}

}  // namespace busway

BUSWAY_OPERATOR(busway_attention, attention, "rrrin")
BUSWAY_OPERATOR(busway_attention_backward, attention_backward, "rrrirrrn")
BUSWAY_OPERATOR(busway_block_attention, block_attention, "rriirrin")
BUSWAY_OPERATOR(busway_block_attention_backward, block_attention_backward, "rriirrrin")
