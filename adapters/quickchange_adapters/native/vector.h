// Numbers and vectors: bfloat16 to float32 and back, sums over lanes, exp. AVX-512 with BF16.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>

namespace quickchange {

using bf16 = std::uint16_t;

constexpr int kLanes = 32;  // bfloat16 numbers in one register

inline float to_float(bf16 value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// Rounds to nearest even, as PyTorch does; NaN stays NaN.
inline bf16 to_bf16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline __m512i load_bits(const bf16* p) { return _mm512_loadu_si512(p); }

inline __m512bh load_bf16(const bf16* p) { return (__m512bh)load_bits(p); }

// The same two numbers in all lanes.
inline __m512bh load_pair(const bf16* p) {
  std::int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return (__m512bh)_mm512_set1_epi32(pair);
}

// Sixteen numbers as float32.
inline __m512 load_floats(const bf16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline void store_bf16(bf16* p, __m512 value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(value));
}

// Rounds to what bfloat16 can hold.
inline __m512 round_to_bf16(__m512 value) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(value)), 16));
}

// Puts what was unpacked by 64 bits in order: `low` and `high` hold, in each 128-bit quarter, four numbers each.
inline void in_order(__m512 low, __m512 high, __m512* first, __m512* last) {
  const __m512i before = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i behind = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  *first = _mm512_castpd_ps(_mm512_permutex2var_pd(_mm512_castps_pd(low), before, _mm512_castps_pd(high)));
  *last = _mm512_castpd_ps(_mm512_permutex2var_pd(_mm512_castps_pd(low), behind, _mm512_castps_pd(high)));
}

// Lane i of the result is the sum of all lanes of v[i].
inline __m512 sum_each(const __m512 v[16]) {
  __m512 a[8], b[4], c[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512 low = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]);
    const __m512 high = _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
    a[i] = _mm512_add_ps(low, high);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(a[2 * i]), _mm512_castps_pd(a[2 * i + 1]));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(a[2 * i]), _mm512_castps_pd(a[2 * i + 1]));
    b[i] = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  }
  // b[i] holds, in each 128-bit quarter, partial sums of v[4 i .. 4 i + 3].
#pragma GCC unroll 8
  for (int i = 0; i < 2; ++i) {
    const __m512 low = _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88);
    const __m512 high = _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd);
    c[i] = _mm512_add_ps(low, high);
  }
  const __m512 low = _mm512_shuffle_f32x4(c[0], c[1], 0x88);
  const __m512 high = _mm512_shuffle_f32x4(c[0], c[1], 0xdd);
  return _mm512_add_ps(low, high);
}

// exp with a relative error below 2e-7; arguments below -87 give about 1e-38.
// Source: Cephes' reduction by ln 2 in two parts and its polynomial of degree 5.
inline __m512 exp_floats(__m512 x) {
  // Of two numbers, min and max give the second where one is NaN: so NaN stays NaN.
  x = _mm512_min_ps(_mm512_set1_ps(88.3762626647949f), x);
  x = _mm512_max_ps(_mm512_set1_ps(-87.3365447504f), x);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, n);
}

// exp of numbers that are not above zero, or NaN, for a result that is rounded to bfloat16: with a relative error
// below 1e-5, and 0 below -87.
// Source: 2^x = 2^n · 2^f; the polynomial is the Taylor series of 2^f, for f in [-0.5, 0.5], to degree 5.
inline __m512 exp_of_negative(__m512 x) {
  // Of two numbers, max gives the second where one is NaN.
  const __m512 t = _mm512_max_ps(_mm512_set1_ps(-200.0f), _mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)));
  const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(t, n);
  __m512 p = _mm512_set1_ps(1.33335581e-3f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.61812911e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.55041087e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.40226507e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.93147181e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// The largest of some numbers, NaN if one is, and the first place where it is; 0 in case of NaN.
inline float highest(const float* x, int count, std::int32_t* place) {
  __m512 most = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  __m512i where = _mm512_setzero_si512();
  __m512i here = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __mmask16 has_nan = 0;
  for (int i = 0; i < count; i += 16, here = _mm512_add_epi32(here, _mm512_set1_epi32(16))) {
    const __mmask16 within = count - i < 16 ? static_cast<__mmask16>((1u << (count - i)) - 1u) : __mmask16{0xffff};
    const __m512 each = _mm512_maskz_loadu_ps(within, x + i);
    has_nan |= _mm512_cmp_ps_mask(each, each, _CMP_UNORD_Q);
    const __mmask16 is_more = _mm512_mask_cmp_ps_mask(within, each, most, _CMP_GT_OQ);
    most = _mm512_mask_mov_ps(most, is_more, each);
    where = _mm512_mask_mov_epi32(where, is_more, here);
  }
  *place = 0;
  if (has_nan) return std::numeric_limits<float>::quiet_NaN();
  const float result = _mm512_reduce_max_ps(most);
  const __mmask16 is_it = _mm512_cmp_ps_mask(most, _mm512_set1_ps(result), _CMP_EQ_OQ);
  const __m512i places = _mm512_mask_mov_epi32(_mm512_set1_epi32(std::numeric_limits<int>::max()), is_it, where);
  *place = _mm512_reduce_min_epi32(places);
  return result;
}

}  // namespace quickchange
