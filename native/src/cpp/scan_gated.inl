// What a gated scan has around the recurrence: its step sizes, min(softplus(W dt + b), limit), 0 for the dead; the way
// back to dt, W and b; and the gate, which is applied where y is written. A part of kernels.cc.
#pragma once

#include "kernels.h"
#include "scan_parts.inl"
#include "simd.h"

namespace {

// Makes the step sizes of a chunk [kChunk, tile width], lets `agents` read them, and writes their derivatives by
// W dt + b to `slope`, unless that is null.
MAM_INLINE void make_step_sizes(const Scan& scan, const Task& task, Agents& agents, float* dt, float* slope) {
  const float* weight = scan.weight + task.group * (scan.rank + 1) * scan.channels + task.channel;
  agents.dt = dt;
  agents.dt_step = scan.tile_width();
  for (int64_t channel = 0; channel < task.width; channel += kLanes) {
    const int64_t lanes = task.width - channel;
    const V bias = load(weight + scan.rank * scan.channels + channel, lanes);
    for (int64_t i = 0; i < agents.count; ++i) {
      const float* features = agents.features + i * agents.step * scan.rank;
      V sum = bias;
      for (int64_t r = 0; r < scan.rank; ++r) sum += features[r] * load(weight + r * scan.channels + channel, lanes);
      const V e = exp_of_minus_abs(sum), size = softplus(sum, e);
      const int64_t here = i * agents.dt_step + channel;
      const bool dead = agents.dead(i);
      store(dt + here, dead ? V{} : smaller(size, splat(mam::kDtLimit)));
      if (!slope) continue;
      const V sigmoid = (sum < 0.0f ? e : splat(1.0f)) / (1.0f + e);
      store(slope + here, dead ? V{} : size < mam::kDtLimit ? sigmoid : V{});
    }
  }
}

// Memory for the way back.
struct Steps {
  float *dt, *slope, *gdt;  // [kChunk, tile width]
  float* g_weight;          // [vectors, rank + 1]
  float* g_features;        // [kChunk, rank]: with lanes still apart

  Steps() = default;
  Steps(const Scan& scan, float* scratch) {
    const int64_t chunk = kChunk * scan.tile_width();
    dt = scratch;
    slope = dt + chunk;
    gdt = slope + chunk;
    g_weight = gdt + chunk;
    g_features = g_weight + (scan.rank + 1) * scan.tile_width();
  }

  MAM_INLINE void write_weights(const mam::ScanBackward& scan, const Task& task) const {
    const int64_t block = task.group * scan.blocks + task.block;
    float* to = scan.g_weight + block * (scan.rank + 1) * scan.channels + task.channel;
    for (int64_t e = 0; e < task.vectors; ++e)
      for (int64_t r = 0; r <= scan.rank; ++r)
        store(to + r * scan.channels + e * kLanes, load(g_weight + (e * (scan.rank + 1) + r) * kLanes),
              task.width - e * kLanes);
  }
};

// From the gradients of a chunk's step sizes to those of what they are made of.
MAM_INLINE void gather_features(const Scan& scan, const Task& task, const Agents& agents, const Steps& to) {
  const float* weight = scan.weight + task.group * (scan.rank + 1) * scan.channels + task.channel;
  zero(to.g_features, agents.count * scan.rank * kLanes);
  for (int64_t e = 0; e < task.vectors; ++e) {
    const int64_t channel = e * kLanes, lanes = task.width - channel;
    float* g_weight = to.g_weight + e * (scan.rank + 1) * kLanes;
    for (int64_t i = 0; i < agents.count; ++i) {
      const float* features = agents.features + i * agents.step * scan.rank;
      const V g = load(to.gdt + i * agents.dt_step + channel) * load(to.slope + i * agents.dt_step + channel);
      for (int64_t r = 0; r < scan.rank; ++r) {
        add(g_weight + r * kLanes, g * features[r]);
        add(to.g_features + (i * scan.rank + r) * kLanes, g * load(weight + r * scan.channels + channel, lanes));
      }
      add(g_weight + scan.rank * kLanes, g);
    }
  }
}

}  // namespace
