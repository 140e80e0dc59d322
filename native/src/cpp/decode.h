// The decoder as the decode kernel runs it: parameters by layer, named as in mam.networks.
//
// Every matrix's width is a multiple of kMaxLanes, filled up with zeros where the layer is narrower.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace mam {

constexpr int64_t kMaxRows = 16;  // environments that go through the layers together

struct Conv {
  const float* weight;  // [taps, features]; the last row is for the newest input
  const float* bias;
  int64_t taps, features;
};

enum class Kind : int64_t { kSelective = 0, kDual = 1 };

struct Mixer {
  Kind kind;
  bool cross;  // reads C from the context
  int64_t channels, states, heads;
  Norm pre_norm;
  Matrix in, gate;
  Matrix state;  // kDual: B (and C)
  Matrix dt;     // step sizes, kDual: per head; kSelective: per channel, from x's first columns
  Conv conv, state_conv;
  Matrix x;            // kSelective: step sizes before `dt`, B (and C)
  const float* rates;  // A / ln 2: kSelective [channels / 16, states, 16], kDual [heads, filled up to 16]
  const float* skip;   // [channels]
  Norm norm;           // kDual: before `out`
  Matrix out;
  Norm post_norm;
};

struct Block {
  Mixer mixer, cross;
  Norm mixer_norm, cross_norm, mlp_norm;
  Matrix hidden, out;
  const float* context;  // C of the cross mixer, [batch, agents, states]
};

// Of each token: its embedding, and what the first block's mixer projects of it.
struct Table {
  const float *x, *in, *gate, *state, *dt;  // [tokens, features]; the gate after its SiLU; state, dt: kDual only
};

struct Decode {
  int64_t batch, agents, actions, tokens, width, rows;  // width: of the residual stream; rows: environments per task
  const Block* blocks;
  int64_t num_blocks;
  Table table;
  Matrix hidden, out;  // the head
  Norm norm;
  const float* obs_rep;  // [batch, agents, width]
  const bool* mask;      // [batch, agents, actions]
  const float* noise;    // [batch, agents, actions]
  int32_t* action;       // [batch, agents]
  float* logits;         // [batch, agents, actions], before masking
  int64_t widest;        // of all rows that are in work: inputs and outputs of layers

  int64_t tasks() const { return (batch + rows - 1) / rows; }

  // Floats per worker: rows in work, and the mixers' memories.
  int64_t scratch_size() const {
    int64_t size = kRowsInWork * widest;
    for (int64_t i = 0; i < num_blocks; ++i) size += memory_size(blocks[i].mixer) + memory_size(blocks[i].cross);
    return size * rows;
  }

  static constexpr int64_t kRowsInWork = 8;

  static int64_t memory_size(const Mixer& m) {
    return m.channels * m.states + m.conv.taps * m.conv.features + m.state_conv.taps * m.state_conv.features;
  }
};

}  // namespace mam
