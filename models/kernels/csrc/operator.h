// The interface between MindSpore's `ops.Custom(func_type="aot")` and a kernel written once for float and double.
//
// MindSpore hands every operator the same argument list: n tensors, inputs first and outputs last, with their data,
// ranks, shapes and dtype names. A nonzero return becomes a RuntimeError in Python.
//
// Results must not depend on the number of threads, as runs are compared bit by bit: a sum over rows goes by blocks
// whose number follows from the shape alone, and the blocks are added in their order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>

namespace busway {

struct Call {
  int count;
  void** data;
  int* ranks;
  int64_t** shapes;
  const char** dtypes;

  template <class T>
  T* tensor(int i) const {
    return static_cast<T*>(data[i]);
  }
  int64_t dim(int i, int d) const { return shapes[i][d]; }
  int64_t last_dim(int i) const { return shapes[i][ranks[i] - 1]; }
  int64_t size(int i) const {
    int64_t n = 1;
    for (int d = 0; d < ranks[i]; ++d) n *= shapes[i][d];
    return n;
  }
  bool is(int i, const char* dtype) const { return std::strcmp(dtypes[i], dtype) == 0; }
  // The first element of a small tensor of any number type.
  double number(int i) const {
    if (is(i, "float32")) return *tensor<float>(i);
    if (is(i, "float64")) return *tensor<double>(i);
    if (is(i, "int32")) return *tensor<int32_t>(i);
    return static_cast<double>(*tensor<int64_t>(i));
  }
};

// Scratch memory on a cache line, not initialised: it is allocated before a parallel region, as no exception may leave
// one.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n) : data_(static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) + 127) / 64 * 64))) {
    if (!data_) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

// A fixed division of `rows` into at most 64 blocks: the unit of deterministic sums over rows.
struct RowBlocks {
  int64_t rows, size, count;
  explicit RowBlocks(int64_t rows)
      : rows(rows), size(std::max<int64_t>(16, (rows + 63) / 64)), count((rows + size - 1) / size) {}
  int64_t begin(int64_t block) const { return block * size; }
  int64_t end(int64_t block) const { return std::min(rows, (block + 1) * size); }
};

// out[i] = partial[0][i] + partial[1][i] + ...
template <class Real>
void add_blocks(const Real* partial, int64_t blocks, int64_t n, Real* out) {
  std::fill(out, out + n, Real(0));
  for (int64_t b = 0; b < blocks; ++b) {
    const Real* part = partial + b * n;
    for (int64_t i = 0; i < n; ++i) out[i] += part[i];
  }
}

// Whether tensors have the dtypes that `types` lists: r the kernel's own (Real), i int32, d float64, n any number;
// those past its end are r. A wrong one would be read as rubbish, in silence.
inline bool dtypes_fit(const char* name, const Call& call, const char* types, const char* real) {
  const int listed = static_cast<int>(std::strlen(types));
  for (int i = 0; i < call.count; ++i) {
    const char type = i < listed ? types[i] : 'r';
    if (type == 'n') continue;
    const char* wanted = type == 'r' ? real : type == 'i' ? "int32" : "float64";
    if (call.is(i, wanted)) continue;
    std::fprintf(stderr, "native kernel %s: tensor %d must be %s, but is %s\n", name, i, wanted, call.dtypes[i]);
    return false;
  }
  return true;
}

// Runs body(float()) or body(double()), by the dtype of the first r of `types`; float() where there is none.
template <class Body>
int dispatch(const char* name, const Call& call, const char* types, Body body) {
  try {
    const char* first = std::strchr(types, 'r');
    const char* real = first ? call.dtypes[first - types] : "float32";
    if (!dtypes_fit(name, call, types, real)) return 1;
    if (std::strcmp(real, "float32") == 0) {
      body(float());
    } else if (std::strcmp(real, "float64") == 0) {
      body(double());
    } else {
      std::fprintf(stderr, "native kernel %s takes float32 or float64, not %s\n", name, real);
      return 1;
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "native kernel %s: %s\n", name, error.what());
    return 2;
  }
  return 0;
}

}  // namespace busway

// Exports `name`, which calls the function template `body<Real>(const Call&)`; `types` as in `dtypes_fit`.
#define BUSWAY_OPERATOR(name, body, types)                                                                     \
  extern "C" int name(int count, void** data, int* ranks, int64_t** shapes, const char** dtypes, void*, void*) { \
    const busway::Call call{count, data, ranks, shapes, dtypes};                                               \
    return busway::dispatch(#name, call, types, [&](auto real) { busway::body<decltype(real)>(call); });       \
  }
