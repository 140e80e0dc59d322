// The convolution as XLA calls it. Leading axes before those named below are vmap's: all buffers have the same.
#include <cstdint>

#include "dispatch.h"
#include "parallel.h"
#include "shapes.h"

namespace mam {
namespace {

// Forward, or with all that belongs to the backward pass that.
ffi::Error convolve(ffi::ThreadPool& pool, int64_t blocks, bool reverse, Floats x, Floats weight, Floats bias,
                    Floats reset, Floats* y, Floats* gy, Floats* gx, Floats* g_weight, Floats* g_bias) {
  Checks checks("convolution");
  const auto dims = x.dimensions();
  checks.demand(dims.size() >= 3, "x must have axes [sequences, agents, channels]");
  checks.demand(weight.dimensions().size() + 1 == dims.size(), "weight must have axes [taps, channels]");
  if (!checks.passed()) return checks.error();
  const Lead lead(dims, 3);
  Convolution c{};
  c.groups = lead.groups;
  c.sequences = dims[dims.size() - 3], c.agents = dims[dims.size() - 2], c.channels = dims[dims.size() - 1];
  c.taps = weight.dimensions()[dims.size() - 3];
  c.blocks = blocks;
  c.reverse = reverse;
  checks.demand(c.taps >= 1 && c.taps <= kMaxTaps, "between 1 and 4 taps");
  checks.demand_blocks(blocks, c.sequences);
  const Shape wide = lead.with({c.sequences, c.agents, c.channels});
  c.x = checks.data("x", x, wide);
  c.weight = checks.data("weight", weight, lead.with({c.taps, c.channels}));
  c.bias = checks.data("bias", bias, lead.with({c.channels}));
  c.reset = checks.optional("reset", reset, lead.with({c.sequences, c.agents}));
  if (y) {
    c.y = checks.data("y", *y, wide);
  } else {
    c.gy = checks.data("y's gradient", *gy, wide);
    c.gx = checks.data("x's gradient", *gx, wide);
    c.g_weight = checks.data("weight's gradient", *g_weight, lead.with({blocks, c.taps, c.channels}));
    c.g_bias = checks.data("bias's gradient", *g_bias, lead.with({blocks, c.channels}));
  }
  if (!checks.passed()) return checks.error();
  // A vector takes some ten nanoseconds; waking a thread takes ten microseconds.
  const int64_t workers = 1 + c.groups * c.sequences * c.agents * c.channels / (1 << 14);
  const auto run = kernels().convolution;
  for_all_tasks(pool, c.tasks(), workers, [&](int64_t task, int64_t) { run(c, task); });
  return ffi::Error::Success();
}

ffi::Error forward(ffi::ThreadPool pool, Floats x, Floats weight, Floats bias, Floats reset, FloatsOut y,
                   int64_t blocks, bool reverse) {
  return convolve(pool, blocks, reverse, x, weight, bias, reset, &*y, nullptr, nullptr, nullptr, nullptr);
}

ffi::Error backward(ffi::ThreadPool pool, Floats x, Floats weight, Floats bias, Floats reset, Floats gy,
                    FloatsOut gx, FloatsOut g_weight, FloatsOut g_bias, int64_t blocks, bool reverse) {
  return convolve(pool, blocks, reverse, x, weight, bias, reset, nullptr, &gy, &*gx, &*g_weight, &*g_bias);
}

}  // namespace
}  // namespace mam

using mam::Floats;
using xla::ffi::Ffi;
using xla::ffi::ThreadPool;

// clang-format off
XLA_FFI_DEFINE_HANDLER_SYMBOL(mam_native_conv, mam::forward, Ffi::Bind().Ctx<ThreadPool>()
  .Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>().Ret<Floats>()
  .Attr<int64_t>("blocks").Attr<bool>("reverse"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(mam_native_conv_backward, mam::backward, Ffi::Bind().Ctx<ThreadPool>()
  .Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>()
  .Ret<Floats>().Ret<Floats>().Ret<Floats>()
  .Attr<int64_t>("blocks").Attr<bool>("reverse"));
// clang-format on
