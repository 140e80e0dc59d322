// What the kernels are asked to do, and the table of them that exists per instruction set (dispatch.h chooses one).
#pragma once

#include <cstdint>

namespace mam {

constexpr int64_t kChunk = 16;         // agents between two states that are kept for the backward pass
constexpr int64_t kMaxLanes = 16;      // floats in the widest vector
constexpr int64_t kMaxStateGroup = 16; // states that are in registers together
constexpr float kDtLimit = 20.0f;      // of step sizes: DT_LIMIT in mam/kernels/selective_scan.py

// The sizes and inputs of a selective scan. Work is cut into tasks: blocks of sequences times tiles of channels.
// How it is cut depends on sizes only, so results have the same bits whatever the number of threads.
//
// With a rank it is gated: step sizes are made of so many features, which dt then has, and y is multiplied by the
// gate's SiLU.
struct Scan {
  int64_t groups;     // of sequences that share A and D: what vmap maps over
  int64_t sequences;  // per group
  int64_t agents, channels, states;
  int64_t rates;   // per channel: as many as states, or one for all of them (Mamba-2)
  int64_t blocks;  // of sequences, per group
  int64_t tiles;   // of channels
  int64_t rank;    // of what step sizes are made of; 0: they are given
  bool reverse;
  const float* x;        // [groups, sequences, agents, channels]
  const float* dt;       // as x; gated: [groups, sequences, agents, rank]
  const float *B, *C;    // [groups, sequences, agents, states]
  const float* A;        // [groups, rates, channels]
  const float* D;        // [groups, channels]
  const float* reset;    // [groups, sequences, agents]: not 0 where the state before an agent counts as zero; or null
  const float* initial;  // [groups, sequences, states, channels], or null
  const float* weight;   // gated: [groups, rank + 1, channels], from dt to step sizes before the softplus; then bias
  const float* gate;     // gated: as x
  const float* alive;    // gated: [groups, sequences, agents]: 0 where the step size is 0; or null

  int64_t tasks() const { return groups * blocks * tiles; }
  int64_t kept_states() const { return (agents - 1) / kChunk; }
  // Channels of a tile; the last one may have fewer.
  int64_t tile_width() const { return ((channels + tiles - 1) / tiles + kMaxLanes - 1) / kMaxLanes * kMaxLanes; }
};

struct ScanForward : Scan {
  float* y;       // as x, or null
  float* last;    // as initial, or null
  float* starts;  // [groups, sequences, kept_states, states, channels]: before each chunk but the first; or null

  // Floats, per worker.
  int64_t scratch_size() const { return (2 * states + (rank ? kChunk : 0)) * tile_width(); }
};

struct ScanBackward : Scan {
  const float *starts, *gy, *g_last;  // gy, g_last or both null: zeros
  float* gx;                          // as x
  float* gdt;                         // as x; gated: [groups, tiles, sequences, agents, rank], to be summed over tiles
  float *gB, *gC;                     // [groups, tiles, sequences, agents, states]: to be summed over tiles
  float* gA;                          // [groups, blocks, rates, channels]: to be summed over blocks
  float* gD;                          // [groups, blocks, channels]: likewise
  float* g_initial;                   // as initial, or null
  float* g_weight;                    // gated: [groups, blocks, rank + 1, channels]: to be summed over blocks
  float* g_gate;                      // gated: as x

  int64_t scratch_size() const {
    const int64_t group = kMaxStateGroup * kMaxLanes, gated = rank ? 3 * kChunk + rank + 1 : 0;
    return (3 * states + 1 + gated) * tile_width() + (2 * kChunk + 1) * group +
           (2 * states + rank) * kChunk * kMaxLanes;
  }
};

constexpr int64_t kMaxTaps = 4;

// SiLU of a causal depthwise convolution: forward, or with `gy` backward. A task is a block of sequences.
struct Convolution {
  int64_t groups;  // of sequences that share weights: what vmap maps over
  int64_t sequences, agents, channels, taps;
  int64_t blocks;  // of sequences, per group
  bool reverse;    // agents are read from the last to the first
  const float* x;       // [groups, sequences, agents, channels]
  const float* weight;  // [groups, taps, channels]; the last row is for the agent itself
  const float* bias;    // [groups, channels]
  const float* reset;   // [groups, sequences, agents]: not 0 where nothing before an agent is read from it on; or null
  float* y;             // as x
  const float* gy;      // as x, as is gx
  float* gx;
  float* g_weight;  // [groups, blocks, taps, channels]: to be summed over blocks
  float* g_bias;    // [groups, blocks, channels]: likewise

  int64_t tasks() const { return groups * blocks; }
  // From one agent to the next.
  int64_t step() const { return reverse ? -channels : channels; }
};

struct Matrix {
  const float* weight;  // [in, out]
  const float* bias;    // [out] or null
  int64_t in, out;
};

// The sums over rows of x ⊗ g: a dense layer's gradient by its weight. A task is a block of rows.
struct WeightGradient {
  int64_t groups;  // of rows with a weight of their own: what vmap maps over
  int64_t rows, in, out;  // out is a multiple of kMaxLanes
  int64_t blocks;  // of rows, per group
  const float* x;  // [groups, rows, in]
  const float* g;  // [groups, rows, out]
  float* y;        // [groups, blocks, in, out]: to be summed over blocks

  int64_t tasks() const { return groups * blocks; }
};

struct Norm {
  const float* scale;
  const float* offset;  // null: RMSNorm
  int64_t size;
  float eps;
};

// LayerNorm or RMSNorm of rows: forward, or with `gy` backward. A task is a block of rows.
struct Normalisation {
  int64_t groups;  // of rows that share scale and offset: what vmap maps over
  int64_t rows, size;
  int64_t blocks;  // of rows, per group
  float eps;
  const float* x;       // [groups, rows, size]
  const float* plus;    // as x, and added to it first; or null
  const float* scale;   // [groups, size]
  const float* offset;  // as scale, or null: RMSNorm
  float* y;             // as x
  const float* gy;      // as x, as is gx
  float* gx;            // of x, and of what is added
  float* g_scale;       // [groups, blocks, size]: to be summed over blocks
  float* g_offset;      // likewise

  int64_t tasks() const { return groups * blocks; }
};

constexpr int64_t kMaxAttended = 16;  // agents that attend to each other: for more, large products are as fast

// Softmax attention of heads: forward, or with `gy` backward. A task is a block of sequences.
struct Attention {
  int64_t groups;  // of sequences: what vmap maps over
  int64_t sequences, agents, heads, size;  // size: of a head
  int64_t blocks;  // of sequences, per group
  bool shared;     // one `visible` for all sequences of a group
  const float *q, *k, *v;  // [groups, sequences, agents, heads, size]
  const float* visible;    // [groups, sequences or 1, agents, agents]: not 0 where the first may see the second
  float* y;                // as q, as all below
  const float* gy;
  float *gq, *gk, *gv;

  int64_t tasks() const { return groups * blocks; }
  // From one agent to the next.
  int64_t stride() const { return heads * size; }
};

struct Decode;  // decode.h

struct Kernels {
  const char* name;
  int lanes;
  void (*scan_forward)(const ScanForward&, int64_t task, float* scratch);
  void (*scan_backward)(const ScanBackward&, int64_t task, float* scratch);
  void (*convolution)(const Convolution&, int64_t task);
  void (*normalisation)(const Normalisation&, int64_t task);
  void (*weight_gradient)(const WeightGradient&, int64_t task);
  void (*attention)(const Attention&, int64_t task);
  void (*decode)(const Decode&, int64_t task, float* scratch);
  void (*exp2)(const float* x, float* y, int64_t size);  // size a multiple of kMaxLanes; for the tests
};

}  // namespace mam
