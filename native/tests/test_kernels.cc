// The kernels without XLA: against loops in double precision, in every instruction set that this processor has.
#include "dispatch.h"
#include "harness.h"
#include "parallel.h"
#include "test_decode.h"

namespace {

// Units in the last place: the error over the distance between floats at the exact value.
double ulps(float value, double exact) {
  const float rounded = static_cast<float>(exact);
  return std::abs(value - exact) / (std::nextafter(std::abs(rounded), INFINITY) - std::abs(rounded));
}

void test_exp2() {
  const int64_t size = 1 << 20;
  Array x(size), y(size);
  for (int64_t i = 0; i < size; ++i) x[i] = -126.0f + 253.9f * static_cast<float>(i) / size;
  mam::kernels().exp2(x.data(), y.data(), size);
  double worst = 0;
  for (int64_t i = 0; i < size; ++i) worst = std::max(worst, ulps(y[i], std::exp2(static_cast<double>(x[i]))));
  std::printf("  exp2: %.2f units in the last place\n", worst);
  EXPECT(worst <= 2.1, "error of %f", worst);
  x.assign({0.0f, -127.0f, -1e30f, -INFINITY, NAN, 1.0f, -1.0f, 2.0f, 0, 0, 0, 0, 0, 0, 0, 0});
  mam::kernels().exp2(x.data(), y.data(), mam::kMaxLanes);
  EXPECT(y[0] == 1.0f && y[5] == 2.0f && y[6] == 0.5f && y[7] == 4.0f, "powers of two are exact");
  for (int i = 1; i < 4; ++i) EXPECT(y[i] >= 0.0f && y[i] <= 1.2e-38f, "2^%g is %g", x[i], y[i]);
  EXPECT(std::isnan(y[4]), "not a number is %g", y[4]);
}

// 1 in a fifth of all places, 0 elsewhere.
Array rare(int64_t size) {
  Array values = normal(size);
  for (float& v : values) v = v < -0.8f;
  return values;
}

struct Problem {
  mam::Scan sizes;
  Array x, dt, A, B, C, D, reset, initial, gy, g_last;
  Array features, weight, gate, alive;  // of a gated scan: dt is made of them

  Problem(mam::Scan s, bool has_reset, bool has_initial) : sizes(s) {
    const int64_t rows = s.groups * s.sequences;
    const int64_t wide = rows * s.agents * s.channels, narrow = rows * s.agents * s.states;
    x = normal(wide), dt = normal(wide, 0.5f), B = normal(narrow), C = normal(narrow), gy = normal(wide);
    A = normal(s.groups * s.rates * s.channels), D = normal(s.groups * s.channels);
    g_last = normal(rows * s.states * s.channels);
    for (float& v : dt) v = std::abs(v);
    for (float& v : A) v = -std::exp(v - 1.0f);
    if (has_initial) initial = normal(rows * s.states * s.channels);
    if (has_reset) reset = rare(rows * s.agents);
    if (!s.rank) return;
    features = normal(rows * s.agents * s.rank), weight = normal(s.groups * (s.rank + 1) * s.channels);
    gate = normal(wide);
    if (has_reset)
      for (float dead : rare(rows * s.agents)) alive.push_back(1 - dead);
    for (int64_t place = 0; place < wide; ++place) dt[place] = std::min(std::log1p(std::exp(before(place))), 20.0);
  }

  // What the softplus is taken of; a dead agent's is as good as -infinity.
  double before(int64_t place) const {
    const int64_t d = place % sizes.channels, agent = place / sizes.channels;
    if (!alive.empty() && !alive[agent]) return -INFINITY;
    const float* w = weight.data() + agent / sizes.agents / sizes.sequences * (sizes.rank + 1) * sizes.channels + d;
    double sum = w[sizes.rank * sizes.channels];
    for (int64_t r = 0; r < sizes.rank; ++r) sum += double(features[agent * sizes.rank + r]) * w[r * sizes.channels];
    return sum;
  }

  template <class Scan>
  void give(Scan& scan) const {
    static_cast<mam::Scan&>(scan) = sizes;
    scan.x = x.data(), scan.dt = dt.data(), scan.A = A.data(), scan.B = B.data(), scan.C = C.data(), scan.D = D.data();
    scan.reset = reset.empty() ? nullptr : reset.data();
    scan.initial = initial.empty() ? nullptr : initial.data();
    if (!sizes.rank) return;
    scan.dt = features.data(), scan.weight = weight.data(), scan.gate = gate.data();
    scan.alive = alive.empty() ? nullptr : alive.data();
  }
};

struct Results {
  Array y, last, starts, gx, gdt, gA, gB, gC, gD, g_initial, g_weight, g_gate;
};

template <class Scan>
void run(const Scan& scan, void (*kernel)(const Scan&, int64_t, float*), int64_t threads) {
  Threads pool{threads};
  std::vector<Array> scratch(threads, Array(scan.scratch_size(), NAN));
  mam::for_all_tasks(pool, scan.tasks(), threads,
                     [&](int64_t task, int64_t worker) { kernel(scan, task, scratch[worker].data()); });
}

Results compute(const Problem& problem, int64_t threads) {
  const mam::Scan& s = problem.sizes;
  const int64_t rows = s.groups * s.sequences, state = s.states * s.channels;
  Results r;
  r.y = r.gx = r.gdt = Array(problem.x.size(), NAN);
  r.last = r.g_initial = Array(rows * state, NAN);
  r.starts = Array(rows * s.kept_states() * state, NAN);
  r.gB = r.gC = Array(s.tiles * problem.B.size(), NAN);
  r.gA = Array(s.blocks * problem.A.size(), NAN), r.gD = Array(s.blocks * problem.D.size(), NAN);
  if (s.rank) r.gdt = Array(s.tiles * problem.features.size(), NAN);
  r.g_weight = Array(s.blocks * problem.weight.size(), NAN), r.g_gate = Array(problem.gate.size(), NAN);
  mam::ScanForward forward;
  problem.give(forward);
  forward.y = r.y.data(), forward.last = r.last.data(), forward.starts = r.starts.data();
  run(forward, mam::kernels().scan_forward, threads);
  mam::ScanBackward backward;
  problem.give(backward);
  backward.starts = r.starts.data(), backward.gy = problem.gy.data(), backward.g_last = problem.g_last.data();
  backward.gx = r.gx.data(), backward.gdt = r.gdt.data(), backward.gA = r.gA.data(), backward.gB = r.gB.data();
  backward.gC = r.gC.data(), backward.gD = r.gD.data(), backward.g_initial = r.g_initial.data();
  backward.g_weight = r.g_weight.data(), backward.g_gate = r.g_gate.data();
  run(backward, mam::kernels().scan_backward, threads);
  return r;
}

// The recurrence as it is written; the gradients per agent are compared in tests/kernels/test_native_scan.py.
void check(const Problem& p, const Results& r) {
  const mam::Scan& s = p.sizes;
  double worst = 0;
  const auto compare = [&](const Array& actual, int64_t first, int64_t parts, int64_t apart, double exact) {
    double sum = 0;
    for (int64_t i = 0; i < parts; ++i) sum += actual[first + i * apart];
    worst = std::max(worst, std::isnan(sum) ? INFINITY : std::abs(sum - exact) / (10 + std::abs(exact)));
  };
  for (int64_t g = 0; g < s.groups; ++g)
    for (int64_t d = 0; d < s.channels; ++d) {
      double gD = 0, gA = 0;
      for (int64_t k = 0; k < s.states; ++k) {
        const int64_t rate = (s.rates < s.states ? 0 : k);
        const double A = p.A[(g * s.rates + rate) * s.channels + d];
        for (int64_t m = 0; m < s.sequences; ++m) {
          const int64_t row = g * s.sequences + m, state = (row * s.states + k) * s.channels + d;
          std::vector<double> h = {p.initial.empty() ? 0.0 : p.initial[state]};
          const auto agent = [&](int64_t i) { return row * s.agents + (s.reverse ? s.agents - 1 - i : i); };
          const auto decay = [&](int64_t i) {
            return !p.reset.empty() && p.reset[agent(i)] ? 0.0 : std::exp(A * p.dt[agent(i) * s.channels + d]);
          };
          for (int64_t i = 0; i < s.agents; ++i) {
            const int64_t at = agent(i) * s.channels + d;
            h.push_back(decay(i) * h[i] + double(p.dt[at]) * p.x[at] * p.B[agent(i) * s.states + k]);
          }
          compare(r.last, state, 1, 0, h.back());
          double later = p.g_last[state];
          for (int64_t i = s.agents - 1; i >= 0; --i) {
            const int64_t at = agent(i) * s.channels + d, own = agent(i) * s.states + k;
            const double G = later + double(p.gy[at]) * p.C[own];
            later = G * decay(i);
            gA += later * h[i] * p.dt[at];
            if (k == 0) gD += double(p.gy[at]) * p.x[at];
          }
          compare(r.g_initial, state, 1, 0, later);
        }
        if (s.rates < s.states && k < s.states - 1) continue;  // all states of a channel add to one gradient
        compare(r.gA, (g * s.blocks * s.rates + rate) * s.channels + d, s.blocks, s.rates * s.channels, gA);
        gA = 0;
      }
      compare(r.gD, g * s.blocks * s.channels + d, s.blocks, s.channels, gD);
    }
  EXPECT(worst < 1e-4, "error of %g with N, D, S = %ld, %ld, %ld", worst, long(s.agents), long(s.channels),
         long(s.states));
}

// A gated scan against the scan that it has inside.
void check_gated(const Problem& gated, const Results& r) {
  const mam::Scan& s = gated.sizes;
  Problem inner = gated;
  inner.sizes.rank = 0;
  const auto sigmoid = [&](size_t place) { return 1 / (1 + std::exp(-double(gated.gate[place]))); };
  for (size_t i = 0; i < inner.gy.size(); ++i) inner.gy[i] *= gated.gate[i] * sigmoid(i);
  const Results q = compute(inner, 1);
  check(inner, q);
  double worst = 0;
  const auto compare = [&](float actual, double exact) {
    worst = std::max(worst, std::isnan(actual) ? INFINITY : std::abs(actual - exact) / (10 + std::abs(exact)));
  };
  const auto compare_all = [&](const Array& actual, const Array& exact) {
    for (size_t i = 0; i < exact.size(); ++i) compare(actual[i], exact[i]);
  };
  compare_all(r.last, q.last), compare_all(r.gx, q.gx), compare_all(r.g_initial, q.g_initial);
  compare_all(r.gA, q.gA), compare_all(r.gB, q.gB), compare_all(r.gC, q.gC), compare_all(r.gD, q.gD);
  std::vector<double> g_features(gated.features.size()), g_weight(gated.weight.size());
  for (size_t place = 0; place < gated.gate.size(); ++place) {
    const double z = gated.gate[place], open = sigmoid(place);
    compare(r.y[place], q.y[place] * z * open);
    compare(r.g_gate[place], double(q.y[place]) * gated.gy[place] * open * (1 + z * (1 - open)));
    const int64_t d = place % s.channels, agent = place / s.channels;
    const int64_t first = agent / s.agents / s.sequences * (s.rank + 1) * s.channels + d;
    const double sum = gated.before(place), g = sum < 20 ? q.gdt[place] / (1 + std::exp(-sum)) : 0;
    for (int64_t k = 0; k < s.rank; ++k) {
      g_weight[first + k * s.channels] += g * gated.features[agent * s.rank + k];
      g_features[agent * s.rank + k] += g * gated.weight[first + k * s.channels];
    }
    g_weight[first + s.rank * s.channels] += g;
  }
  const auto compare_parts = [&](const Array& parts, const std::vector<double>& exact, int64_t groups, int64_t apart) {
    const int64_t size = exact.size() / groups;
    for (size_t i = 0; i < exact.size(); ++i) {
      float sum = 0;
      for (int64_t k = 0; k < apart; ++k) sum += parts[(i / size * apart + k) * size + i % size];
      compare(sum, exact[i]);
    }
  };
  compare_parts(r.gdt, g_features, s.groups, s.tiles);
  compare_parts(r.g_weight, g_weight, s.groups, s.blocks);
  EXPECT(worst < 1e-4, "gated: error of %g with N, D, S, R = %ld, %ld, %ld, %ld", worst, long(s.agents),
         long(s.channels), long(s.states), long(s.rank));
}

bool same(const Results& a, const Results& b) {
  const auto equal = [](const Array& x, const Array& y) {
    return x.size() == y.size() && (x.empty() || !std::memcmp(x.data(), y.data(), x.size() * sizeof(float)));
  };
  return equal(a.y, b.y) && equal(a.last, b.last) && equal(a.gx, b.gx) && equal(a.gdt, b.gdt) && equal(a.gA, b.gA) &&
         equal(a.gB, b.gB) && equal(a.gC, b.gC) && equal(a.gD, b.gD) && equal(a.g_initial, b.g_initial) &&
         equal(a.g_weight, b.g_weight) && equal(a.g_gate, b.g_gate);
}

void test_scan() {
  for (int i = 0; i < 60; ++i) {
    mam::Scan s{};
    s.groups = draw(1, 2), s.sequences = draw(1, 5), s.agents = draw(1, i % 3 ? 18 : 50);
    s.channels = draw(1, 70), s.states = draw(1, 35), s.reverse = draw(0, 1);
    s.rates = draw(0, 2) ? s.states : 1;
    if (s.rates == s.states) s.rank = draw(0, 1) * draw(1, 6);
    s.blocks = draw(1, s.sequences), s.tiles = (s.channels + 31) / 32;
    const Problem problem(s, draw(0, 1), draw(0, 1));
    const Results results = compute(problem, 1);
    s.rank ? check_gated(problem, results) : check(problem, results);
    EXPECT(same(results, compute(problem, 3)), "one thread and three");
    for (const Array* a : {&results.y, &results.gx, &results.gdt, &results.gB, &results.gC, &results.g_gate})
      for (const float v : *a) EXPECT(std::isfinite(v), "an element was not written");
  }
}

void run(const mam::Convolution& c) {
  for (int64_t task = 0; task < c.tasks(); ++task) mam::kernels().convolution(c, task);
}

// Of a convolution with resets, every piece by itself: the same bits.
void check_pieces(const mam::Convolution& whole) {
  mam::Convolution piece = whole;
  piece.groups = piece.sequences = piece.blocks = 1, piece.reset = nullptr;
  Array y(whole.agents * whole.channels), gx = y;
  Array g_weight(whole.taps * whole.channels), g_bias(whole.channels);
  piece.g_weight = g_weight.data(), piece.g_bias = g_bias.data();
  for (int64_t row = 0; row < whole.groups * whole.sequences; ++row)
    for (int64_t begin = 0, end; begin < whole.agents; begin = end) {
      const auto agent = [&](int64_t i) { return row * whole.agents + (whole.reverse ? whole.agents - 1 - i : i); };
      for (end = begin + 1; end < whole.agents && !whole.reset[agent(end)];) ++end;
      const int64_t first = std::min(agent(begin), agent(end - 1)) * whole.channels;
      const int64_t size = (end - begin) * whole.channels;
      piece.agents = end - begin, piece.x = whole.x + first;
      piece.weight = whole.weight + row / whole.sequences * whole.taps * whole.channels;
      piece.bias = whole.bias + row / whole.sequences * whole.channels;
      piece.gy = nullptr, piece.y = y.data();
      run(piece);
      piece.gy = whole.gy + first, piece.gx = gx.data();
      run(piece);
      EXPECT(!std::memcmp(y.data(), whole.y + first, size * sizeof(float)), "forward, from agent %ld on", long(begin));
      EXPECT(!std::memcmp(gx.data(), whole.gx + first, size * sizeof(float)), "back, from agent %ld on", long(begin));
    }
}

// Forward against a loop; backward that all is written (its numbers: tests/kernels/test_native_conv.py).
void test_convolution() {
  for (int i = 0; i < 40; ++i) {
    mam::Convolution c{};
    c.groups = draw(1, 2), c.sequences = draw(1, 5), c.agents = draw(1, 9), c.channels = draw(1, 70);
    c.taps = draw(1, 4), c.blocks = draw(1, c.sequences), c.reverse = draw(0, 1);
    const int64_t size = c.groups * c.sequences * c.agents * c.channels, taps = c.groups * c.taps * c.channels;
    const Array x = normal(size), weight = normal(taps), bias = normal(c.groups * c.channels), gy = normal(size);
    const Array reset = rare(size / c.channels);
    Array y(size, NAN), gx(size, NAN), g_weight(taps * c.blocks, NAN), g_bias(c.groups * c.channels * c.blocks, NAN);
    c.x = x.data(), c.weight = weight.data(), c.bias = bias.data(), c.y = y.data();
    c.reset = i % 2 ? reset.data() : nullptr;
    run(c);
    c.gy = gy.data(), c.gx = gx.data(), c.g_weight = g_weight.data(), c.g_bias = g_bias.data();
    run(c);
    if (c.reset) check_pieces(c);
    double worst = 0;
    for (int64_t place = 0; !c.reset && place < size; ++place) {
      const int64_t d = place % c.channels, agent = place / c.channels % c.agents;
      const int64_t group = place / c.channels / c.agents / c.sequences;
      double sum = bias[group * c.channels + d];
      for (int64_t k = 0; k < c.taps && k <= (c.reverse ? c.agents - 1 - agent : agent); ++k)
        sum += double(weight[(group * c.taps + c.taps - 1 - k) * c.channels + d]) * x[place - k * c.step()];
      worst = std::max(worst, std::abs(y[place] - sum / (1 + std::exp(-sum))));
    }
    EXPECT(worst < 1e-5, "error of %g", worst);
    for (const Array* a : {&y, &gx, &g_weight, &g_bias})
      for (const float v : *a) EXPECT(std::isfinite(v), "an element was not written");
  }
}

// Forward against a loop; backward that all is written (its numbers: tests/kernels/test_native_layers.py).
void test_normalisation() {
  for (int i = 0; i < 20; ++i) {
    mam::Normalisation n{};
    n.groups = draw(1, 2), n.rows = draw(1, 9), n.size = mam::kMaxLanes * draw(1, 5), n.blocks = draw(1, n.rows);
    n.eps = 1e-5f;
    const bool has_plus = draw(0, 1), has_offset = draw(0, 1);
    const int64_t size = n.groups * n.rows * n.size;
    const Array x = normal(size), plus = normal(size), gy = normal(size);
    const Array scale = normal(n.groups * n.size), offset = normal(n.groups * n.size);
    Array y(size, NAN), gx(size, NAN), g_scale(n.groups * n.blocks * n.size, NAN), g_offset = g_scale;
    n.x = x.data(), n.plus = has_plus ? plus.data() : nullptr, n.y = y.data();
    n.scale = scale.data(), n.offset = has_offset ? offset.data() : nullptr;
    const auto run = [&] {
      for (int64_t task = 0; task < n.tasks(); ++task) mam::kernels().normalisation(n, task);
    };
    run();
    n.gy = gy.data(), n.gx = gx.data(), n.g_scale = g_scale.data(), n.g_offset = has_offset ? g_offset.data() : nullptr;
    run();
    double worst = 0;
    for (int64_t row = 0; row < n.groups * n.rows; ++row) {
      const auto element = [&](int64_t e) {
        return x[row * n.size + e] + (has_plus ? double(plus[row * n.size + e]) : 0.0);
      };
      double mean = 0, variance = 0;
      for (int64_t e = 0; has_offset && e < n.size; ++e) mean += element(e) / n.size;
      for (int64_t e = 0; e < n.size; ++e) variance += (element(e) - mean) * (element(e) - mean) / n.size;
      for (int64_t e = 0; e < n.size; ++e) {
        const int64_t own = row / n.rows * n.size + e;
        const double exact = (element(e) - mean) / std::sqrt(variance + n.eps) * scale[own];
        worst = std::max(worst, std::abs(y[row * n.size + e] - exact - (has_offset ? offset[own] : 0.0)));
      }
    }
    EXPECT(worst < 1e-5, "error of %g", worst);
    for (const Array* a : {&y, &gx, &g_scale})
      for (const float v : *a) EXPECT(std::isfinite(v), "an element was not written");
    for (const float v : g_offset) EXPECT(std::isfinite(v) == has_offset, "written where there is an offset");
  }
}

void test_weight_gradient() {
  for (int i = 0; i < 20; ++i) {
    mam::WeightGradient w{};
    w.groups = draw(1, 2), w.rows = draw(1, 150), w.in = draw(1, 15), w.out = mam::kMaxLanes * draw(1, 6);
    w.blocks = draw(1, std::min<int64_t>(w.rows, 3));
    const Array x = normal(w.groups * w.rows * w.in), g = normal(w.groups * w.rows * w.out);
    Array y(w.groups * w.blocks * w.in * w.out, NAN);
    w.x = x.data(), w.g = g.data(), w.y = y.data();
    for (int64_t task = 0; task < w.tasks(); ++task) mam::kernels().weight_gradient(w, task);
    double worst = 0;
    for (int64_t place = 0; place < w.groups * w.in * w.out; ++place) {
      const int64_t size = w.in * w.out, group = place / size, own = place % size;
      double sum = 0;
      for (int64_t block = 0; block < w.blocks; ++block) sum += y[(group * w.blocks + block) * size + own];
      for (int64_t row = group * w.rows; row < (group + 1) * w.rows; ++row)
        sum -= double(x[row * w.in + own / w.out]) * g[row * w.out + own % w.out];
      worst = std::max(worst, std::isnan(sum) ? INFINITY : std::abs(sum));
    }
    EXPECT(worst < 1e-4, "error of %g", worst);
  }
}

void test_attention() {
  for (int i = 0; i < 20; ++i) {
    mam::Attention a{};
    a.groups = draw(1, 2), a.sequences = draw(1, 5), a.agents = draw(1, i % 2 ? 5 : mam::kMaxAttended);
    a.heads = draw(1, 3), a.size = mam::kMaxLanes * draw(1, 3), a.blocks = draw(1, a.sequences), a.shared = draw(0, 1);
    const int64_t pairs = a.agents * a.agents, masks = a.groups * (a.shared ? 1 : a.sequences);
    const int64_t size = a.groups * a.sequences * a.agents * a.stride();
    const Array q = normal(size), k = normal(size), v = normal(size), gy = normal(size), hidden = rare(masks * pairs);
    Array visible(masks * pairs), y(size, NAN), gq = y, gk = y, gv = y;
    for (int64_t place = 0; place < masks * pairs; ++place) visible[place] = 1 - hidden[place];
    for (int64_t j = 0; j < a.agents; ++j) visible[j] = 0;  // the first agent of all sees none
    a.q = q.data(), a.k = k.data(), a.v = v.data(), a.visible = visible.data(), a.y = y.data();
    const auto run = [&] {
      for (int64_t task = 0; task < a.tasks(); ++task) mam::kernels().attention(a, task);
    };
    run();
    a.gy = gy.data(), a.gq = gq.data(), a.gk = gk.data(), a.gv = gv.data();
    run();
    std::vector<double> exact(size), exact_gq(size), exact_gk(size), exact_gv(size), w(a.agents), g(a.agents);
    for (int64_t s = 0; s < a.groups * a.sequences; ++s)
      for (int64_t h = 0; h < a.heads; ++h)
        for (int64_t n = 0; n < a.agents; ++n) {
          const auto at = [&](int64_t agent) { return (s * a.agents + agent) * a.stride() + h * a.size; };
          const float* see = visible.data() + ((a.shared ? s / a.sequences : s) * a.agents + n) * a.agents;
          double most = -INFINITY, sum = 0, mean = 0;
          for (int64_t m = 0; m < a.agents; ++m) {
            w[m] = 0;
            for (int64_t e = 0; e < a.size; ++e) w[m] += double(q[at(n) + e]) * k[at(m) + e] / std::sqrt(a.size);
            if (!see[m]) w[m] = -1e9;
            most = std::max(most, w[m]);
          }
          for (double& weight : w) sum += weight = std::exp(weight - most);
          for (int64_t m = 0; m < a.agents; ++m) {
            w[m] /= sum, g[m] = 0;
            for (int64_t e = 0; e < a.size; ++e) {
              exact[at(n) + e] += w[m] * v[at(m) + e];
              exact_gv[at(m) + e] += w[m] * gy[at(n) + e];
              g[m] += double(gy[at(n) + e]) * v[at(m) + e];
            }
            mean += w[m] * g[m];
          }
          for (int64_t m = 0; m < a.agents; ++m)
            for (int64_t e = 0; see[m] && e < a.size; ++e) {
              const double score = w[m] * (g[m] - mean) / std::sqrt(a.size);
              exact_gq[at(n) + e] += score * k[at(m) + e];
              exact_gk[at(m) + e] += score * q[at(n) + e];
            }
        }
    double worst = 0;
    const auto compare = [&](const Array& got, const std::vector<double>& right) {
      for (int64_t place = 0; place < size; ++place) {
        const double error = std::abs(got[place] - right[place]);
        worst = std::max(worst, std::isnan(error) ? INFINITY : error);
      }
    };
    compare(y, exact), compare(gq, exact_gq), compare(gk, exact_gk), compare(gv, exact_gv);
    EXPECT(worst < 1e-4, "error of %g", worst);
  }
}

}  // namespace

int main() {
  for (int i = 0; mam::available(i); ++i) {
    mam::choose_kernels(mam::available(i)->name);
    std::printf("%s\n", mam::kernels().name);
    test_exp2();
    test_scan();
    test_convolution();
    test_normalisation();
    test_weight_gradient();
    test_attention();
    test_decode();
  }
  std::printf(failures ? "%d failures\n" : "all is well\n", failures);
  return failures != 0;
}
