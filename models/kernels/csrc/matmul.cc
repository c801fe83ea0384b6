// A linear's product and its gradients. Threads share blocks of rows, as MindSpore's dnnl_sgemm runs on the one that
// calls it.
#include "matmul.h"

namespace busway {

// c [m, n] = a b as in `multiply`, in blocks of c's rows.
template <class Real>
void multiply_blocks(char left, char right, int64_t m, int64_t n, int64_t k, const Real* a, int64_t lda, const Real* b,
                     int64_t ldb, Real* c) {
  const int64_t size = m < 512 ? 64 : 128;
  std::vector<int64_t> tasks;
  for (int64_t row = 0; row < m; row += size) tasks.push_back(row);
  run_tasks(tasks, [&](int64_t row) {
    const Real* from = left == 'T' ? a + row : a + row * lda;
    multiply(left, right, std::min(size, m - row), n, k, from, lda, b, ldb, c + row * n, n);
  });
}

// x [T, I], w [O, I] -> y [T, O] = x w^T
template <class Real>
void matmul(const Call& call) {
  const int64_t tokens = call.dim(0, 0), into = call.dim(0, 1), out = call.dim(1, 0);
  multiply_blocks('N', 'T', tokens, out, into, call.tensor<Real>(0), into, call.tensor<Real>(1), into,
                  call.tensor<Real>(2));
}

// dy [T, O], w [O, I] -> dx [T, I] = dy w
template <class Real>
void matmul_input(const Call& call) {
  const int64_t tokens = call.dim(0, 0), out = call.dim(0, 1), into = call.dim(1, 1);
  multiply_blocks('N', 'N', tokens, into, out, call.tensor<Real>(0), out, call.tensor<Real>(1), into,
                  call.tensor<Real>(2));
}

// dy [T, O], x [T, I] -> dw [O, I] = dy^T x
template <class Real>
void matmul_weight(const Call& call) {
  const int64_t tokens = call.dim(0, 0), out = call.dim(0, 1), into = call.dim(1, 1);
  multiply_blocks('T', 'N', out, into, tokens, call.tensor<Real>(0), out, call.tensor<Real>(1), into,
                  call.tensor<Real>(2));
}

}  // namespace busway

// Whether floats can be multiplied: "" or what is missing.
extern "C" const char* busway_missing_sgemm() {
  return busway::find_sgemm() ? "" : "no dnnl_sgemm in MindSpore's libdnnl.so.3";
}

BUSWAY_OPERATOR(busway_matmul, matmul, "rr")
BUSWAY_OPERATOR(busway_matmul_input, matmul_input, "rr")
BUSWAY_OPERATOR(busway_matmul_weight, matmul_weight, "rr")
