// All kernels, compiled once per instruction set; MAM_ISA is its name.
#include "kernels.h"

#include "attention.inl"
#include "conv.inl"
#include "decode.inl"
#include "multiply.inl"
#include "norm.inl"
#include "scan.inl"
#include "simd.h"

#define MAM_JOIN_(a, b) a##b
#define MAM_JOIN(a, b) MAM_JOIN_(a, b)
#define MAM_STRING_(a) #a
#define MAM_STRING(a) MAM_STRING_(a)

namespace {

void exp2_all(const float* x, float* y, int64_t size) {
  for (int64_t i = 0; i < size; i += kLanes) store(y + i, exp2(load(x + i)));
}

}  // namespace

namespace mam {

extern const Kernels MAM_JOIN(kernels_, MAM_ISA);
const Kernels MAM_JOIN(kernels_, MAM_ISA) = {
    MAM_STRING(MAM_ISA), kLanes, scan_forward, scan_backward, convolution, normalisation, weight_gradient, attention,
    decode, exp2_all};

}  // namespace mam
