// How the scan is cut: into tasks, sequences, chunks of agents and groups of states. A part of kernels.cc.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace {

using mam::kChunk;
using mam::Scan;

// States in registers: of 32 registers 16, of 16 registers 8.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kGroup = 16;
#else
constexpr int kGroup = 8;
#endif
static_assert(kGroup <= mam::kMaxStateGroup && kLanes <= mam::kMaxLanes, "scratch is sized for the largest");

template <int N>
struct Size {
  static constexpr int value = N;
};

// Calls f(Size<G>, first state) for groups that together are all states.
template <class F>
MAM_INLINE void for_groups(int64_t states, F f) {
  int64_t s = 0;
  for (; states - s >= kGroup; s += kGroup) f(Size<kGroup>{}, s);
  if (kGroup > 8 && states - s >= 8) f(Size<8>{}, s), s += 8;
  if (states - s >= 4) f(Size<4>{}, s), s += 4;
  if (states - s >= 2) f(Size<2>{}, s), s += 2;
  if (states - s >= 1) f(Size<1>{}, s);
}

// What a channel's states share: one rate (Mamba-2), nothing, or nothing and the scan is gated (Mamba-1).
enum class Form { kShared, kOwn, kGated };

// The same; f's last argument is the form.
template <class F>
MAM_INLINE void for_state_groups(const Scan& scan, F f) {
  const auto all = [&](auto form) {
    for_groups(scan.states, [&](auto group, int64_t state) { f(group, state, form); });
  };
  if (scan.rank)
    all(std::integral_constant<Form, Form::kGated>{});
  else if (scan.rates < scan.states)
    all(std::integral_constant<Form, Form::kShared>{});
  else
    all(std::integral_constant<Form, Form::kOwn>{});
}

// What one task does.
struct Task {
  int64_t group, block, tile;
  int64_t begin, end;       // sequences
  int64_t channel, width;   // the first channel, and how many
  int64_t vectors;

  Task(const Scan& scan, int64_t index) {
    tile = index % scan.tiles;
    block = index / scan.tiles % scan.blocks;
    group = index / scan.tiles / scan.blocks;
    begin = scan.sequences * block / scan.blocks;
    end = scan.sequences * (block + 1) / scan.blocks;
    channel = tile * scan.tile_width();
    width = scan.channels - channel < scan.tile_width() ? scan.channels - channel : scan.tile_width();
    vectors = (width + kLanes - 1) / kLanes;
  }
};

// Some agents of one sequence, in the order in which they are read. Pointers are to the first one.
struct Agents {
  int64_t count;
  int64_t first;          // of all agents of all sequences
  int64_t step;           // from one agent to the next: 1 or -1
  int64_t wide, narrow;   // the same in arrays over channels, and over states
  int64_t from_wide;      // the place of the first one in arrays over channels
  const float *x, *B, *C, *resets;
  const float* dt;
  int64_t dt_step;        // from one agent to the next in dt and its gradient
  const float* features;  // gated: what dt is made of
  const float *gate, *alive;

  Agents(const Scan& scan, const Task& task, int64_t sequence, int64_t begin) {
    count = scan.agents - begin < kChunk ? scan.agents - begin : kChunk;
    step = scan.reverse ? -1 : 1;
    wide = step * scan.channels;
    narrow = step * scan.states;
    const int64_t row = task.group * scan.sequences + sequence;
    first = row * scan.agents + (scan.reverse ? scan.agents - 1 - begin : begin);
    from_wide = first * scan.channels + task.channel;
    x = scan.x + from_wide;
    dt = scan.dt + (scan.rank ? 0 : from_wide);
    dt_step = wide;
    features = scan.dt + first * scan.rank;
    gate = scan.rank ? scan.gate + from_wide : nullptr;
    alive = scan.alive ? scan.alive + first : nullptr;
    B = scan.B + first * scan.states;
    C = scan.C + first * scan.states;
    resets = scan.reset ? scan.reset + first : nullptr;
  }

  // How far away those are that come next, in arrays over channels: to be fetched in time.
  int64_t until(const Agents& next) const { return next.from_wide - from_wide; }

  // The array over channels that is read besides x: it is fetched in time, too.
  MAM_INLINE const float* second() const { return gate ? gate : dt; }

  MAM_INLINE bool reset(int64_t i) const { return resets && resets[i * step] != 0.0f; }
  MAM_INLINE bool dead(int64_t i) const { return alive && alive[i * step] == 0.0f; }
};

// States [states, channels] of a sequence; null stands for zeros when read, and for nowhere when written.
template <class T>
struct States {
  T* from;
  int64_t stride;

  template <int G>
  MAM_INLINE void read(V (&h)[G], int64_t state, int64_t channel, int64_t lanes) const {
    MAM_UNROLL
    for (int s = 0; s < G; ++s) h[s] = from ? load(from + (state + s) * stride + channel, lanes) : V{};
  }

  template <int G>
  MAM_INLINE void write(const V (&h)[G], int64_t state, int64_t channel, int64_t lanes) const {
    if (!from) return;
    MAM_UNROLL
    for (int s = 0; s < G; ++s) store(from + (state + s) * stride + channel, h[s], lanes);
  }
};

// Where a vector of channels has its rates from some state on.
MAM_INLINE int64_t rate_of(const Scan& scan, int64_t vector, int64_t state) {
  return (vector * scan.rates + (scan.rates < scan.states ? 0 : state)) * kLanes;
}

// Each vector of channels has its rates A / ln 2 one state after another.
MAM_INLINE void read_rates(const Scan& scan, const Task& task, float* rates) {
  const float* A = scan.A + task.group * scan.rates * scan.channels + task.channel;
  for (int64_t e = 0; e < task.vectors; ++e)
    for (int64_t s = 0; s < scan.rates; ++s)
      store(rates + (e * scan.rates + s) * kLanes,
            load(A + s * scan.channels + e * kLanes, task.width - e * kLanes) * kLog2E);
}

template <int N>
MAM_INLINE void zero(V (&v)[N]) {
  MAM_UNROLL
  for (int k = 0; k < N; ++k) v[k] = V{};
}

MAM_INLINE void zero(float* to, int64_t size) { __builtin_memset(to, 0, size * sizeof(float)); }

MAM_INLINE void add(float* to, V v) { store(to, load(to) + v); }

// Of some agents' features [kChunk, size] with lanes still apart, the sums, into an array over all agents.
MAM_INLINE void sum_all_lanes(const float* from, const Agents& agents, int64_t size, float* to) {
  for (int64_t i = 0; i < agents.count; ++i)
    for (int64_t k = 0; k < size; ++k)
      to[(agents.first + i * agents.step) * size + k] = sum_lanes(from + (i * size + k) * kLanes);
}

}  // namespace
