// The decode kernel on random decoders: what it writes, that it writes no more, and that threads do not matter. Its
// numbers are compared with those of mam's own loop in tests/networks/test_native_decode.py.
#pragma once

#include <deque>

#include "decode.h"
#include "dispatch.h"
#include "harness.h"
#include "parallel.h"

namespace {

int64_t padded(int64_t size) { return (size + mam::kMaxLanes - 1) / mam::kMaxLanes * mam::kMaxLanes; }

struct RandomDecoder {
  std::deque<Array> arrays;
  std::vector<mam::Block> blocks;
  mam::Decode d{};

  const float* array(int64_t size, float spread = 0.3f) { return arrays.emplace_back(normal(size, spread)).data(); }

  mam::Matrix matrix(int64_t in, int64_t out, bool bias) {
    d.widest = std::max({d.widest, in, padded(out)});
    return {array(in * padded(out)), bias ? array(padded(out)) : nullptr, in, padded(out)};
  }
  mam::Norm norm(int64_t size, bool offset) { return {array(size), offset ? array(size) : nullptr, size, 1e-6f}; }
  mam::Conv conv(int64_t taps, int64_t size) {
    return {array(taps * padded(size)), array(padded(size)), taps, padded(size)};
  }

  mam::Mixer mixer(bool cross) {
    mam::Mixer m{};
    m.kind = draw(0, 1) ? mam::Kind::kDual : mam::Kind::kSelective;
    m.cross = cross;
    m.channels = 16 * draw(1, 5), m.states = draw(1, 20), m.heads = draw(0, 1) ? 1 : m.channels / 8;
    const int64_t taps = draw(1, 4), rank = draw(1, 5), own = (cross ? 1 : 2) * m.states;
    m.pre_norm = norm(d.width, false);
    m.in = matrix(d.width, m.channels, false), m.gate = matrix(d.width, m.channels, false);
    m.conv = conv(taps, m.channels);
    if (m.kind == mam::Kind::kDual) {
      m.state = matrix(d.width, own, false), m.dt = matrix(d.width, m.heads, true);
      m.state_conv = conv(taps, own);
      m.rates = array(padded(m.heads)), m.norm = norm(m.channels, false);
    } else {
      m.x = matrix(m.channels, rank + own, false), m.dt = matrix(rank, m.channels, true);
      m.rates = array(m.channels * m.states);
    }
    m.skip = array(m.channels), m.out = matrix(m.channels, d.width, false), m.post_norm = norm(d.width, true);
    return m;
  }

  RandomDecoder() {
    d.batch = draw(1, 30), d.agents = draw(1, 6), d.actions = draw(1, 20), d.width = 16 * draw(1, 4);
    d.rows = draw(1, mam::kMaxRows), d.tokens = d.actions + 1, d.num_blocks = draw(1, 2);
    for (int64_t i = 0; i < d.num_blocks; ++i) {
      mam::Block b{};
      b.mixer = mixer(false), b.cross = mixer(true);
      b.mixer_norm = norm(d.width, true), b.cross_norm = norm(d.width, true), b.mlp_norm = norm(d.width, true);
      b.hidden = matrix(d.width, d.width, true), b.out = matrix(d.width, d.width, true);
      b.context = array(d.batch * d.agents * b.cross.states);
      blocks.push_back(b);
    }
    d.blocks = blocks.data();
    const mam::Mixer& first = blocks[0].mixer;
    d.table.x = array(d.tokens * d.width);
    d.table.in = array(d.tokens * first.channels), d.table.gate = array(d.tokens * first.channels);
    if (first.kind == mam::Kind::kDual)
      d.table.state = array(d.tokens * first.state.out), d.table.dt = array(d.tokens * first.dt.out);
    d.hidden = matrix(d.width, d.width, true), d.norm = norm(d.width, true), d.out = matrix(d.width, d.actions, true);
    d.obs_rep = array(d.batch * d.agents * d.width), d.noise = array(d.batch * d.agents * d.actions, 2.0f);
  }
};

void test_decode() {
  for (int i = 0; i < 20; ++i) {
    RandomDecoder random;
    mam::Decode& d = random.d;
    const int64_t places = d.batch * d.agents;
    std::vector<uint8_t> mask(places * d.actions);
    for (uint8_t& legal : mask) legal = draw(0, 3) > 0;
    d.mask = reinterpret_cast<const bool*>(mask.data());
    std::vector<int32_t> actions[2];
    Array logits[2];
    for (int threads = 1; threads <= 3; threads += 2) {
      auto& action = actions[threads / 2] = std::vector<int32_t>(places, -1);
      auto& out = logits[threads / 2] = Array(places * d.actions, NAN);
      d.action = action.data(), d.logits = out.data();
      Threads pool{threads};
      std::vector<Array> scratch(threads, Array(d.scratch_size(), NAN));
      mam::for_all_tasks(pool, d.tasks(), threads, [&](int64_t task, int64_t worker) {
        mam::kernels().decode(d, task, scratch[worker].data());
      });
    }
    EXPECT(actions[0] == actions[1], "one thread and three");
    EXPECT(!std::memcmp(logits[0].data(), logits[1].data(), logits[0].size() * sizeof(float)), "one thread and three");
    for (int64_t p = 0; p < places; ++p) {
      EXPECT(actions[0][p] >= 0 && actions[0][p] < d.actions, "%d", int(actions[0][p]));
      for (int64_t a = 0; a < d.actions; ++a) EXPECT(std::isfinite(logits[0][p * d.actions + a]), "not written");
    }
  }
}

}  // namespace
