// How weights are stored, and the way to numbers that every kernel shares. A `format` is an integer of the step:
//   0                      floats
//   1, 2, 3, 4, 5, 6, 8    codes of so many bits: weight = scale code + bias, both of the group and of one float type
//   FP4, FP8               floats e2m1 and e4m3, without biases: weight = scale number. uint8 scales are e4m3 in groups
//                          of 16 (nvfp4), else e8m0, powers of two (mxfp4, mxfp8); others are a float type.
// All lie along a row as a stream of low bits first. e2m1 has few values, whole numbers when doubled, and so reads as
// codes 0 ... 24 with half the scale and a bias of -12 of these.   Source: OCP Microscaling Formats (MX) v1.0
#pragma once
#include "columns.h"

LZ_NAMESPACE_BEGIN

constexpr int FP4 = 16 + 4, FP8 = 16 + 8;
constexpr int bits_of(int64_t format) { return format & 15; }
constexpr int parts_of(int64_t format) { return !format ? 1 : format & 16 ? 2 : 3; }
LZ_INLINE bool is_format(int64_t format) { return format == FP4 || format == FP8 || (format > 0 && format <= 8 && format != 7); }
#define LZ_FORMATS "bits must be 1, 2, 3, 4, 5, 6 or 8, or 20 or 24 for floats of 4 or 8"
#define LZ_GROUPS "group must be 16, 32, 64 or 128"
LZ_INLINE bool is_group(int64_t group) { return group == 16 || group == 32 || group == 64 || group == 128; }
// what is wrong with a matrix of K columns: codes, scales and, unless it has floats, biases
LZ_INLINE const char* check_parts(int64_t format, int64_t group, int64_t K, const View* part) {
  const auto is_real = [](int dtype) { return dtype == LZ_F32 || dtype == LZ_F16 || dtype == LZ_BF16; };
  const int last = part->ndim - 1, sides = parts_of(format);
  if (!is_format(format)) return LZ_FORMATS;
  if (!is_group(group)) return LZ_GROUPS;
  if (K % group) return "the inner size must be a multiple of the group";
  if (part->dtype != LZ_U32 || part->shape[last] * 32 != K * bits_of(format)) return "codes must be uint32, 32 / bits of them in a word";
  for (int i = 1; i < sides; i++) {
    if (part[i].shape[last] != K / group) return "scales and biases must have one column a group";
    if (!is_real(part[i].dtype) && !(sides == 2 && part[i].dtype == LZ_U8)) return "scales and biases must be float32, float16 or bfloat16, those of floats uint8 too";
  }
  return sides == 3 && part[1].dtype != part[2].dtype ? "scales and biases must have one dtype" : 0;
}

constexpr uint8_t E2M1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};  // doubled, + 12

LZ_INLINE f32x e4m3(u8x codes) {
#if defined(__AVX512F__)  // as a half, 2^8 times too small; of these 127 is no NaN
  const u16x h = __builtin_convertvector(codes, u16x), mag = h & 127;
  const u16x half = (h & 128) << 8 | mag << 7 | ((u16x)(mag == 127) & 0x7c00);
  return (f32x)_mm512_cvtph_ps((__m256i)half) * 256.0f;
#endif
  const i32x c = __builtin_convertvector(codes, i32x), size = c & 127;
  const f32x normal = (f32x)((size << 20) + (120 << 23)), small = __builtin_convertvector(size, f32x) * 0x1p-9f;
  const f32x v = select(size < 8, small, select(size == 127, splat(__builtin_nanf("")), normal));
  return (f32x)((i32x)v | (c & 128) << 24);
}
LZ_INLINE f32x e8m0(u8x codes) {
  const i32x c = __builtin_convertvector(codes, i32x);
  return (f32x)((c << 23) | ((c == 0) & 0x400000));
}

// Codes of any format but 8 bits to bytes: those of FP4 are what E2M1 says. K is a multiple of 16.
static void widen_codes(int format, const char* from, int64_t K, uint8_t* to) {
  const int bits = bits_of(format);
  const uint64_t ones = 0x0101010101010101, mask = ((1u << bits) - 1) * ones;
  const auto number = [&](uint8_t* p) { for (int i = 0; format == FP4 && i < 8; i++) p[i] = E2M1[p[i]]; };
  int64_t k = 0;
#if defined(__AVX512VBMI__)  // byte b i + j of the stream to byte j of lane i, then every code from its bit of the lane
  const __m512i lane = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0), steps = _mm512_set1_epi64(0x0706050403020100);
  const __m512i bytes = _mm512_add_epi8(_mm512_mullo_epi64(lane, _mm512_set1_epi64(bits * ones)), steps);
  const __m512i shifts = _mm512_set1_epi64(0x0706050403020100 * bits), low = _mm512_set1_epi64(mask);
  const __m512i table = _mm512_broadcast_i32x4(load<__m128i>(E2M1));
  for (; k + 64 <= K; k += 64, from += 8 * bits) {
    __m512i z = _mm512_permutexvar_epi8(bytes, _mm512_maskz_loadu_epi8((1ull << 8 * bits) - 1, from));
    z = _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, z), low);
    _mm512_storeu_si512(to + k, format == FP4 ? _mm512_shuffle_epi8(table, z) : z);
  }
#endif
  for (; k < K; k += 8, from += bits) {
    uint64_t z = 0;
    for (int i = 0; i < bits; i++) z |= (uint64_t)(uint8_t)from[i] << 8 * i;
#if defined(__BMI2__)
    z = _pdep_u64(z, mask);
    memcpy(to + k, &z, 8);
#else
    for (int i = 0; i < 8; i++) to[k + i] = z >> bits * i & mask & 255;
#endif
    number(to + k);
  }
}

// n scales of a row as floats, and n biases
static void row_sides(int format, int group, int dtype, const char* scales, const char* biases, int64_t n, float* scale, float* bias) {
  over(n, LZ_LAMBDA2(i, m) {
    f32x s;
    if (dtype == LZ_U8) {
      u8x some{};
      memcpy(&some, scales + i, m);
      s = group == 16 ? e4m3(some) : e8m0(some);
    } else {
      s = get_as(dtype, scales + i * size_of(dtype), m);
    }
    if (format == FP4) s *= 0.5f;
    put(scale + i, s, m);
    put(bias + i, format == FP4 ? s * -12 : format == FP8 ? f32x{} : get_as(dtype, biases + i * size_of(dtype), m), m);
  });
}

// fn(k, the numbers of 16 columns from k on) along K columns of a row, whose sides row_sides gave
template <class F>
LZ_INLINE void over_numbers(int format, int group, const char* codes, const float* scale, const float* bias, int64_t K, const F& fn) {
  const auto along = [&](auto number) __attribute__((always_inline)) {
    for (int64_t k = 0, end = group; k < K; end += group, scale++, bias++)
      for (const f32x s = splat(*scale), b = splat(*bias); k < end; k += LANES) fn(k, fma(number(k), s, b));
  };
  if (format == FP8) return along([&](int64_t k) __attribute__((always_inline)) { return e4m3(load<u8x>(codes + k)); });
  along([&](int64_t k) __attribute__((always_inline)) {
    u8x q;
    if (format == 8) q = load<u8x>(codes + k);
    else widen_codes(format, codes + k * bits_of(format) / 8, LANES, (uint8_t*)&q);
    return __builtin_convertvector(__builtin_convertvector(q, i32x), f32x);
  });
}

LZ_NAMESPACE_END
