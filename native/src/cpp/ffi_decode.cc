// The decode loop as XLA calls it: all parameters of a decoder, in the order in which
// mam.networks.decoding.native packs them, and one list of sizes that says what they are.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "decode.h"
#include "dispatch.h"
#include "parallel.h"
#include "shapes.h"

namespace mam {
namespace {

using Integers = ffi::Span<const int64_t>;

// Takes sizes and arrays one after another.
class Reader {
 public:
  Reader(Checks& checks, Integers sizes, ffi::Span<const float> eps, ffi::RemainingArgs arrays)
      : checks_(checks), sizes_(sizes), eps_(eps), arrays_(arrays) {}

  int64_t size(int64_t least = 1) {
    const int64_t value = next_size_ < sizes_.size() ? sizes_[next_size_] : -1;
    ++next_size_;
    checks_.demand(value >= least && value < (1 << 24), "sizes say nothing sensible");
    return checks_.passed() ? value : least;
  }

  const float* array(const char* name, const Shape& shape) {
    if (next_array_ >= arrays_.size()) checks_.demand(false, "arrays are missing");
    if (!checks_.passed()) return nullptr;
    auto buffer = arrays_.get<Floats>(next_array_++);
    checks_.demand(buffer.has_value(), std::string(name) + " must be of float32");
    return buffer.has_value() ? checks_.data(name, *buffer, shape) : nullptr;
  }

  // A row of `table`, or of the batch's context, has so many numbers: all of them count in Decode::widest.
  int64_t wide(int64_t features) {
    widest = std::max(widest, features);
    return features;
  }

  Matrix matrix(int64_t in, int64_t out, bool bias) {
    wide(in), wide(padded(out));
    const float* weight = array("a matrix", {in, padded(out)});
    return {weight, bias ? array("a bias", {padded(out)}) : nullptr, in, padded(out)};
  }

  Norm norm(int64_t size, bool offset) {
    const float* scale = array("a norm's scale", {size});
    const float eps = next_eps_ < eps_.size() ? eps_[next_eps_] : 0.0f;
    ++next_eps_;
    return {scale, offset ? array("a norm's offset", {size}) : nullptr, size, eps};
  }

  Conv convolution(int64_t taps, int64_t features) {
    const float* weight = array("a convolution's weight", {taps, padded(features)});
    return {weight, array("a convolution's bias", {padded(features)}), taps, padded(features)};
  }

  Mixer mixer(int64_t width, bool cross) {
    Mixer m{};
    const int64_t kind = size(0);
    checks_.demand(kind <= 1, "no such kind of mixer");
    m.kind = static_cast<Kind>(kind);
    m.cross = cross;
    m.channels = size();
    m.states = size();
    m.heads = size();
    const int64_t taps = size(), rank = size(), own = (cross ? 1 : 2) * m.states;
    checks_.demand(m.channels % kMaxLanes == 0 && m.channels % m.heads == 0, "channels must be a multiple of 16");
    m.pre_norm = norm(width, false);
    m.in = matrix(width, m.channels, false);
    m.gate = matrix(width, m.channels, false);
    m.conv = convolution(taps, m.channels);
    if (m.kind == Kind::kDual) {
      m.state = matrix(width, own, false);
      m.dt = matrix(width, m.heads, true);
      m.state_conv = convolution(taps, own);
      m.rates = array("rates", {padded(m.heads)});
      m.norm = norm(m.channels, false);
    } else {
      m.x = matrix(m.channels, rank + own, false);
      m.dt = matrix(rank, m.channels, true);
      m.rates = array("rates", {m.channels / kMaxLanes, m.states, kMaxLanes});
    }
    m.skip = array("the skip connection", {m.channels});
    m.out = matrix(m.channels, width, false);
    m.post_norm = norm(width, true);
    return m;
  }

  Block block(int64_t width, const Shape& batch) {
    Block b{};
    b.mixer = mixer(width, false);
    b.mixer_norm = norm(width, true);
    b.cross = mixer(width, true);
    b.cross_norm = norm(width, true);
    b.hidden = matrix(width, width, true);
    b.out = matrix(width, width, true);
    b.mlp_norm = norm(width, true);
    b.context = array("the context", {batch[0], batch[1], b.cross.states});
    return b;
  }

  Table table(int64_t tokens, int64_t width, const Mixer& first) {
    Table t{};
    t.x = array("the table of tokens", {tokens, width});
    t.in = array("the table of inputs", {tokens, first.channels});
    t.gate = array("the table of gates", {tokens, first.channels});
    if (first.kind == Kind::kDual) {
      t.state = array("the table of states", {tokens, first.state.out});
      t.dt = array("the table of step sizes", {tokens, first.dt.out});
    }
    return t;
  }

  void demand_the_end() {
    checks_.demand(next_size_ == sizes_.size() && next_eps_ == eps_.size() && next_array_ == arrays_.size(),
                   "too many or too few parameters");
  }

  int64_t widest = 0;

 private:
  static int64_t padded(int64_t size) { return (size + kMaxLanes - 1) / kMaxLanes * kMaxLanes; }

  Checks& checks_;
  Integers sizes_;
  ffi::Span<const float> eps_;
  ffi::RemainingArgs arrays_;
  size_t next_size_ = 0, next_eps_ = 0, next_array_ = 0;
};

ffi::Error run_decode(ffi::ThreadPool pool, ffi::Buffer<ffi::PRED> mask, Floats noise, Floats obs_rep,
                      ffi::RemainingArgs arrays, ffi::Result<ffi::Buffer<ffi::S32>> action, FloatsOut logits,
                      FloatsOut scratch, Integers sizes, ffi::Span<const float> eps) {
  Checks checks("decode");
  checks.demand(mask.dimensions().size() == 3, "mask must have axes [batch, agents, actions]");
  checks.demand(obs_rep.dimensions().size() == 3, "obs_rep must have axes [batch, agents, features]");
  if (!checks.passed()) return checks.error();
  const Shape places(mask.dimensions().begin(), mask.dimensions().end());
  Decode d{};
  d.batch = places[0], d.agents = places[1], d.actions = places[2];
  d.width = obs_rep.dimensions()[2];
  d.mask = mask.typed_data();
  d.noise = checks.data("noise", noise, places);
  d.obs_rep = checks.data("obs_rep", obs_rep, {d.batch, d.agents, d.width});
  d.action = checks.data("actions", *action, {d.batch, d.agents});
  d.logits = checks.data("logits", *logits, places);
  d.tokens = d.actions + 1;
  checks.demand(d.width % kMaxLanes == 0, "d_model must be a multiple of 16");

  Reader reader(checks, sizes, eps, arrays);
  d.rows = reader.size();
  d.num_blocks = reader.size();
  checks.demand(d.rows <= kMaxRows && d.num_blocks <= 1024, "too many rows or blocks");
  std::vector<Block> blocks;
  for (int64_t i = 0; checks.passed() && i < d.num_blocks; ++i) blocks.push_back(reader.block(d.width, places));
  if (!checks.passed()) return checks.error();
  d.blocks = blocks.data();
  d.table = reader.table(d.tokens, d.width, blocks[0].mixer);
  d.hidden = reader.matrix(d.width, d.width, true);
  d.norm = reader.norm(d.width, true);
  d.out = reader.matrix(d.width, d.actions, true);
  reader.demand_the_end();
  d.widest = reader.widest;

  const int64_t size = d.scratch_size(), workers = scratch->element_count() / size;
  checks.demand(workers > 0 || d.tasks() == 0, "scratch must have " + std::to_string(size) + " elements");
  if (!checks.passed()) return checks.error();
  float* const memory = scratch->typed_data();
  const auto run = kernels().decode;
  for_all_tasks(pool, d.tasks(), workers,
                [&](int64_t task, int64_t worker) { run(d, task, memory + worker * size); });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace mam

// clang-format off
XLA_FFI_DEFINE_HANDLER_SYMBOL(mam_native_decode, mam::run_decode, xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>()
  .Arg<xla::ffi::Buffer<xla::ffi::PRED>>().Arg<mam::Floats>().Arg<mam::Floats>().RemainingArgs()
  .Ret<xla::ffi::Buffer<xla::ffi::S32>>().Ret<mam::Floats>().Ret<mam::Floats>()
  .Attr<xla::ffi::Span<const int64_t>>("sizes").Attr<xla::ffi::Span<const float>>("eps"));
// clang-format on
