// Attention as XLA calls it. Leading axes before those named below are vmap's: all buffers have the same.
#include <cstdint>

#include "dispatch.h"
#include "parallel.h"
#include "shapes.h"

namespace mam {
namespace {

// Forward, or with all that belongs to the backward pass that.
ffi::Error attend(ffi::ThreadPool& pool, int64_t blocks, Floats q, Floats k, Floats v, Floats visible, Floats* y,
                  Floats* gy, Floats* gq, Floats* gk, Floats* gv) {
  Checks checks("attention");
  const auto dims = q.dimensions(), seen = visible.dimensions();
  checks.demand(dims.size() >= 4, "queries must have axes [sequences, agents, heads, size]");
  checks.demand(seen.size() + 1 == dims.size(), "visible must have axes [1 or sequences, agents, agents]");
  if (!checks.passed()) return checks.error();
  const Lead lead(dims, 4);
  const size_t last = dims.size() - 1;
  Attention a{};
  a.groups = lead.groups;
  a.sequences = dims[last - 3], a.agents = dims[last - 2], a.heads = dims[last - 1], a.size = dims[last];
  a.shared = seen[seen.size() - 3] == 1;
  a.blocks = blocks;
  checks.demand(a.size > 0 && a.size % kMaxLanes == 0, "heads must be multiples of " + std::to_string(kMaxLanes));
  checks.demand(a.agents <= kMaxAttended, "at most " + std::to_string(kMaxAttended) + " agents attend to each other");
  checks.demand_blocks(blocks, a.sequences);
  const Shape wide = lead.with({a.sequences, a.agents, a.heads, a.size});
  a.q = checks.data("queries", q, wide);
  a.k = checks.data("keys", k, wide);
  a.v = checks.data("values", v, wide);
  a.visible = checks.data("visible", visible, lead.with({a.shared ? 1 : a.sequences, a.agents, a.agents}));
  if (y) {
    a.y = checks.data("y", *y, wide);
  } else {
    a.gy = checks.data("y's gradient", *gy, wide);
    a.gq = checks.data("queries' gradient", *gq, wide);
    a.gk = checks.data("keys' gradient", *gk, wide);
    a.gv = checks.data("values' gradient", *gv, wide);
  }
  if (!checks.passed()) return checks.error();
  // A pair takes some ten nanoseconds; waking a thread takes ten microseconds.
  const int64_t workers = 1 + a.groups * a.sequences * a.agents * a.agents * a.heads * a.size / (1 << 17);
  const auto run = kernels().attention;
  for_all_tasks(pool, a.tasks(), workers, [&](int64_t task, int64_t) { run(a, task); });
  return ffi::Error::Success();
}

ffi::Error forward(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Floats visible, FloatsOut y, int64_t blocks) {
  return attend(pool, blocks, q, k, v, visible, &*y, nullptr, nullptr, nullptr, nullptr);
}

ffi::Error backward(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Floats visible, Floats gy, FloatsOut gq,
                    FloatsOut gk, FloatsOut gv, int64_t blocks) {
  return attend(pool, blocks, q, k, v, visible, nullptr, &gy, &*gq, &*gk, &*gv);
}

}  // namespace
}  // namespace mam

using mam::Floats;
using xla::ffi::Ffi;
using xla::ffi::ThreadPool;

// clang-format off
XLA_FFI_DEFINE_HANDLER_SYMBOL(mam_native_attention, mam::forward, Ffi::Bind().Ctx<ThreadPool>()
  .Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>().Ret<Floats>().Attr<int64_t>("blocks"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(mam_native_attention_backward, mam::backward, Ffi::Bind().Ctx<ThreadPool>()
  .Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>()
  .Ret<Floats>().Ret<Floats>().Ret<Floats>().Attr<int64_t>("blocks"));
// clang-format on
