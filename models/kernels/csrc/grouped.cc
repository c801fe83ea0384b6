// Matrices of several experts on rows that are sorted by expert: rows [ends[e-1], ends[e]) belong to expert e, and rows
// past the last end are neither read nor written.
//
// A task is a block of one expert's rows (or of its matrix's).
#include "matmul.h"

namespace busway {

struct Task {
  int64_t expert, begin, end;
};

inline int64_t begin_of(const int32_t* ends, int64_t expert) { return expert ? ends[expert - 1] : 0; }

// Blocks of up to `size` rows, of every expert.
inline std::vector<Task> row_tasks(const int32_t* ends, int64_t experts, int64_t size) {
  std::vector<Task> tasks;
  for (int64_t e = 0; e < experts; ++e)
    for (int64_t begin = begin_of(ends, e); begin < ends[e]; begin += size)
      tasks.push_back({e, begin, std::min<int64_t>(ends[e], begin + size)});
  return tasks;
}

constexpr int64_t kRows = 256;

// Rows times their expert's matrix, or its transpose where `right` is 'T': rows [R, A], w [E O, I], ends [E] int32 ->
// [R, B].
template <class Real>
void rows_by_matrices(const Call& call, char right) {
  const Real *rows = call.tensor<Real>(0), *w = call.tensor<Real>(1);
  const int32_t* ends = call.tensor<int32_t>(2);
  Real* y = call.tensor<Real>(3);
  const int64_t from = call.dim(0, 1), to = call.dim(3, 1), inner = call.dim(1, 1), experts = call.size(2);
  run_tasks(row_tasks(ends, experts, kRows), [&](const Task& task) {
    multiply('N', right, task.end - task.begin, to, from, rows + task.begin * from, from, w + task.expert * from * to,
             inner, y + task.begin * to, to);
  });
}

// x [R, I], w [E O, I], ends [E] int32 -> y [R, O], y = x w^T
template <class Real>
void grouped_matmul(const Call& call) {
  rows_by_matrices<Real>(call, 'T');
}

// dy [R, O], w [E O, I], ends [E] int32 -> dx [R, I] = dy w
template <class Real>
void grouped_matmul_input(const Call& call) {
  rows_by_matrices<Real>(call, 'N');
}

// dy [R, O], x [R, I], ends [E] int32 -> dw [E O, I] = dy^T x; 0 for an expert without rows
template <class Real>
void grouped_matmul_weight(const Call& call) {
  const Real *dy = call.tensor<Real>(0), *x = call.tensor<Real>(1);
  const int32_t* ends = call.tensor<int32_t>(2);
  Real* dw = call.tensor<Real>(3);
  const int64_t outer = call.dim(0, 1), inner = call.dim(1, 1), experts = call.size(2), size = 128;
  std::vector<Task> tasks;
  for (int64_t e = 0; e < experts; ++e)
    for (int64_t begin = 0; begin < outer; begin += size) tasks.push_back({e, begin, std::min(outer, begin + size)});
  run_tasks(tasks, [&](const Task& task) {
    const int64_t first = begin_of(ends, task.expert), rows = ends[task.expert] - first, wide = task.end - task.begin;
    Real* to = dw + (task.expert * outer + task.begin) * inner;
    if (rows == 0) {
      std::fill_n(to, wide * inner, Real(0));
    } else {
      multiply('T', 'N', wide, inner, rows, dy + first * outer + task.begin, outer, x + first * inner, inner, to, inner);
    }
  });
}

}  // namespace busway

BUSWAY_OPERATOR(busway_grouped_matmul, grouped_matmul, "rri")
BUSWAY_OPERATOR(busway_grouped_matmul_input, grouped_matmul_input, "rri")
BUSWAY_OPERATOR(busway_grouped_matmul_weight, grouped_matmul_weight, "rri")
