// SiLU of a causal depthwise convolution along the agents, forward and backward: a part of kernels.cc. The last inputs,
// and the gradients that are not complete yet, are in registers. The equations are those of mam.networks.mixers.roles.
#pragma once

#include "kernels.h"
#include "share.inl"
#include "simd.h"

namespace {

using mam::Convolution;

// The first agent after this one, of those of a sequence in the order in which they are read, that is reset.
MAM_INLINE int64_t next_reset(const Convolution& c, int64_t row, int64_t agent) {
  if (!c.reset) return c.agents;
  const float* reset = c.reset + row * c.agents;
  while (++agent < c.agents && reset[c.reverse ? c.agents - 1 - agent : agent] == 0.0f) continue;
  return agent;
}

// Sequence by sequence, in the pieces that resets cut it into, and vector by vector:
// f(place of the piece's first agent, agents, channel, lanes).
template <class F>
MAM_INLINE void for_pieces(const Convolution& c, int64_t task, F f) {
  const Share own(c.sequences, c.blocks, task);
  for (int64_t row = own.begin; row < own.end; ++row)
    for (int64_t begin = 0, end; begin < c.agents; begin = end) {
      end = next_reset(c, row, begin);
      const int64_t first = row * c.agents + (c.reverse ? c.agents - 1 - begin : begin);
      for (int64_t e = 0; e < c.channels; e += kLanes) f(first * c.channels + e, end - begin, e, c.channels - e);
    }
}

// Moves every element one place on; a new one comes first.
template <int N>
MAM_INLINE void shift(V (&v)[N], V first) {
  MAM_UNROLL
  for (int k = N - 1; k > 0; --k) v[k] = v[k - 1];
  v[0] = first;
}

template <int K>
struct Weights {
  V tap[K];  // of the agent itself, the one before it, and so on
  V bias;

  Weights(const Convolution& c, int64_t group, int64_t channel, int64_t lanes) {
    MAM_UNROLL
    for (int k = 0; k < K; ++k) tap[k] = load(c.weight + (group * K + K - 1 - k) * c.channels + channel, lanes);
    bias = load(c.bias + group * c.channels + channel, lanes);
  }

  MAM_INLINE V apply(const V (&x)[K]) const {
    V sum = bias;
    MAM_UNROLL
    for (int k = 0; k < K; ++k) sum += tap[k] * x[k];
    return sum;
  }
};

template <int K>
void convolve_forward(const Convolution& c, int64_t task) {
  const int64_t next = c.agents * c.channels, step = c.step();
  for_pieces(c, task, [&](int64_t first, int64_t agents, int64_t channel, int64_t lanes) {
    const Weights<K> weights(c, task / c.blocks, channel, lanes);
    V x[K] = {};
    for (int64_t i = 0; i < agents; ++i) {
      const int64_t here = first + i * step;
      shift(x, load(c.x + here, lanes));
      prefetch(c.x + here + next);
      prefetch(c.y + here + next);
      store(c.y + here, silu(weights.apply(x)), lanes);
    }
  });
}

template <int K>
void convolve_backward(const Convolution& c, int64_t task) {
  const int64_t next = c.agents * c.channels, step = c.step();
  float *g_weight = c.g_weight + task * K * c.channels, *g_bias = c.g_bias + task * c.channels;
  __builtin_memset(g_weight, 0, K * c.channels * sizeof(float));
  __builtin_memset(g_bias, 0, c.channels * sizeof(float));
  for_pieces(c, task, [&](int64_t first, int64_t agents, int64_t channel, int64_t lanes) {
    const Weights<K> weights(c, task / c.blocks, channel, lanes);
    V x[K] = {}, gx[K] = {}, sums[K], sum = load(g_bias + channel, lanes);
    MAM_UNROLL
    for (int k = 0; k < K; ++k) sums[k] = load(g_weight + (K - 1 - k) * c.channels + channel, lanes);
    for (int64_t i = 0; i < agents + K - 1; ++i) {
      const int64_t here = first + i * step;
      shift(gx, V{});
      if (i < agents) {
        shift(x, load(c.x + here, lanes));
        prefetch(c.x + here + next);
        prefetch(c.gy + here + next);
        prefetch(c.gx + here + next);
        const V y = weights.apply(x), gate = 1.0f / (1.0f + exp(-y));
        const V g = load(c.gy + here, lanes) * gate * (1.0f + y * (1.0f - gate));
        MAM_UNROLL
        for (int k = 0; k < K; ++k) {
          gx[k] += g * weights.tap[k];
          sums[k] += g * x[k];
        }
        sum += g;
      }
      // No agent from here on has read the input of K - 1 agents ago.
      if (i >= K - 1) store(c.gx + here - (K - 1) * step, gx[K - 1], lanes);
    }
    MAM_UNROLL
    for (int k = 0; k < K; ++k) store(g_weight + (K - 1 - k) * c.channels + channel, sums[k], lanes);
    store(g_bias + channel, sum, lanes);
  });
}

template <int K>
void convolve(const Convolution& c, int64_t task) {
  if (c.gy)
    convolve_backward<K>(c, task);
  else
    convolve_forward<K>(c, task);
}

void convolution(const Convolution& c, int64_t task) {
  static_assert(mam::kMaxTaps == 4, "one case per number of taps");
  if (c.taps == 1) convolve<1>(c, task);
  if (c.taps == 2) convolve<2>(c, task);
  if (c.taps == 3) convolve<3>(c, task);
  if (c.taps == 4) convolve<4>(c, task);
}

}  // namespace
