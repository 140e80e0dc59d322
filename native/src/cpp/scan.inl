// The selective scan, forward and backward, in vectors of channels: a part of kernels.cc.
//
// A task runs one sequence after another, and each in chunks of kChunk agents: while a chunk's inputs are in the cache,
// every vector of channels passes over them with up to kGroup states in registers. Backward, the decays and states of
// a chunk are computed again from the state before it. The equations are those of mam.kernels.selective_scan. Of a gated
// scan, a chunk's step sizes are made before the chunk, and what their gradients are made of is gathered after it.
#pragma once

#include "kernels.h"
#include "scan_gated.inl"
#include "scan_parts.inl"
#include "simd.h"

namespace {

using mam::ScanBackward;
using mam::ScanForward;

// One vector of channels and one group of states, over a chunk; `ahead` is how far away the next chunk is.
template <int G, Form kForm>
MAM_INLINE void advance(const Scan& scan, const Agents& agents, int64_t channel, int64_t lanes, int64_t state,
                        const float* rates, const float* D, States<const float> before, States<float> after, float* y,
                        int64_t ahead) {
  constexpr bool kShared = kForm == Form::kShared;
  V h[G];
  before.read(h, state, channel, lanes);
  const V skip = load(D + channel, lanes);
  for (int64_t i = 0; i < agents.count; ++i) {
    const int64_t here = i * agents.wide + channel;
    const V dt = load(agents.dt + i * agents.dt_step + channel, lanes), x = load(agents.x + here, lanes), u = dt * x;
    const float *B = opaque(agents.B + i * agents.narrow + state), *C = opaque(agents.C + i * agents.narrow + state);
    const float* own_rates = opaque(rates);
    prefetch(agents.x + here + ahead);
    prefetch(agents.second() + here + ahead);
    if (y) prefetch(y + here + ahead);
    if (agents.reset(i)) zero(h);
    V sum[2] = {state ? V{} : skip * x, V{}}, a = V{};
    if (kShared) a = exp2(dt * load(own_rates));
    MAM_UNROLL
    for (int s = 0; s < G; ++s) {
      if (!kShared) a = exp2(dt * load(own_rates + s * kLanes));
      h[s] = a * h[s] + u * B[s];
      sum[s % 2] += h[s] * C[s];
    }
    if (!y) continue;
    V own = state ? load(y + here, lanes) + sum[0] + sum[1] : sum[0] + sum[1];
    if (kForm == Form::kGated && state + G == scan.states) own *= silu(load(agents.gate + here, lanes));
    store(y + here, own, lanes);
  }
  after.write(h, state, channel, lanes);
}

void scan_forward(const ScanForward& scan, int64_t index, float* scratch) {
  const Task task(scan, index);
  const int64_t size = scan.states * scan.channels;
  float *rates = scratch, *carry = rates + scan.states * scan.tile_width();
  float* dt = carry + scan.states * scan.tile_width();
  read_rates(scan, task, rates);
  for (int64_t sequence = task.begin; sequence < task.end; ++sequence) {
    const int64_t row = task.group * scan.sequences + sequence;
    States<const float> before = {scan.initial ? scan.initial + row * size + task.channel : nullptr, scan.channels};
    for (int64_t first = 0; first < scan.agents; first += kChunk) {
      Agents agents(scan, task, sequence, first);
      if (scan.rank) make_step_sizes(scan, task, agents, dt, nullptr);
      const bool is_last = first + kChunk >= scan.agents;
      const int64_t ahead = agents.until(Agents(scan, task, sequence + is_last, is_last ? 0 : first + kChunk));
      States<float> after = {carry, scan.tile_width()};
      if (is_last)
        after = {scan.last ? scan.last + row * size + task.channel : nullptr, scan.channels};
      else if (scan.starts)
        after = {scan.starts + (row * scan.kept_states() + first / kChunk) * size + task.channel, scan.channels};
      for (int64_t e = 0; e < task.vectors; ++e)
        for_state_groups(scan, [&](auto group, int64_t state, auto form) {
          advance<decltype(group)::value, decltype(form)::value>(
              scan, agents, e * kLanes, task.width - e * kLanes, state, rates + rate_of(scan, e, state),
              scan.D + task.group * scan.channels + task.channel, before, after,
              scan.y ? scan.y + agents.from_wide : nullptr, ahead);
        });
      before = {after.from, after.stride};
    }
  }
}

// Where a task gathers gradients that are sums, and holds what it computes again.
struct Gathered {
  float *rates;         // [vectors, rates] vectors, as is gA
  float *later;         // [vectors, states]: a_{i+1} G_{i+1} between chunks
  float *gA;
  float *gD;            // [vectors]
  float *decays;        // [kChunk, kGroup]
  float *states;        // [kChunk + 1, kGroup]: before each agent, and after the last
  float *gB, *gC;       // [kChunk, states]: with lanes still apart
  Steps steps;          // of a gated scan

  Gathered(const Scan& scan, float* scratch) {
    const int64_t whole = scan.states * scan.tile_width(), group = mam::kMaxStateGroup * mam::kMaxLanes;
    rates = scratch;
    later = rates + whole;
    gA = later + whole;
    gD = gA + whole;
    decays = gD + scan.tile_width();
    states = decays + kChunk * group;
    gB = states + (kChunk + 1) * group;
    gC = gB + kChunk * scan.states * mam::kMaxLanes;
    steps = Steps(scan, gC + kChunk * scan.states * mam::kMaxLanes);
  }
};

// Of a chunk's first agent: the gradient of y, or null, and where those of x, dt and the gate go.
struct Outer {
  const float* gy;
  float *gx, *gdt, *g_gate;

  MAM_INLINE const float* second() const { return g_gate ? g_gate : gdt; }
};

alignas(64) constexpr float kNoState[mam::kMaxStateGroup * mam::kMaxLanes] = {};  // before an agent that is reset

// One vector of channels and one group of states, over a chunk.
template <int G, Form kForm>
MAM_INLINE void retreat(const Scan& scan, const Agents& agents, int64_t e, int64_t lanes, int64_t state, const float* D,
                        States<const float> before, States<const float> later_in, States<float> later_out,
                        const Gathered& to, const Outer& outer, int64_t ahead) {
  constexpr bool kShared = kForm == Form::kShared, kGated = kForm == Form::kGated;
  constexpr int kRates = kShared ? 1 : G;
  const int64_t channel = e * kLanes, own = rate_of(scan, e, state);
  const float* rates = to.rates + own;
  float* gA = to.gA + own;
  V open[kGated ? kChunk : 1];  // sigmoids of the gate: made here, because later an agent would wait for its own
  // 1. The decays and the states, again.
  V h[G];
  before.read(h, state, channel, lanes);
  for (int64_t i = 0; i < agents.count; ++i) {
    const int64_t here = i * agents.wide + channel;
    const V dt = load(agents.dt + i * agents.dt_step + channel, lanes), u = dt * load(agents.x + here, lanes);
    const float *B = opaque(agents.B + i * agents.narrow + state), *own_rates = opaque(rates);
    float *decays = opaque(to.decays + i * kRates * kLanes), *states = opaque(to.states + i * G * kLanes);
    prefetch(agents.x + here + ahead);
    prefetch(agents.second() + here + ahead);
    if (outer.gy) prefetch(outer.gy + here + ahead);
    prefetch(outer.gx + here + ahead);
    prefetch(outer.second() + here + ahead);
    if (kGated) open[i] = 1.0f / (1.0f + exp(-load(agents.gate + here, lanes)));
    MAM_UNROLL
    for (int s = 0; s < G; ++s) store(states + s * kLanes, h[s]);
    if (agents.reset(i)) zero(h);
    V a = V{};
    MAM_UNROLL
    for (int s = 0; s < G; ++s) {
      if (s < kRates) {
        a = exp2(dt * load(own_rates + s * kLanes));
        store(decays + s * kLanes, a);
      }
      h[s] = a * h[s] + u * B[s];
    }
  }
  MAM_UNROLL
  for (int s = 0; s < G; ++s) store(to.states + (agents.count * G + s) * kLanes, h[s]);
  // 2. Back.
  V later[G], gD = load(to.gD + channel);
  later_in.read(later, state, channel, lanes);
  const V skip = load(D + channel, lanes);
  for (int64_t i = agents.count - 1; i >= 0; --i) {
    const int64_t here = i * agents.wide + channel;
    const V dt = load(agents.dt + i * agents.dt_step + channel, lanes), x = load(agents.x + here, lanes), u = dt * x;
    const V g_out = outer.gy ? load(outer.gy + here, lanes) : V{};
    const V gate = kGated ? load(agents.gate + here, lanes) * open[i] : splat(1.0f);
    const V gy = kGated ? g_out * gate : g_out;
    const float *B = opaque(agents.B + i * agents.narrow + state), *C = opaque(agents.C + i * agents.narrow + state);
    const float *decays = opaque(to.decays + i * kRates * kLanes), *states = opaque(to.states + i * G * kLanes);
    const float* known = opaque(agents.reset(i) ? kNoState : states);
    float* gB = opaque(to.gB + (i * scan.states + state) * kLanes);
    float* gC = opaque(to.gC + (i * scan.states + state) * kLanes);
    const float* own_rates = opaque(rates);
    float* own_gA = opaque(gA);
    V gu = V{}, g_rate = V{}, ag_h = V{}, y = V{};
    if (kGated) y = state ? load(outer.g_gate + here, lanes) : skip * x;
    MAM_UNROLL
    for (int s = 0; s < G; ++s) {
      const V g = gy * C[s] + later[s];
      const V h_after = load(states + (G + s) * kLanes);
      add(gC + s * kLanes, gy * h_after);
      if (kGated) y += h_after * C[s];
      add(gB + s * kLanes, g * u);
      gu += g * B[s];
      later[s] = g * load(decays + (kShared ? 0 : s) * kLanes);
      const V own_ag_h = later[s] * load(known + s * kLanes);
      ag_h = kShared ? ag_h + own_ag_h : own_ag_h;
      if (!kShared || s == G - 1) {
        g_rate += ag_h * load(own_rates + (kShared ? 0 : s) * kLanes);
        add(own_gA + (kShared ? 0 : s) * kLanes, ag_h * dt);
      }
    }
    if (agents.reset(i)) zero(later);
    V gx = gu * dt, gdt = gu * x + g_rate * kLn2;
    if (state) {
      gx += load(outer.gx + here, lanes);
      gdt += load(outer.gdt + i * agents.dt_step + channel, lanes);
    } else {
      gx += gy * skip;
      gD += gy * x;
    }
    store(outer.gx + here, gx, lanes);
    store(outer.gdt + i * agents.dt_step + channel, gdt, kGated ? kLanes : lanes);
    if (kGated && state + G == scan.states) y *= g_out * (open[i] + gate * (1.0f - open[i]));
    if (kGated) store(outer.g_gate + here, y, lanes);
  }
  store(to.gD + channel, gD);
  later_out.write(later, state, channel, lanes);
}

void scan_backward(const ScanBackward& scan, int64_t index, float* scratch) {
  const Task task(scan, index);
  const Gathered to(scan, scratch);
  const int64_t size = scan.states * scan.channels, last_chunk = scan.kept_states();
  read_rates(scan, task, to.rates);
  zero(to.gA, task.vectors * scan.rates * kLanes);
  zero(to.gD, task.vectors * kLanes);
  if (scan.rank) zero(to.steps.g_weight, task.vectors * (scan.rank + 1) * kLanes);
  for (int64_t sequence = task.begin; sequence < task.end; ++sequence) {
    const int64_t row = task.group * scan.sequences + sequence;
    States<const float> later_in = {scan.g_last ? scan.g_last + row * size + task.channel : nullptr, scan.channels};
    for (int64_t chunk = last_chunk; chunk >= 0; --chunk) {
      Agents agents(scan, task, sequence, chunk * kChunk);
      if (scan.rank) make_step_sizes(scan, task, agents, to.steps.dt, to.steps.slope);
      const int64_t next = chunk ? chunk - 1 : last_chunk;
      const int64_t ahead = agents.until(Agents(scan, task, sequence + !chunk, next * kChunk));
      const float* kept = scan.initial ? scan.initial + row * size : nullptr;
      if (chunk > 0) kept = scan.starts + (row * last_chunk + chunk - 1) * size;
      const States<const float> before = {kept ? kept + task.channel : nullptr, scan.channels};
      States<float> later_out = {to.later, scan.tile_width()};
      if (chunk == 0)
        later_out = {scan.g_initial ? scan.g_initial + row * size + task.channel : nullptr, scan.channels};
      const Outer outer = {scan.gy ? scan.gy + agents.from_wide : nullptr, scan.gx + agents.from_wide,
                           scan.rank ? to.steps.gdt : scan.gdt + agents.from_wide,
                           scan.rank ? scan.g_gate + agents.from_wide : nullptr};
      zero(to.gB, agents.count * scan.states * kLanes);
      zero(to.gC, agents.count * scan.states * kLanes);
      for (int64_t e = 0; e < task.vectors; ++e)
        for_state_groups(scan, [&](auto group, int64_t state, auto form) {
          retreat<decltype(group)::value, decltype(form)::value>(
              scan, agents, e, task.width - e * kLanes, state, scan.D + task.group * scan.channels + task.channel,
              before, later_in, later_out, to, outer, ahead);
        });
      // The tile's own shares.
      const int64_t shift = (task.group * (scan.tiles - 1) + task.tile) * scan.sequences * scan.agents;
      sum_all_lanes(to.gB, agents, scan.states, scan.gB + shift * scan.states);
      sum_all_lanes(to.gC, agents, scan.states, scan.gC + shift * scan.states);
      if (scan.rank) {
        gather_features(scan, task, agents, to.steps);
        sum_all_lanes(to.steps.g_features, agents, scan.rank, scan.gdt + shift * scan.rank);
      }
      later_in = {later_out.from, later_out.stride};
    }
  }
  float* gA = scan.gA + (task.group * scan.blocks + task.block) * scan.rates * scan.channels + task.channel;
  float* gD = scan.gD + (task.group * scan.blocks + task.block) * scan.channels + task.channel;
  for (int64_t e = 0; e < task.vectors; ++e) {
    const int64_t channel = e * kLanes, lanes = task.width - channel;
    for (int64_t s = 0; s < scan.rates; ++s)
      store(gA + s * scan.channels + channel, load(to.gA + (e * scan.rates + s) * kLanes), lanes);
    store(gD + channel, load(to.gD + channel), lanes);
  }
  if (scan.rank) to.steps.write_weights(scan, task);
}

}  // namespace
