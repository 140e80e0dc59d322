// The selective scan as XLA calls it. Leading axes before those named below are vmap's: all buffers have the same.
#include <cstdint>

#include "dispatch.h"
#include "parallel.h"
#include "shapes.h"

namespace mam {
namespace {

constexpr int64_t kWorkPerWorker = 1 << 15;  // states: about 10 microseconds, and as long as waking a thread takes

class ScanCall {
 public:
  ScanCall(const char* kernel, Floats x, Floats dt, Floats A, Floats B, Floats weight, bool reverse, int64_t blocks,
           int64_t tiles, Scan& scan)
      : checks(kernel), scan_(scan) {
    const auto dims = x.dimensions();
    checks.demand(dims.size() >= 3, "x must have axes [sequences, agents, channels]");
    checks.demand(A.dimensions().size() + 1 == dims.size(), "A must have axes [states or 1, channels]");
    checks.demand(B.dimensions().size() == dims.size(), "B must have axes [sequences, agents, states]");
    checks.demand(dt.dimensions().size() == dims.size(), "dt must have axes [sequences, agents, channels or rank]");
    if (!checks.passed()) return;
    lead_ = Lead(dims, 3);
    scan.groups = lead_.groups;
    scan.sequences = dims[dims.size() - 3];
    scan.agents = dims[dims.size() - 2];
    scan.channels = dims[dims.size() - 1];
    scan.states = B.dimensions()[dims.size() - 1];
    scan.rates = A.dimensions()[dims.size() - 3] == 1 ? 1 : scan.states;
    scan.rank = weight.element_count() ? dt.dimensions()[dims.size() - 1] : 0;
    scan.reverse = reverse;
    scan.blocks = blocks;
    scan.tiles = tiles;
    checks.demand(scan.agents > 0 && scan.channels > 0 && scan.states > 0, "agents, channels and states must be there");
    checks.demand(!scan.rank || scan.rates == scan.states, "a gated scan has a rate for each state");
    checks.demand(tiles > 0 && (tiles - 1) * scan.tile_width() < scan.channels, "no such tiles");
    checks.demand_blocks(blocks, scan.sequences);
  }

  template <class Buffer>
  auto data(const char* name, Buffer&& buffer, const Shape& own) {
    return checks.data(name, buffer, lead_.with(own));
  }

  template <class Buffer>
  auto optional(const char* name, Buffer&& buffer, const Shape& own) {
    return checks.optional(name, buffer, lead_.with(own));
  }

  void read_inputs(Floats x, Floats dt, Floats A, Floats B, Floats C, Floats D, Floats reset, Floats initial,
                   Floats weight, Floats gate, Floats alive) {
    scan_.x = data("x", x, wide());
    scan_.dt = data("dt", dt, scan_.rank ? features() : wide());
    scan_.weight = scan_.rank ? data("weight", weight, weights()) : nullptr;
    scan_.gate = scan_.rank ? data("gate", gate, wide()) : nullptr;
    scan_.alive = optional("alive", alive, {scan_.sequences, scan_.agents});
    scan_.A = data("A", A, {scan_.rates, scan_.channels});
    scan_.B = data("B", B, narrow());
    scan_.C = data("C", C, narrow());
    scan_.D = data("D", D, {scan_.channels});
    scan_.reset = optional("reset", reset, {scan_.sequences, scan_.agents});
    scan_.initial = optional("initial_state", initial, state());
  }

  // Runs all tasks, with at most as many workers as there is scratch for.
  template <class Kernel, class Full>
  ffi::Error run(ffi::ThreadPool& pool, const Kernel& kernel, const Full& scan, FloatsOut scratch) {
    const int64_t size = scan.scratch_size();
    const int64_t work = scan.groups * scan.sequences * scan.agents * scan.channels * scan.states;
    const int64_t workers = std::min<int64_t>(scratch->element_count() / size, 1 + work / kWorkPerWorker);
    checks.demand(workers > 0 || scan.tasks() == 0, "scratch must have " + std::to_string(size) + " elements");
    if (!checks.passed()) return checks.error();
    float* const memory = scratch->typed_data();
    for_all_tasks(pool, scan.tasks(), workers,
                  [&](int64_t task, int64_t worker) { kernel(scan, task, memory + worker * size); });
    return ffi::Error::Success();
  }

  Shape wide() const { return {scan_.sequences, scan_.agents, scan_.channels}; }
  Shape narrow() const { return {scan_.sequences, scan_.agents, scan_.states}; }
  Shape features() const { return {scan_.sequences, scan_.agents, scan_.rank}; }
  Shape weights() const { return {scan_.rank + 1, scan_.channels}; }
  Shape state() const { return {scan_.sequences, scan_.states, scan_.channels}; }
  Shape kept() const { return {scan_.sequences, scan_.kept_states(), scan_.states, scan_.channels}; }

  Checks checks;

 private:
  Scan& scan_;
  Lead lead_{Shape{}, 0};
};

ffi::Error forward(ffi::ThreadPool pool, Floats x, Floats dt, Floats A, Floats B, Floats C, Floats D, Floats reset,
                   Floats initial, Floats weight, Floats gate, Floats alive, FloatsOut y, FloatsOut last,
                   FloatsOut starts, FloatsOut scratch, bool reverse, int64_t blocks, int64_t tiles) {
  ScanForward scan;
  ScanCall call("scan", x, dt, A, B, weight, reverse, blocks, tiles, scan);
  if (!call.checks.passed()) return call.checks.error();
  call.read_inputs(x, dt, A, B, C, D, reset, initial, weight, gate, alive);
  scan.y = call.optional("y", *y, call.wide());
  scan.last = call.optional("final state", *last, call.state());
  scan.starts = call.optional("kept states", *starts, call.kept());
  return call.run(pool, kernels().scan_forward, scan, scratch);
}

ffi::Error backward(ffi::ThreadPool pool, Floats x, Floats dt, Floats A, Floats B, Floats C, Floats D, Floats reset,
                    Floats initial, Floats weight, Floats gate, Floats alive, Floats starts, Floats gy, Floats g_last,
                    FloatsOut gx, FloatsOut gdt, FloatsOut gA, FloatsOut gB, FloatsOut gC, FloatsOut gD,
                    FloatsOut g_initial, FloatsOut g_weight, FloatsOut g_gate, FloatsOut scratch, bool reverse,
                    int64_t blocks, int64_t tiles) {
  ScanBackward scan;
  ScanCall call("scan's gradient", x, dt, A, B, weight, reverse, blocks, tiles, scan);
  if (!call.checks.passed()) return call.checks.error();
  call.read_inputs(x, dt, A, B, C, D, reset, initial, weight, gate, alive);
  const auto per_tile = [&](Shape shape) {
    shape.insert(shape.begin(), tiles);
    return shape;
  };
  scan.starts = scan.kept_states() ? call.data("kept states", starts, call.kept()) : nullptr;
  scan.gy = call.optional("y's gradient", gy, call.wide());
  scan.g_last = call.optional("the final state's gradient", g_last, call.state());
  scan.gx = call.data("x's gradient", *gx, call.wide());
  scan.gdt = call.data("dt's gradient", *gdt, scan.rank ? per_tile(call.features()) : call.wide());
  scan.gA = call.data("A's gradient", *gA, {blocks, scan.rates, scan.channels});
  scan.gB = call.data("B's gradient", *gB, per_tile(call.narrow()));
  scan.gC = call.data("C's gradient", *gC, per_tile(call.narrow()));
  scan.gD = call.data("D's gradient", *gD, {blocks, scan.channels});
  scan.g_initial = call.optional("the initial state's gradient", *g_initial, call.state());
  scan.g_weight = scan.rank ? call.data("the weight's gradient", *g_weight, {blocks, scan.rank + 1, scan.channels})
                            : nullptr;
  scan.g_gate = scan.rank ? call.data("the gate's gradient", *g_gate, call.wide()) : nullptr;
  return call.run(pool, kernels().scan_backward, scan, scratch);
}

}  // namespace
}  // namespace mam

using xla::ffi::Ffi;
using xla::ffi::ThreadPool;
using mam::Floats;

// clang-format off
#define MAM_SCAN_INPUTS \
  .Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>() \
  .Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>()
#define MAM_SCAN_ATTRIBUTES .Attr<bool>("reverse").Attr<int64_t>("blocks").Attr<int64_t>("tiles")

XLA_FFI_DEFINE_HANDLER_SYMBOL(mam_native_scan, mam::forward, Ffi::Bind().Ctx<ThreadPool>()
  MAM_SCAN_INPUTS
  .Ret<Floats>().Ret<Floats>().Ret<Floats>().Ret<Floats>()
  MAM_SCAN_ATTRIBUTES);

XLA_FFI_DEFINE_HANDLER_SYMBOL(mam_native_scan_backward, mam::backward, Ffi::Bind().Ctx<ThreadPool>()
  MAM_SCAN_INPUTS
  .Arg<Floats>().Arg<Floats>().Arg<Floats>()
  .Ret<Floats>().Ret<Floats>().Ret<Floats>().Ret<Floats>().Ret<Floats>()
  .Ret<Floats>().Ret<Floats>().Ret<Floats>().Ret<Floats>().Ret<Floats>()
  MAM_SCAN_ATTRIBUTES);
// clang-format on

// What Python asks for besides (mam_native/__init__.py).
extern "C" {
const char* mam_native_isa() { return mam::kernels().name; }

const char* mam_native_available(int index) {
  const mam::Kernels* kernels = mam::available(index);
  return kernels ? kernels->name : nullptr;
}

bool mam_native_choose(const char* name) { return mam::choose_kernels(name); }

int64_t mam_native_scan_scratch(int64_t channels, int64_t states, int64_t rank, int64_t tiles) {
  mam::ScanBackward backward{};
  backward.channels = channels;
  backward.states = states;
  backward.rank = rank;
  backward.tiles = tiles;
  return backward.scratch_size();  // the larger one
}
}
