// The selective scan, forward and backward, in vectors of channels: a part of kernels.cc.
//
// A task runs one sequence after another, and each in chunks of kChunk agents: while a chunk's inputs are in the cache,
// every vector of channels passes over them with up to kGroup states in registers. Backward, the decays and states of
// a chunk are computed again from the state before it. The equations are those of mam.networks.scan.
#pragma once

#include "kernels.h"
#include "scan_parts.inl"
#include "simd.h"

namespace {

using mam::ScanBackward;
using mam::ScanForward;

// One vector of channels and one group of states, over a chunk; `ahead` is how far away the next chunk is.
template <int G, bool kShared>
MAM_INLINE void advance(const Agents& agents, int64_t channel, int64_t lanes, int64_t state, const float* rates,
                        const float* D, States<const float> before, States<float> after, float* y, int64_t ahead) {
  V h[G];
  before.read(h, state, channel, lanes);
  const V skip = load(D + channel, lanes);
  for (int64_t i = 0; i < agents.count; ++i) {
    const int64_t here = i * agents.wide + channel;
    const V dt = load(agents.dt + here, lanes), x = load(agents.x + here, lanes), u = dt * x;
    const float *B = opaque(agents.B + i * agents.narrow + state), *C = opaque(agents.C + i * agents.narrow + state);
    const float* own_rates = opaque(rates);
    prefetch(agents.x + here + ahead);
    prefetch(agents.dt + here + ahead);
    if (y) prefetch(y + here + ahead);
    if (agents.reset(i)) {
      MAM_UNROLL
      for (int s = 0; s < G; ++s) h[s] = V{};
    }
    V sum[2] = {state ? V{} : skip * x, V{}}, a = V{};
    if (kShared) a = exp2(dt * load(own_rates));
    MAM_UNROLL
    for (int s = 0; s < G; ++s) {
      if (!kShared) a = exp2(dt * load(own_rates + s * kLanes));
      h[s] = a * h[s] + u * B[s];
      sum[s % 2] += h[s] * C[s];
    }
    if (y) store(y + here, state ? load(y + here, lanes) + sum[0] + sum[1] : sum[0] + sum[1], lanes);
  }
  after.write(h, state, channel, lanes);
}

void scan_forward(const ScanForward& scan, int64_t index, float* scratch) {
  const Task task(scan, index);
  const int64_t size = scan.states * scan.channels;
  float *rates = scratch, *carry = rates + scan.states * scan.tile_width();
  read_rates(scan, task, rates);
  for (int64_t sequence = task.begin; sequence < task.end; ++sequence) {
    const int64_t row = task.group * scan.sequences + sequence;
    States<const float> before = {scan.initial ? scan.initial + row * size + task.channel : nullptr, scan.channels};
    for (int64_t first = 0; first < scan.agents; first += kChunk) {
      const Agents agents(scan, task, sequence, first);
      const bool is_last = first + kChunk >= scan.agents;
      const int64_t ahead = agents.until(Agents(scan, task, sequence + is_last, is_last ? 0 : first + kChunk));
      States<float> after = {carry, scan.tile_width()};
      if (is_last)
        after = {scan.last ? scan.last + row * size + task.channel : nullptr, scan.channels};
      else if (scan.starts)
        after = {scan.starts + (row * scan.kept_states() + first / kChunk) * size + task.channel, scan.channels};
      for (int64_t e = 0; e < task.vectors; ++e)
        for_state_groups(scan, [&](auto group, int64_t state, auto shared) {
          advance<decltype(group)::value, decltype(shared)::value>(
              agents, e * kLanes, task.width - e * kLanes, state, rates + rate_of(scan, e, state),
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
  }
};

MAM_INLINE void zero(float* to, int64_t size) { __builtin_memset(to, 0, size * sizeof(float)); }

MAM_INLINE void add(float* to, V v) { store(to, load(to) + v); }

// Of a chunk's first agent: the gradient of y, or null, and where those of x and dt go.
struct Outer {
  const float* gy;
  float *gx, *gdt;
};

// One vector of channels and one group of states, over a chunk.
template <int G, bool kShared>
MAM_INLINE void retreat(const Scan& scan, const Agents& agents, int64_t e, int64_t lanes, int64_t state, const float* D,
                        States<const float> before, States<const float> later_in, States<float> later_out,
                        const Gathered& to, const Outer& outer, int64_t ahead) {
  constexpr int kRates = kShared ? 1 : G;
  const int64_t channel = e * kLanes, own = rate_of(scan, e, state);
  const float* rates = to.rates + own;
  float* gA = to.gA + own;
  // 1. The decays and the states, again.
  V h[G];
  before.read(h, state, channel, lanes);
  for (int64_t i = 0; i < agents.count; ++i) {
    const int64_t here = i * agents.wide + channel;
    const V dt = load(agents.dt + here, lanes), u = dt * load(agents.x + here, lanes);
    const float *B = opaque(agents.B + i * agents.narrow + state), *own_rates = opaque(rates);
    const bool reset = agents.reset(i);
    float *decays = opaque(to.decays + i * kRates * kLanes), *states = opaque(to.states + i * G * kLanes);
    prefetch(agents.x + here + ahead);
    prefetch(agents.dt + here + ahead);
    if (outer.gy) prefetch(outer.gy + here + ahead);
    prefetch(outer.gx + here + ahead);
    prefetch(outer.gdt + here + ahead);
    V a = V{};
    MAM_UNROLL
    for (int s = 0; s < G; ++s) {
      if (s < kRates) {
        a = reset ? V{} : exp2(dt * load(own_rates + s * kLanes));
        store(decays + s * kLanes, a);
      }
      store(states + s * kLanes, h[s]);
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
    const V dt = load(agents.dt + here, lanes), x = load(agents.x + here, lanes), u = dt * x;
    const V gy = outer.gy ? load(outer.gy + here, lanes) : V{};
    const float *B = opaque(agents.B + i * agents.narrow + state), *C = opaque(agents.C + i * agents.narrow + state);
    const float *decays = opaque(to.decays + i * kRates * kLanes), *states = opaque(to.states + i * G * kLanes);
    float* gB = opaque(to.gB + (i * scan.states + state) * kLanes);
    float* gC = opaque(to.gC + (i * scan.states + state) * kLanes);
    const float* own_rates = opaque(rates);
    float* own_gA = opaque(gA);
    V gu = V{}, g_rate = V{}, ag_h = V{};
    MAM_UNROLL
    for (int s = 0; s < G; ++s) {
      const V g = gy * C[s] + later[s];
      add(gC + s * kLanes, gy * load(states + (G + s) * kLanes));
      add(gB + s * kLanes, g * u);
      gu += g * B[s];
      later[s] = g * load(decays + (kShared ? 0 : s) * kLanes);
      const V own_ag_h = later[s] * load(states + s * kLanes);
      ag_h = kShared ? ag_h + own_ag_h : own_ag_h;
      if (!kShared || s == G - 1) {
        g_rate += ag_h * load(own_rates + (kShared ? 0 : s) * kLanes);
        add(own_gA + (kShared ? 0 : s) * kLanes, ag_h * dt);
      }
    }
    V gx = gu * dt, gdt = gu * x + g_rate * kLn2;
    if (state) {
      gx += load(outer.gx + here, lanes);
      gdt += load(outer.gdt + here, lanes);
    } else {
      gx += gy * skip;
      gD += gy * x;
    }
    store(outer.gx + here, gx, lanes);
    store(outer.gdt + here, gdt, lanes);
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
  for (int64_t sequence = task.begin; sequence < task.end; ++sequence) {
    const int64_t row = task.group * scan.sequences + sequence;
    States<const float> later_in = {scan.g_last ? scan.g_last + row * size + task.channel : nullptr, scan.channels};
    for (int64_t chunk = last_chunk; chunk >= 0; --chunk) {
      const Agents agents(scan, task, sequence, chunk * kChunk);
      const int64_t next = chunk ? chunk - 1 : last_chunk;
      const int64_t ahead = agents.until(Agents(scan, task, sequence + !chunk, next * kChunk));
      const float* kept = scan.initial ? scan.initial + row * size : nullptr;
      if (chunk > 0) kept = scan.starts + (row * last_chunk + chunk - 1) * size;
      const States<const float> before = {kept ? kept + task.channel : nullptr, scan.channels};
      States<float> later_out = {to.later, scan.tile_width()};
      if (chunk == 0)
        later_out = {scan.g_initial ? scan.g_initial + row * size + task.channel : nullptr, scan.channels};
      const Outer outer = {scan.gy ? scan.gy + agents.from_wide : nullptr, scan.gx + agents.from_wide,
                           scan.gdt + agents.from_wide};
      zero(to.gB, agents.count * scan.states * kLanes);
      zero(to.gC, agents.count * scan.states * kLanes);
      for (int64_t e = 0; e < task.vectors; ++e)
        for_state_groups(scan, [&](auto group, int64_t state, auto shared) {
          retreat<decltype(group)::value, decltype(shared)::value>(
              scan, agents, e, task.width - e * kLanes, state, scan.D + task.group * scan.channels + task.channel,
              before, later_in, later_out, to, outer, ahead);
        });
      // The tile's own share of gB and gC.
      const int64_t shift = (task.group * (scan.tiles - 1) + task.tile) * scan.sequences * scan.agents * scan.states;
      for (int64_t i = 0; i < agents.count; ++i)
        for (int64_t s = 0; s < scan.states; ++s) {
          const int64_t place = shift + agents.from_narrow + i * agents.narrow + s;
          scan.gB[place] = sum_lanes(to.gB + (i * scan.states + s) * kLanes);
          scan.gC[place] = sum_lanes(to.gC + (i * scan.states + s) * kLanes);
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
}

}  // namespace
