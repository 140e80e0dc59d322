// Softmax attention among few agents, forward and backward: a part of kernels.cc. Per head the weights of all pairs lie
// on the stack, and are computed again for the gradient. Heads are multiples of kMaxLanes wide.
#pragma once

#include "kernels.h"
#include "share.inl"
#include "simd.h"

namespace {

using mam::Attention;

constexpr float kMasked = -1e9f;  // as MASKED in mam/networks/mixers/attention.py

MAM_INLINE float dot(const float* a, const float* b, int64_t size) {
  V sum = load(a) * load(b);
  for (int64_t e = kLanes; e < size; e += kLanes) sum += load(a + e) * load(b + e);
  return sum_lanes(sum);
}

// to += factor * from.
MAM_INLINE void add_scaled(float* to, float factor, const float* from, int64_t size) {
  for (int64_t e = 0; e < size; e += kLanes) store(to + e, load(to + e) + factor * load(from + e));
}

// One head of one sequence: row i of `weight` is agent i's softmax.
struct Head {
  const Attention& a;
  const float *q, *k, *v, *visible;
  int64_t row;  // floats between two rows of weights
  float weight[mam::kMaxAttended * mam::kMaxAttended];

  MAM_INLINE Head(const Attention& a, int64_t sequence, int64_t head) : a(a) {
    const int64_t at = sequence * a.agents * a.stride() + head * a.size;
    q = a.q + at, k = a.k + at, v = a.v + at;
    visible = a.visible + (a.shared ? sequence / a.sequences : sequence) * a.agents * a.agents;
    row = (a.agents + kLanes - 1) / kLanes * kLanes;
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(a.size));
    for (int64_t i = 0; i < a.agents; ++i) {
      float* const w = weight + i * row;
      for (int64_t j = a.agents; j < row; ++j) w[j] = -__builtin_inff();
      float most = -__builtin_inff();
      for (int64_t j = 0; j < a.agents; ++j) {
        w[j] = sees(i, j) ? dot(q + i * a.stride(), k + j * a.stride(), a.size) * scale : kMasked;
        most = w[j] > most || w[j] != w[j] ? w[j] : most;
      }
      V sum = V{};
      for (int64_t j = 0; j < row; j += kLanes) {
        const V e = exp(load(w + j) - most);
        store(w + j, e);
        sum += e;
      }
      const float inverse = 1.0f / sum_lanes(sum);
      for (int64_t j = 0; j < row; j += kLanes) store(w + j, load(w + j) * inverse);
    }
  }

  MAM_INLINE bool sees(int64_t i, int64_t j) const { return visible[i * a.agents + j] != 0.0f; }
};

MAM_INLINE void attend(const Head& head, float* y) {
  const Attention& a = head.a;
  for (int64_t i = 0; i < a.agents; ++i)
    for (int64_t e = 0; e < a.size; e += kLanes) {
      V sum = V{};
      for (int64_t j = 0; j < a.agents; ++j) sum += head.weight[i * head.row + j] * load(head.v + j * a.stride() + e);
      store(y + i * a.stride() + e, sum);
    }
}

MAM_INLINE void attend_backward(const Head& head, const float* gy, float* gq, float* gk, float* gv) {
  const Attention& a = head.a;
  const int64_t step = a.stride();
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(a.size));
  for (int64_t i = 0; i < a.agents; ++i)
    for (int64_t e = 0; e < a.size; e += kLanes)
      store(gq + i * step + e, V{}), store(gk + i * step + e, V{}), store(gv + i * step + e, V{});
  for (int64_t i = 0; i < a.agents; ++i) {
    const float* const w = head.weight + i * head.row;
    float g[mam::kMaxAttended], mean = 0;
    for (int64_t j = 0; j < a.agents; ++j) {
      g[j] = w[j] != 0.0f ? dot(gy + i * step, head.v + j * step, a.size) : 0.0f;
      mean += w[j] * g[j];
    }
    for (int64_t j = 0; j < a.agents; ++j) {
      if (w[j] == 0.0f) continue;
      add_scaled(gv + j * step, w[j], gy + i * step, a.size);
      if (!head.sees(i, j)) continue;
      const float score = w[j] * (g[j] - mean) * scale;
      add_scaled(gq + i * step, score, head.k + j * step, a.size);
      add_scaled(gk + j * step, score, head.q + i * step, a.size);
    }
  }
}

void attention(const Attention& a, int64_t task) {
  const Share own(a.sequences, a.blocks, task);
  for (int64_t sequence = own.begin; sequence < own.end; ++sequence)
    for (int64_t h = 0; h < a.heads; ++h) {
      const Head head(a, sequence, h);
      const int64_t at = sequence * a.agents * a.stride() + h * a.size;
      if (a.gy)
        attend_backward(head, a.gy + at, a.gq + at, a.gk + at, a.gv + at);
      else
        attend(head, a.y + at);
    }
}

}  // namespace
