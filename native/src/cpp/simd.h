// Vectors of floats, as wide as the instruction set a file is compiled for. Included by kernels.cc only, once per set:
// everything lives in an unnamed namespace, so that no function compiled for a newer processor is ever linked into the
// path of an older one.
#pragma once

#include <cstdint>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float V __attribute__((vector_size(4 * kLanes)));
typedef int32_t VI __attribute__((vector_size(4 * kLanes)));

#define MAM_INLINE inline __attribute__((always_inline))
#define MAM_UNROLL _Pragma("GCC unroll 16")

// A pointer of which the compiler forgets where it comes from. Otherwise it keeps the sums of a base and each constant,
// which an instruction would add for nothing, in registers that it then has not enough of.
template <class T>
MAM_INLINE T* opaque(T* pointer) {
  asm("" : "+r"(pointer));
  return pointer;
}

MAM_INLINE void prefetch(const float* from) { __builtin_prefetch(from); }

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

MAM_INLINE V splat(float value) { return V{} + value; }

MAM_INLINE V load(const float* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

MAM_INLINE void store(float* to, V v) { __builtin_memcpy(to, &v, sizeof v); }

// The first `lanes` of a vector; the others are zero.
MAM_INLINE V load(const float* from, int64_t lanes) {
  if (__builtin_expect(lanes >= kLanes, 1)) return load(from);
  float values[kLanes] = {};
  for (int64_t i = 0; i < lanes; ++i) values[i] = from[i];
  return load(values);
}

MAM_INLINE void store(float* to, V v, int64_t lanes) {
  if (__builtin_expect(lanes >= kLanes, 1)) return store(to, v);
  float values[kLanes];
  store(values, v);
  for (int64_t i = 0; i < lanes; ++i) to[i] = values[i];
}

// Where a is not a number, neither is the result.
MAM_INLINE V larger(V a, V b) { return a < b ? b : a; }
MAM_INLINE V smaller(V a, V b) { return a > b ? b : a; }

// The sum of the lanes, in a fixed order.
MAM_INLINE float sum_lanes(const float* v) {
  typedef float V4 __attribute__((vector_size(16)));
  V4 part[kLanes / 4];
  __builtin_memcpy(part, v, sizeof part);
  for (int half = kLanes / 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return (part[0][0] + part[0][2]) + (part[0][1] + part[0][3]);
}

MAM_INLINE float sum_lanes(V v) {
  float values[kLanes];
  store(values, v);
  return sum_lanes(values);
}

// 2^x within 2.1 units in the last place (1.8 with multiply-add; tests/test_kernels.cc) for -126 <= x < 128; below,
// at most 2^-126 where a subnormal number would stand. x = n + r with |r| <= 1/2; a polynomial gives 2^r, the exponent
// bits 2^n. Without AVX-512 rounding is done by adding 1.5 * 2^23, which -ffast-math would undo: never compile with it.
MAM_INLINE V exp2(V x) {
#if defined(__AVX512F__)
  const V r = (V)_mm512_reduce_ps((__m512)x, 0x08), n = x - r;
#else
  x = smaller(larger(x, splat(-126.0f)), splat(127.999992f));
  const V shifted = x + 12582912.0f, n = shifted - 12582912.0f, r = x - n;
#endif
  V p = r * 0.00132257072255f + 0.00967176258564f;
  p = p * r + 0.05550891533494f;
  p = p * r + 0.240222364664078f;
  p = p * r + 0.693146824836731f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return (V)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return (V)((VI)p + ((VI)shifted << 23));
#endif
}

MAM_INLINE V exp(V x) { return exp2(x * kLog2E); }

MAM_INLINE V silu(V x) { return x / (1.0f + exp(-x)); }

// The tanh form, as jax.nn.gelu: x (1 + tanh t) / 2 = x / (1 + exp(-2 t)).
MAM_INLINE V gelu(V x) { return x / (1.0f + exp(x * (x * x * 0.044715f + 1.0f) * -1.5957691216057308f)); }

MAM_INLINE V exp_of_minus_abs(V x) { return exp(x < 0.0f ? x : -x); }

// log(1 + exp(x)), given e = exp(-|x|); log(1 + e) = 2 artanh(e / (2 + e)), a series with a relative error of 2e-8.
MAM_INLINE V softplus(V x, V e) {
  const V s = e / (e + 2.0f), s2 = s * s;
  V series = s2 * (2.0f / 13) + 2.0f / 11;
  series = series * s2 + 2.0f / 9;
  series = series * s2 + 2.0f / 7;
  series = series * s2 + 2.0f / 5;
  series = series * s2 + 2.0f / 3;
  series = series * s2 + 2.0f;
  return series * s + larger(x, V{});
}

MAM_INLINE V softplus(V x) { return softplus(x, exp_of_minus_abs(x)); }

}  // namespace
