// The plain layers of the decode kernel, for some environments together: a part of kernels.cc.
#pragma once

#include "decode.h"
#include "multiply.inl"
#include "norm.inl"
#include "simd.h"

namespace {

using mam::Conv;

// f(row, column) for every vector of rows of so many features.
template <class F>
MAM_INLINE void for_vectors(int64_t rows, int64_t features, F f) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t e = 0; e < features; e += kLanes) f(r, e);
}

void normalise(const Norm& norm, const Rows& x, const Rows& y) {
  for (int64_t r = 0; r < x.count; ++r) normalise_row(norm, x[r], nullptr, y[r]);
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
