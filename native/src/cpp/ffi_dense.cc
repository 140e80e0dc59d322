// The gradient of a dense layer's weight as XLA calls it. Leading axes before those named below are vmap's: all
// buffers have the same.
#include <cstdint>

#include "dispatch.h"
#include "parallel.h"
#include "shapes.h"

namespace mam {
namespace {

ffi::Error run(ffi::ThreadPool pool, Floats x, Floats g, FloatsOut y, int64_t blocks) {
  Checks checks("weight gradient");
  const auto dims = x.dimensions(), out = g.dimensions();
  checks.demand(dims.size() >= 2, "x must have axes [rows, in]");
  checks.demand(out.size() == dims.size(), "y's gradient must have axes [rows, out]");
  if (!checks.passed()) return checks.error();
  const Lead lead(dims, 2);
  WeightGradient w{};
  w.groups = lead.groups;
  w.rows = dims[dims.size() - 2], w.in = dims[dims.size() - 1], w.out = out[dims.size() - 1];
  w.blocks = blocks;
  checks.demand(w.out % kMaxLanes == 0, "its width must be a multiple of " + std::to_string(kMaxLanes));
  checks.demand_blocks(blocks, w.rows);
  w.x = checks.data("x", x, lead.with({w.rows, w.in}));
  w.g = checks.data("y's gradient", g, lead.with({w.rows, w.out}));
  w.y = checks.data("the weight's gradient", *y, lead.with({blocks, w.in, w.out}));
  if (!checks.passed()) return checks.error();
  // A multiply-add of a vector takes a third of a nanosecond; waking a thread takes ten microseconds.
  const int64_t workers = 1 + w.groups * w.rows * w.in * w.out / (1 << 19);
  const auto kernel = kernels().weight_gradient;
  for_all_tasks(pool, w.tasks(), workers, [&](int64_t task, int64_t) { kernel(w, task); });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace mam

using mam::Floats;
using xla::ffi::Ffi;
using xla::ffi::ThreadPool;

// clang-format off
XLA_FFI_DEFINE_HANDLER_SYMBOL(mam_native_weight_gradient, mam::run, Ffi::Bind().Ctx<ThreadPool>()
  .Arg<Floats>().Arg<Floats>().Ret<Floats>().Attr<int64_t>("blocks"));
// clang-format on
