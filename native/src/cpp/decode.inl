// All agents' decisions, one agent after another: a part of kernels.cc. A task runs some environments through all
// agents; per agent they go through the layers together, so that a weight that is read serves all of them.
#pragma once

#include "decode.h"
#include "decode_layers.inl"
#include "simd.h"

namespace {

using mam::Block;
using mam::Decode;
using mam::kDtLimit;
using mam::Kind;
using mam::Mixer;

constexpr float kIllegal = -1e9f;  // mam.networks.actions.ILLEGAL

// One agent's step of the recurrence: kSelective has a decay per channel and state, kDual one per channel.
template <bool kSelective>
MAM_INLINE void step_states(const Mixer& m, float* h, const float* x, const float* dt, const float* decay,
                            const float* B, const float* C, float* y) {
  const int64_t states = m.states;
  for (int64_t e = 0; e < m.channels; e += kLanes) {
    // 16 channels' states lie together, one state after another.
    const int64_t at = e / mam::kMaxLanes * mam::kMaxLanes * states + e % mam::kMaxLanes;
    const V xs = load(x + e), dts = load(dt + e), u = dts * xs, one_decay = kSelective ? V{} : load(decay + e);
    const auto step = [&](int64_t s) {
      float* own = h + at + s * mam::kMaxLanes;
      const V a = kSelective ? exp2(dts * load(m.rates + at + s * mam::kMaxLanes)) : one_decay;
      const V state = a * load(own) + u * B[s];
      store(own, state);
      return state * C[s];
    };
    V even = load(m.skip + e) * xs, odd = V{};  // two sums, neither of which waits for the other
    int64_t s = 0;
    for (; s + 1 < states; s += 2) even += step(s), odd += step(s + 1);
    if (s < states) even += step(s);
    store(y + e, even + odd);
  }
}

// Each head's number, for all its channels.
void spread(const Mixer& m, const float* per_head, float* per_channel) {
  const int64_t size = m.channels / m.heads;
  for (int64_t k = 0; k < m.heads; ++k)
    for (int64_t i = 0; i < size; ++i) per_channel[k * size + i] = per_head[k];
}

// The memories of a mixer, for all rows of a task.
struct Memory {
  float *states, *ring, *state_ring, *end;

  // At a place in scratch, which moves on.
  static MAM_INLINE Memory at(const Mixer& m, int64_t rows, float*& scratch) {
    float* const ring = scratch + rows * m.channels * m.states;
    float* const state_ring = ring + rows * m.conv.taps * m.conv.features;
    float* const end = state_ring + rows * m.state_conv.taps * m.state_conv.features;
    const Memory memory = {scratch, ring, state_ring, end};
    scratch = end;
    return memory;
  }

  // As it is before the first agent.
  void clear() const { __builtin_memset(states, 0, (end - states) * sizeof(float)); }
};

// Rows in work. A mixer's inputs are `in`, `gate`, `state`, `dt` and its result is `y`.
struct Work {
  Rows x, in, gate, state, dt, y, spare[2];

  Work(const Decode& d, int64_t count, float*& scratch) {
    Rows* all[] = {&x, &in, &gate, &state, &dt, &y, &spare[0], &spare[1]};
    static_assert(sizeof all / sizeof *all == Decode::kRowsInWork, "");
    for (Rows* rows : all) {
      *rows = {scratch, d.widest, count};
      scratch += d.rows * d.widest;
    }
  }
};

// The inputs of a mixer, from x.
void project(const Mixer& m, const Work& w) {
  normalise(m.pre_norm, w.x, w.spare[0]);
  multiply(w.spare[0], m.in, w.in);
  multiply(w.spare[0], m.gate, w.gate);
  for_vectors(w.x.count, m.channels, [&](int64_t r, int64_t e) { store(w.gate[r] + e, silu(load(w.gate[r] + e))); });
  if (m.kind == Kind::kDual) {
    multiply(w.spare[0], m.state, w.state);
    multiply(w.spare[0], m.dt, w.dt);
  }
}

MAM_INLINE V step_size(V x) { return smaller(softplus(x), splat(kDtLimit)); }

// x = post_norm(x + mixer(inputs)). `context` is C of the first row, if it is read from there.
void mix(const Mixer& m, const Memory& memory, int64_t agent, const float* context, int64_t context_stride,
         const Work& w) {
  const int64_t rows = w.x.count, size = m.channels * m.states;
  const Rows &convolved = w.spare[0], &decay = w.spare[1];
  convolve(m.conv, w.in, memory.ring, agent, convolved);
  // kSelective reads step sizes, B and C of the convolved x; `in` is free by now.
  int64_t B = 0, C = m.states;
  if (m.kind == Kind::kSelective) {
    multiply(convolved, m.x, w.state);
    multiply(w.state, m.dt, w.dt);
    for_vectors(rows, m.channels, [&](int64_t r, int64_t e) { store(w.dt[r] + e, step_size(load(w.dt[r] + e))); });
    B += m.dt.in, C += m.dt.in;
  } else {
    convolve(m.state_conv, w.state, memory.state_ring, agent, w.state);
    for_vectors(rows, m.dt.out, [&](int64_t r, int64_t e) {
      const V dt = step_size(load(w.dt[r] + e));
      store(w.dt[r] + e, dt);
      store(w.y[r] + e, exp2(dt * load(m.rates + e)));
    });
    for (int64_t r = 0; r < rows; ++r) {
      spread(m, w.y[r], decay[r]);
      spread(m, w.dt[r], w.in[r]);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float* own = w.state[r];
    const float* answers = context ? context + r * context_stride : own + C;
    float* h = memory.states + r * size;
    if (m.kind == Kind::kSelective)
      step_states<true>(m, h, convolved[r], w.dt[r], nullptr, own + B, answers, w.y[r]);
    else
      step_states<false>(m, h, convolved[r], w.in[r], decay[r], own + B, answers, w.y[r]);
  }
  for_vectors(rows, m.channels,
              [&](int64_t r, int64_t e) { store(w.y[r] + e, load(w.y[r] + e) * load(w.gate[r] + e)); });
  if (m.kind == Kind::kDual) normalise(m.norm, w.y, w.y);
  multiply(w.y, m.out, w.spare[0]);
  // The residual is x once more in the block's own: LN(x + LN(x + SSM(x))), by the caller.
  for_vectors(rows, m.out.out,
              [&](int64_t r, int64_t e) { store(w.spare[0][r] + e, load(w.spare[0][r] + e) + load(w.x[r] + e)); });
  normalise(m.post_norm, w.spare[0], w.y);
}

// x = norm(residual + y)
void add_and_normalise(const Norm& norm, const Rows& y, const float* residual, int64_t stride, const Rows& x) {
  for_vectors(x.count, norm.size,
              [&](int64_t r, int64_t e) { store(y[r] + e, load(y[r] + e) + load(residual + r * stride + e)); });
  normalise(norm, y, x);
}

void multiply_gelu(const Rows& x, const Matrix& m, const Rows& y) {
  multiply(x, m, y);
  for_vectors(x.count, m.out, [&](int64_t r, int64_t e) { store(y[r] + e, gelu(load(y[r] + e))); });
}

// The lowest index among the largest; the first that is not a number, if there is one: as jnp.argmax.
int32_t choose(const Decode& d, const float* logits, int64_t place) {
  const bool* mask = d.mask + place * d.actions;
  const float* noise = d.noise + place * d.actions;
  float best = -__builtin_inff();
  int32_t chosen = 0;
  for (int64_t a = 0; a < d.actions; ++a) {
    const float score = (mask[a] ? logits[a] : kIllegal) + noise[a];
    if (score <= best) continue;
    best = score;
    chosen = static_cast<int32_t>(a);
    if (score != score) break;
  }
  return chosen;
}

void copy(const float* table, const int32_t* token, int64_t size, const Rows& to) {
  for (int64_t r = 0; r < to.count; ++r) __builtin_memcpy(to[r], table + token[r] * size, size * sizeof(float));
}

void read_tokens(const Decode& d, const int32_t* token, const Work& w) {
  const Mixer& m = d.blocks[0].mixer;
  copy(d.table.x, token, d.width, w.x);
  copy(d.table.in, token, m.channels, w.in);
  copy(d.table.gate, token, m.channels, w.gate);
  if (m.kind == Kind::kDual) {
    copy(d.table.state, token, m.state.out, w.state);
    copy(d.table.dt, token, m.dt.out, w.dt);
  }
}

void decode(const Decode& d, int64_t task, float* scratch) {
  const int64_t begin = task * d.rows, count = d.batch - begin < d.rows ? d.batch - begin : d.rows;
  const Work w(d, count, scratch);
  float* const memories = scratch;
  int32_t token[mam::kMaxRows];
  for (int32_t& t : token) t = static_cast<int32_t>(d.tokens - 1);
  for (int64_t agent = 0; agent < d.agents; ++agent) {
    read_tokens(d, token, w);
    float* at = memories;
    const float* obs_rep = d.obs_rep + (begin * d.agents + agent) * d.width;
    for (int64_t i = 0; i < d.num_blocks; ++i) {
      const Block& block = d.blocks[i];
      const int64_t states = block.cross.states;
      const Memory memory = Memory::at(block.mixer, d.rows, at), cross = Memory::at(block.cross, d.rows, at);
      if (agent == 0) memory.clear(), cross.clear();
      if (i) project(block.mixer, w);
      mix(block.mixer, memory, agent, nullptr, 0, w);
      add_and_normalise(block.mixer_norm, w.y, w.x.from, w.x.stride, w.x);
      project(block.cross, w);
      mix(block.cross, cross, agent, block.context + (begin * d.agents + agent) * states, d.agents * states, w);
      add_and_normalise(block.cross_norm, w.y, obs_rep, d.agents * d.width, w.x);
      multiply_gelu(w.x, block.hidden, w.spare[0]);
      multiply(w.spare[0], block.out, w.y);
      add_and_normalise(block.mlp_norm, w.y, w.x.from, w.x.stride, w.x);
    }
    multiply_gelu(w.x, d.hidden, w.spare[0]);
    normalise(d.norm, w.spare[0], w.spare[0]);
    multiply(w.spare[0], d.out, w.y);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t place = (begin + r) * d.agents + agent;
      __builtin_memcpy(d.logits + place * d.actions, w.y[r], d.actions * sizeof(float));
      d.action[place] = token[r] = choose(d, w.y[r], place);
    }
  }
}

}  // namespace
