// Products of matrices, in blocks that are in registers: a part of kernels.cc.
#pragma once

#include "kernels.h"
#include "share.inl"
#include "simd.h"

namespace {

using mam::Matrix;
using mam::WeightGradient;

struct Rows {
  float* from;
  int64_t stride;
  int64_t count;

  float* operator[](int64_t row) const { return from + row * stride; }
};

// Rows to read from, of which elements are `step` apart: 1, or if it is the transposed of what is stored, that one's
// width.
struct Factor {
  const float* from;
  int64_t stride, step;

  Factor(const Rows& rows) : from(rows.from), stride(rows.stride), step(1) {}
  Factor(const float* from, int64_t stride, int64_t step) : from(from), stride(stride), step(step) {}
};

// MR rows times NR vectors of columns of y = x W + b, in registers; or with `kAdd` of y += x W.
template <int MR, int NR, bool kAdd>
MAM_INLINE void multiply_block(const Factor& x, const Matrix& m, const Rows& y, int64_t row, int64_t column) {
  V sum[MR][NR];
  MAM_UNROLL
  for (int i = 0; i < MR; ++i) {
    const float* initial = kAdd ? y[row + i] : m.bias;
    MAM_UNROLL
    for (int j = 0; j < NR; ++j) sum[i][j] = initial ? load(initial + column + j * kLanes) : V{};
  }
  const float *weight = m.weight + column, *own = x.from + row * x.stride;
  for (int64_t k = 0; k < m.in; ++k, weight += m.out, own += x.step) {
    V w[NR];
    MAM_UNROLL
    for (int j = 0; j < NR; ++j) w[j] = load(weight + j * kLanes);
    MAM_UNROLL
    for (int i = 0; i < MR; ++i) {
      const float value = own[i * x.stride];
      MAM_UNROLL
      for (int j = 0; j < NR; ++j) sum[i][j] += value * w[j];
    }
  }
  MAM_UNROLL
  for (int i = 0; i < MR; ++i) {
    MAM_UNROLL
    for (int j = 0; j < NR; ++j) store(y[row + i] + column + j * kLanes, sum[i][j]);
  }
}

template <int NR, bool kAdd>
MAM_INLINE void multiply_columns(const Factor& x, const Matrix& m, const Rows& y, int64_t column) {
  int64_t row = 0;
  for (; y.count - row >= 6; row += 6) multiply_block<6, NR, kAdd>(x, m, y, row, column);
  if (y.count - row >= 4) multiply_block<4, NR, kAdd>(x, m, y, row, column), row += 4;
  if (y.count - row >= 2) multiply_block<2, NR, kAdd>(x, m, y, row, column), row += 2;
  if (y.count - row >= 1) multiply_block<1, NR, kAdd>(x, m, y, row, column);
}

// y = x W + b, or y += x W; each row in the same order of additions however many rows there are.
template <bool kAdd = false>
void multiply(const Factor& x, const Matrix& m, const Rows& y) {
  constexpr int kWide = kLanes == 16 ? 4 : 2;
  int64_t column = 0;
  for (; m.out - column >= kWide * kLanes; column += kWide * kLanes) multiply_columns<kWide, kAdd>(x, m, y, column);
  for (; column < m.out; column += kLanes) multiply_columns<1, kAdd>(x, m, y, column);
}

// Some rows at a time, which then are in the cache.
void weight_gradient(const WeightGradient& w, int64_t task) {
  constexpr int64_t kRows = 64;
  const Share own(w.rows, w.blocks, task);
  const Rows y = {w.y + task * w.in * w.out, w.out, w.in};
  __builtin_memset(y.from, 0, w.in * w.out * sizeof(float));
  for (int64_t row = own.begin; row < own.end; row += kRows) {
    const int64_t count = own.end - row < kRows ? own.end - row : kRows;
    multiply<true>({w.x + row * w.in, 1, w.in}, {w.g + row * w.out, nullptr, count, w.out}, y);
  }
}

}  // namespace
