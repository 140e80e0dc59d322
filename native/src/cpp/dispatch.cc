#include "dispatch.h"

#include <atomic>
#include <cstring>

namespace mam {

#if defined(MAM_X86)
extern const Kernels kernels_v2, kernels_avx2, kernels_avx512;
#else
extern const Kernels kernels_base;
#endif

namespace {

struct Available {
  const Kernels* sets[4] = {};
  int count = 0;

  Available() {
#if defined(MAM_X86)
    __builtin_cpu_init();
    sets[count++] = &kernels_v2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      sets[count++] = &kernels_avx2;
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
        sets[count++] = &kernels_avx512;
    }
#else
    sets[count++] = &kernels_base;
#endif
  }
};

const Available& all() {
  static const Available available;
  return available;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* own = chosen.load(std::memory_order_relaxed);
  return own ? *own : *all().sets[all().count - 1];
}

const Kernels* available(int index) { return index >= 0 && index < all().count ? all().sets[index] : nullptr; }

bool choose_kernels(const char* name) {
  for (int i = 0; i < all().count; ++i)
    if (std::strcmp(all().sets[i]->name, name) == 0) {
      chosen.store(all().sets[i], std::memory_order_relaxed);
      return true;
    }
  return false;
}

}  // namespace mam
