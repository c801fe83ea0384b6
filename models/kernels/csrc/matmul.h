// Products of matrices: floats by the oneDNN that MindSpore has loaded, on the thread that calls it; doubles, the
// reference's, by loops. Work is cut into tasks whatever the threads, so that results do not depend on them.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "operator.h"

namespace busway {

using Sgemm = int (*)(char, char, int64_t, int64_t, int64_t, float, const float*, int64_t, const float*, int64_t, float,
                      float*, int64_t);

inline Sgemm find_sgemm() {
  void* library = dlopen("libdnnl.so.3", RTLD_NOW | RTLD_NOLOAD);
  return library ? reinterpret_cast<Sgemm>(dlsym(library, "dnnl_sgemm")) : nullptr;
}

// c [m, n] = a b, row-major; a is [m, k], or [k, m] where `left` is 'T', and b alike.
inline void multiply(char left, char right, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
                     int64_t ldb, float* c, int64_t ldc) {
  static const Sgemm sgemm = find_sgemm();
  if (!sgemm || sgemm(left, right, m, n, k, 1.0f, a, lda, b, ldb, 0.0f, c, ldc) != 0)
    throw std::runtime_error("dnnl_sgemm of MindSpore's libdnnl.so.3 failed");
}

inline void multiply(char left, char right, int64_t m, int64_t n, int64_t k, const double* a, int64_t lda,
                     const double* b, int64_t ldb, double* c, int64_t ldc) {
  for (int64_t i = 0; i < m; ++i) {
    double* __restrict to = c + i * ldc;
    std::fill_n(to, n, 0.0);
    if (right == 'T') {
      for (int64_t j = 0; j < n; ++j) {
        double total = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t l = 0; l < k; ++l) total += a[i * lda + l] * b[j * ldb + l];
        to[j] = total;
      }
    } else {
      for (int64_t l = 0; l < k; ++l) {
        const double factor = left == 'T' ? a[l * lda + i] : a[i * lda + l];
        const double* __restrict from = b + l * ldb;
        for (int64_t j = 0; j < n; ++j) to[j] += factor * from[j];
      }
    }
  }
}

// Runs every task on one of the threads.
template <class Task, class Run>
void run_tasks(const std::vector<Task>& tasks, Run run) {
  bool failed = false;
#pragma omp parallel for schedule(dynamic)
  for (size_t i = 0; i < tasks.size(); ++i) {
    try {
      run(tasks[i]);
    } catch (const std::exception&) {
#pragma omp atomic write
      failed = true;
    }
  }
  if (failed) throw std::runtime_error("a matmul failed: MindSpore's libdnnl.so.3 gave no dnnl_sgemm");
}

}  // namespace busway
