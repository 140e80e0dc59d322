// LayerNorm and RMSNorm of rows, or of the sums of two, forward and backward: a part of kernels.cc. The equations are
// those of mam.networks.layers. Rows are multiples of kMaxLanes.
#pragma once

#include "kernels.h"
#include "share.inl"
#include "simd.h"

namespace {

using mam::Norm;
using mam::Normalisation;

// What a row becomes: normal(e) has unit variance, and mean zero if the norm has an offset.
struct NormalRow {
  const float *x, *plus;
  float mean, inverse;

  MAM_INLINE NormalRow(const Norm& norm, const float* x, const float* plus) : x(x), plus(plus), mean(0) {
    V sum = V{}, squares = V{};
    if (norm.offset) {
      for (int64_t e = 0; e < norm.size; e += kLanes) sum += element(e);
      mean = sum_lanes(sum) / norm.size;
    }
    for (int64_t e = 0; e < norm.size; e += kLanes) {
      const V centred = element(e) - mean;
      squares += centred * centred;
    }
    inverse = 1.0f / __builtin_sqrtf(sum_lanes(squares) / norm.size + norm.eps);
  }

  MAM_INLINE V element(int64_t e) const { return plus ? load(x + e) + load(plus + e) : load(x + e); }
  MAM_INLINE V normal(int64_t e) const { return (element(e) - mean) * inverse; }
};

MAM_INLINE void normalise_row(const Norm& norm, const float* x, const float* plus, float* y) {
  const NormalRow row(norm, x, plus);
  for (int64_t e = 0; e < norm.size; e += kLanes) {
    const V scaled = row.normal(e) * load(norm.scale + e);
    store(y + e, norm.offset ? scaled + load(norm.offset + e) : scaled);
  }
}

// The row's gradient, and what it adds to those of scale and offset.
MAM_INLINE void normalise_row_backward(const Norm& norm, const float* x, const float* plus, const float* gy, float* gx,
                                       float* g_scale, float* g_offset) {
  const NormalRow row(norm, x, plus);
  V sum = V{}, along = V{};
  for (int64_t e = 0; e < norm.size; e += kLanes) {
    const V normal = row.normal(e), g_out = load(gy + e), g = g_out * load(norm.scale + e);
    along += g * normal;
    store(g_scale + e, load(g_scale + e) + g_out * normal);
    if (!norm.offset) continue;
    sum += g;
    store(g_offset + e, load(g_offset + e) + g_out);
  }
  const float mean_along = sum_lanes(along) / norm.size, mean = norm.offset ? sum_lanes(sum) / norm.size : 0.0f;
  for (int64_t e = 0; e < norm.size; e += kLanes) {
    const V g = load(gy + e) * load(norm.scale + e);
    store(gx + e, (g - row.normal(e) * mean_along - mean) * row.inverse);
  }
}

void normalisation(const Normalisation& n, int64_t task) {
  const Share own(n.rows, n.blocks, task);
  const int64_t size = n.size, group = own.group * size;
  const Norm norm = {n.scale + group, n.offset ? n.offset + group : nullptr, size, n.eps};
  float *const g_scale = n.g_scale + task * size, *const g_offset = n.g_offset + task * size;
  if (n.gy) __builtin_memset(g_scale, 0, size * sizeof(float));
  if (n.gy && n.offset) __builtin_memset(g_offset, 0, size * sizeof(float));
  for (int64_t at = own.begin * size; at < own.end * size; at += size) {
    const float* plus = n.plus ? n.plus + at : nullptr;
    if (n.gy)
      normalise_row_backward(norm, n.x + at, plus, n.gy + at, n.gx + at, g_scale, g_offset);
    else
      normalise_row(norm, n.x + at, plus, n.y + at);
  }
}

}  // namespace
