// The norms as XLA calls them. Leading axes before those named below are vmap's: all buffers have the same.
#include <cstdint>

#include "dispatch.h"
#include "parallel.h"
#include "shapes.h"

namespace mam {
namespace {

// Forward, or with all that belongs to the backward pass that. `plus` and `offset` without elements stand for none.
ffi::Error normalise(ffi::ThreadPool& pool, int64_t blocks, float eps, Floats x, Floats plus, Floats scale,
                     Floats offset, Floats* y, Floats* gy, Floats* gx, Floats* g_scale, Floats* g_offset) {
  Checks checks("norm");
  const auto dims = x.dimensions();
  checks.demand(dims.size() >= 2, "x must have axes [rows, size]");
  if (!checks.passed()) return checks.error();
  const Lead lead(dims, 2);
  Normalisation n{};
  n.groups = lead.groups;
  n.rows = dims[dims.size() - 2], n.size = dims[dims.size() - 1];
  n.blocks = blocks;
  n.eps = eps;
  checks.demand(n.size > 0 && n.size % kMaxLanes == 0, "rows must be multiples of " + std::to_string(kMaxLanes));
  checks.demand_blocks(blocks, n.rows);
  const Shape wide = lead.with({n.rows, n.size}), narrow = lead.with({n.size}), sums = lead.with({blocks, n.size});
  n.x = checks.data("x", x, wide);
  n.plus = checks.optional("what is added", plus, wide);
  n.scale = checks.data("scale", scale, narrow);
  n.offset = checks.optional("offset", offset, narrow);
  if (y) {
    n.y = checks.data("y", *y, wide);
  } else {
    n.gy = checks.data("y's gradient", *gy, wide);
    n.gx = checks.data("x's gradient", *gx, wide);
    n.g_scale = checks.data("scale's gradient", *g_scale, sums);
    n.g_offset = n.offset ? checks.data("offset's gradient", *g_offset, sums) : nullptr;
  }
  if (!checks.passed()) return checks.error();
  // A vector takes some five nanoseconds; waking a thread takes ten microseconds.
  const int64_t workers = 1 + n.groups * n.rows * n.size / (1 << 15);
  const auto run = kernels().normalisation;
  for_all_tasks(pool, n.tasks(), workers, [&](int64_t task, int64_t) { run(n, task); });
  return ffi::Error::Success();
}

ffi::Error forward(ffi::ThreadPool pool, Floats x, Floats plus, Floats scale, Floats offset, FloatsOut y,
                   int64_t blocks, float eps) {
  return normalise(pool, blocks, eps, x, plus, scale, offset, &*y, nullptr, nullptr, nullptr, nullptr);
}

ffi::Error backward(ffi::ThreadPool pool, Floats x, Floats plus, Floats scale, Floats offset, Floats gy, FloatsOut gx,
                    FloatsOut g_scale, FloatsOut g_offset, int64_t blocks, float eps) {
  return normalise(pool, blocks, eps, x, plus, scale, offset, nullptr, &gy, &*gx, &*g_scale, &*g_offset);
}

}  // namespace
}  // namespace mam

using mam::Floats;
using xla::ffi::Ffi;
using xla::ffi::ThreadPool;

// clang-format off
XLA_FFI_DEFINE_HANDLER_SYMBOL(mam_native_norm, mam::forward, Ffi::Bind().Ctx<ThreadPool>()
  .Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>().Ret<Floats>().Attr<int64_t>("blocks").Attr<float>("eps"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(mam_native_norm_backward, mam::backward, Ffi::Bind().Ctx<ThreadPool>()
  .Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>()
  .Ret<Floats>().Ret<Floats>().Ret<Floats>().Attr<int64_t>("blocks").Attr<float>("eps"));
// clang-format on
