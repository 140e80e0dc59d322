// The plain layers of the decode kernel, for some environments together: a part of kernels.cc.
#pragma once

#include "decode.h"
#include "simd.h"

namespace {

using mam::Conv;
using mam::Matrix;
using mam::Norm;

struct Rows {
  float* from;
  int64_t stride;
  int64_t count;

  float* operator[](int64_t row) const { return from + row * stride; }
};

// MR rows times NR vectors of columns of y = x W + b, in registers.
template <int MR, int NR>
MAM_INLINE void multiply_block(const Rows& x, const Matrix& m, const Rows& y, int64_t row, int64_t column) {
  V sum[MR][NR];
  MAM_UNROLL
  for (int i = 0; i < MR; ++i) {
    MAM_UNROLL
    for (int j = 0; j < NR; ++j) sum[i][j] = m.bias ? load(m.bias + column + j * kLanes) : V{};
  }
  const float* weight = m.weight + column;
  for (int64_t k = 0; k < m.in; ++k, weight += m.out) {
    V w[NR];
    MAM_UNROLL
    for (int j = 0; j < NR; ++j) w[j] = load(weight + j * kLanes);
    MAM_UNROLL
    for (int i = 0; i < MR; ++i) {
      const float value = x[row + i][k];
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

template <int NR>
MAM_INLINE void multiply_columns(const Rows& x, const Matrix& m, const Rows& y, int64_t column) {
  int64_t row = 0;
  for (; x.count - row >= 6; row += 6) multiply_block<6, NR>(x, m, y, row, column);
  if (x.count - row >= 4) multiply_block<4, NR>(x, m, y, row, column), row += 4;
  if (x.count - row >= 2) multiply_block<2, NR>(x, m, y, row, column), row += 2;
  if (x.count - row >= 1) multiply_block<1, NR>(x, m, y, row, column);
}

// y = x W + b, each row in the same order of additions however many rows there are.
void multiply(const Rows& x, const Matrix& m, const Rows& y) {
  constexpr int kWide = kLanes == 16 ? 4 : 2;
  int64_t column = 0;
  for (; m.out - column >= kWide * kLanes; column += kWide * kLanes) multiply_columns<kWide>(x, m, y, column);
  for (; column < m.out; column += kLanes) multiply_columns<1>(x, m, y, column);
}

// f(row, column) for every vector of rows of so many features.
template <class F>
MAM_INLINE void for_vectors(int64_t rows, int64_t features, F f) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t e = 0; e < features; e += kLanes) f(r, e);
}

MAM_INLINE float sum_lanes(V v) {
  float values[kLanes];
  store(values, v);
  return sum_lanes(values);
}

void normalise(const Norm& norm, const Rows& x, const Rows& y) {
  for (int64_t r = 0; r < x.count; ++r) {
    const float* from = x[r];
    V sum = V{}, squares = V{};
    if (norm.offset)
      for (int64_t e = 0; e < norm.size; e += kLanes) sum += load(from + e);
    const float mean = norm.offset ? sum_lanes(sum) / norm.size : 0.0f;
    for (int64_t e = 0; e < norm.size; e += kLanes) {
      const V centred = load(from + e) - mean;
      squares += centred * centred;
    }
    const float inverse = 1.0f / __builtin_sqrtf(sum_lanes(squares) / norm.size + norm.eps);
    for (int64_t e = 0; e < norm.size; e += kLanes) {
      const V normal = (load(from + e) - mean) * inverse * load(norm.scale + e);
      store(y[r] + e, norm.offset ? normal + load(norm.offset + e) : normal);
    }
  }
}

// What a convolution knows of earlier agents: their inputs, a ring of [taps, features] per row.
void convolve(const Conv& conv, const Rows& x, float* ring, int64_t agent, const Rows& y) {
  const int64_t newest = agent % conv.taps;
  for_vectors(x.count, conv.features, [&](int64_t r, int64_t e) {
    float* own = ring + r * conv.taps * conv.features + e;
    store(own + newest * conv.features, load(x[r] + e));
    V sum = load(conv.bias + e);
    for (int64_t k = 0, at = newest + 1; k < conv.taps; ++k, ++at) {
      at = at == conv.taps ? 0 : at;
      sum += load(own + at * conv.features) * load(conv.weight + k * conv.features + e);
    }
    store(y[r] + e, silu(sum));
  });
}

}  // namespace
