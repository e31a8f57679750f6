// What the kernels share. Activations and all arithmetic are float; half and bfloat are only loaded and stored.
#pragma once
#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;

#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

constant constexpr float LOWEST = -3e38f;  // a mask; infinities are undefined under fast math

// ---- functions ----

// N. Juffa's two polynomials, about 1 unit in the last place, as engine/cpu/functions.h
METAL_FUNC float erf(float x) {
  const float t = fabs(x), s = x * x;
  float near = fma(fma(-5.96761703e-4f, s, 4.99119423e-3f), s, -2.67681349e-2f);
  near = fma(fma(fma(near, s, 1.12819925e-1f), s, -3.76125336e-1f), s, 1.28379166e-1f);
  float far = fma(fma(-1.72853470e-5f, t, 3.83197126e-4f), t, -3.88396438e-3f);
  far = fma(fma(fma(fma(far, t, 2.42546219e-2f), t, -1.06777877e-1f), t, -6.34846687e-1f), t, -1.28717512e-1f);
  return t > 0.927734375f ? copysign(1.0f - exp(fma(far, t, -t)), x) : fma(near, x, x);
}

METAL_FUNC float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }
METAL_FUNC float silu(float x) { return x * sigmoid(x); }
// x Phi(x). Phi(-a) = e^(-a^2/2) Q(1 / (1 + 0.4 a)): Q is a fit of SciPy's erfcx, so the tail keeps its relative accuracy.
METAL_FUNC float gelu(float x) {
  const float a = fabs(x), z = a * a, t = 1.0f / fma(a, 0.4f, 1.0f);
  float q = fma(fma(3.190341032e-2f, t, -1.751270671e-1f), t, 3.783450538e-1f);
  q = fma(fma(fma(q, t, -3.687621314e-1f), t, 1.151236735e-1f), t, -2.451671630e-2f);
  q = fma(fma(fma(fma(q, t, 9.054354421e-2f), t, 1.333050582e-1f), t, 1.596083581e-1f), t, 1.595768239e-1f) * t;
  const float e = exp(-0.5f * z), tail = e == 0.0f ? e : fma(-0.5f * fma(a, a, -z), e, e) * q;  // what a * a lost
  return x < 0.0f ? x * tail : fma(-min(30.0f, a), tail, x);
}
METAL_FUNC float gelu_tanh(float x) { return x * sigmoid(1.595769122f * (x + 0.044715f * x * x * x)); }

// ---- memory of any dtype, by its number in steps.SIZES: a function constant, so that no branch is left ----

template <typename Number> METAL_FUNC Number get(device const uchar* p, int dtype, long i) {
  switch (dtype) {
    case 0: return Number(p[i] != 0);
    case 1: return Number(p[i]);
    case 2: return Number(((device const ushort*)p)[i]);
    case 3: return Number(((device const uint*)p)[i]);
    case 4: return Number(((device const ulong*)p)[i]);
    case 5: return Number(((device const char*)p)[i]);
    case 6: return Number(((device const short*)p)[i]);
    case 7: return Number(((device const int*)p)[i]);
    case 8: return Number(((device const long*)p)[i]);
    case 9: return Number(float(((device const half*)p)[i]));
    case 10: return Number(float(((device const bfloat*)p)[i]));
    default: return Number(((device const float*)p)[i]);
  }
}
template <typename Number> METAL_FUNC void put(device uchar* p, int dtype, long i, Number x) {
  switch (dtype) {                                 // a number beyond the ends of int or long is undefined, as in C
    case 0: p[i] = x != Number(0); break;
    case 1: p[i] = uchar(int(x)); break;
    case 2: ((device ushort*)p)[i] = ushort(int(x)); break;
    case 3: ((device uint*)p)[i] = uint(long(x)); break;
    case 4: ((device ulong*)p)[i] = ulong(x); break;
    case 5: ((device char*)p)[i] = char(int(x)); break;
    case 6: ((device short*)p)[i] = short(int(x)); break;
    case 7: ((device int*)p)[i] = int(x); break;
    case 8: ((device long*)p)[i] = long(x); break;
    case 9: ((device half*)p)[i] = half(float(x)); break;
    case 10: ((device bfloat*)p)[i] = bfloat(float(x)); break;
    default: ((device float*)p)[i] = float(x);
  }
}

// Where item `at` of a shape of some axes lies, in elements; offsets that are not wide have 31 bits.
METAL_FUNC long offset(uint at, int axes, bool wide, constant uint* shape, constant int* strides) {
  long far = 0;
  int near = 0;
  for (int axis = axes - 1; axis >= 0; axis--) {
    const uint rest = axis ? at / shape[axis] : 0, index = at - rest * shape[axis];
    if (wide) far += long(index) * strides[axis];
    else near += int(index) * strides[axis];
    at = rest;
  }
  return wide ? far : long(near);
}

// The row that an index means, a negative one from the end; -1 for one out of range, the first of which `fault` keeps:
// whether there is one, the index, the number of rows.
METAL_FUNC long resolve(long index, int rows, device atomic_int* fault) {
  const long row = index < 0 ? index + rows : index;
  if (row >= 0 && row < rows) return row;
  if (atomic_exchange_explicit(fault, 1, memory_order_relaxed) == 0) {
    atomic_store_explicit(fault + 1, int(index), memory_order_relaxed);
    atomic_store_explicit(fault + 2, rows, memory_order_relaxed);
  }
  return -1;
}

// ---- reductions over a threadgroup: every thread calls them, `part` holds a float for each simdgroup ----

METAL_FUNC float group_sum(float value, threadgroup float* part, uint simdgroup, uint lane, uint simdgroups) {
  value = simd_sum(value);
  threadgroup_barrier(mem_flags::mem_threadgroup);  // of a call before
  if (lane == 0) part[simdgroup] = value;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return simd_sum(lane < simdgroups ? part[lane] : 0.0f);
}

METAL_FUNC float group_max(float value, threadgroup float* part, uint simdgroup, uint lane, uint simdgroups) {
  value = simd_max(value);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (lane == 0) part[simdgroup] = value;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return simd_max(lane < simdgroups ? part[lane] : LOWEST);
}

// ---- floats of 8 and 4 bits; as halves they are too small by 2^8 and 2^14, exactly ----

METAL_FUNC float e4m3(uint code) { return 256.0f * float(as_type<half>(ushort((code & 127u) << 7 | (code & 128u) << 8))); }
METAL_FUNC float e2m1(uint code) { return 16384.0f * float(as_type<half>(ushort((code & 7u) << 9 | (code & 8u) << 12))); }
METAL_FUNC float e8m0(uint code) { return as_type<float>(code ? code << 23 : 1u << 22); }  // a GPU may make 2^-127 0

// Column k of a quantized row, whose group has the scale and bias number `side`
METAL_FUNC float weight_at(device const uint* row, uint k, device const uchar* scales, device const uchar* biases, long side,
                           int dtype, int format, int group) {
  const uint bits = format & 15, word = k * bits / 32, shift = k * bits % 32;
  uint code = row[word] >> shift;
  if (shift + bits > 32) code |= row[word + 1] << (32 - shift);
  code &= (1u << bits) - 1u;
  const float s = get<float>(scales, dtype, side);
  if (format < 16) return fma(float(code), s, get<float>(biases, dtype, side));
  return (format == 20 ? e2m1(code) : e4m3(code)) * (dtype != 1 ? s : group == 16 ? e4m3(uint(s)) : e8m0(uint(s)));
}

// ---- quantized rows: FORMAT as in engine/cpu/kernels/codes.h, GROUP, SCALE the type of scales and biases ----
// Codes are a stream of low bits first, so 16 of them are BITS words of 16 bits, of one group; words need no alignment but 2.
#ifdef FORMAT
#define BITS (FORMAT & 15)
#define IS_FLOAT (FORMAT > 16)

// Code i of 16 where it lies: an integer as large as 2^shift(i) of it, so that nobody shifts what can be a factor.
METAL_FUNC int shift(int i) { return IS_FLOAT ? 0 : i * BITS % 16; }
METAL_FUNC float unshift(int i) { return 1.0f / float(1 << shift(i)); }
METAL_FUNC float code_at(device const ushort* q, int i) {
  const int word = i * BITS / 16, at = i * BITS % 16;
  uint w = q[word];
  if (at + BITS > 16) w |= uint(q[word + 1]) << 16;
  if (FORMAT == 20) return e2m1(w >> at);
  if (FORMAT == 24) return e4m3(w >> at);
  return float(int(w & ((1u << BITS) - 1u) << at));
}

METAL_FUNC float scale_of(float s) { return s; }
METAL_FUNC float scale_of(half s) { return float(s); }
METAL_FUNC float scale_of(bfloat s) { return float(s); }
METAL_FUNC float scale_of(uchar s) { return GROUP == 16 ? e4m3(s) : e8m0(s); }
#endif
