// Dot products of index keys in two planes of bytes with queries of 16-bit integers.
//
// A key is scale * (high + low / 256), a query a vector of whole numbers; every sum here is one of
// integers, so that neither the order of work nor the width of vectors shows in a result. How the
// high plane alone bounds a score: docs/index-planes.md.
#pragma once

#include "native_common.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace m3 {

// Queries that are multiplied with a pair of keys at once.
constexpr int64_t kQueries = 4;
// Channels that are padded to, by zeros in queries: two bytes each, one widest vector.
constexpr int64_t kChannels = 32;
constexpr float kLargestQueryCode = 32767.0f;
// The low bytes of a key times a query of sum of sizes 1 are at most 128. Rounding of the three fp32
// operations that make a bound of it takes less than 0.02, and each of the multiply-adds less than
// 2^-24 * 256 * 127 where the products themselves are sums of fp32.
constexpr float kLowPlaneBound = 128.02f;
constexpr float kLowPlaneBoundPerChannel = 0.002f;

// [key of a pair][query], and two such pairs side by side.
typedef float PairFloats __attribute__((vector_size(32)));
typedef int32_t PairInts __attribute__((vector_size(32)));
// Of one key.
typedef float QueryFloats __attribute__((vector_size(16)));
typedef int32_t QueryInts __attribute__((vector_size(16)));
typedef double QueryDoubles __attribute__((vector_size(32)));

// Whole numbers of a query [dim] into codes[padded]; what 256 times the products with high planes
// may lack, or NaN for a query that is not finite, whose codes are zero.
inline float fixed_point(const float* query, int64_t dim, int64_t padded, int16_t* codes) {
  float largest = 0.0f, whole = 0.0f;
  bool finite = true;
  for (int64_t d = 0; d < dim; ++d) {
    const float size = std::fabs(query[d]);
    finite = finite && size <= std::numeric_limits<float>::max();
    largest = size > largest ? size : largest;
  }
  std::memset(codes, 0, padded * sizeof(int16_t));
  if (!finite) return std::numeric_limits<float>::quiet_NaN();
  const float step = largest / kLargestQueryCode;
  if (step == 0.0f) return 0.0f;
  for (int64_t d = 0; d < dim; ++d) {
    float code = std::nearbyint(query[d] / step);
    code = code > kLargestQueryCode ? kLargestQueryCode : code;
    code = code < -kLargestQueryCode ? -kLargestQueryCode : code;
    codes[d] = static_cast<int16_t>(code);
    whole += std::fabs(code);  // at most 512 channels: below 2^24, exact
  }
  return whole * (kLowPlaneBound + kLowPlaneBoundPerChannel * static_cast<float>(dim));
}

#if defined(__AVX2__)
inline __m256i add_products(__m256i sum, __m256i a, __m256i b) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  return _mm256_dpwssd_epi32(sum, a, b);
#else
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
#endif
}

// Loads a vector once: a processor adds and multiplies more of them than it loads.
inline void in_register(__m256i& x) { asm("" : "+x"(x)); }

// Sums of the four 32-bit numbers of each half of four vectors.
inline __m256i sums_of_halves(const __m256i* x) {
  const __m256i ab = _mm256_add_epi32(_mm256_unpacklo_epi32(x[0], x[1]),
                                      _mm256_unpackhi_epi32(x[0], x[1]));
  const __m256i cd = _mm256_add_epi32(_mm256_unpacklo_epi32(x[2], x[3]),
                                      _mm256_unpackhi_epi32(x[2], x[3]));
  return _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
}
#endif

#if defined(__AVX512BW__)
inline __m512i add_products(__m512i sum, __m512i a, __m512i b) {
#if defined(__AVX512VNNI__)
  return _mm512_dpwssd_epi32(sum, a, b);
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}
#endif

// Products of two keys [padded] with `kQueries` queries [padded] each behind the other. `Channels`
// is `padded` where it is known, for then no loop is left.
template <int64_t Channels>
inline PairInts products_of_pair(const int8_t* first, const int8_t* second, const int16_t* queries,
                                 int64_t padded) {
  if (Channels > 0) padded = Channels;
#if defined(__AVX512BW__)
  __m512i wide[2][kQueries] = {};
#pragma GCC unroll 4
  for (int64_t d = 0; d < padded; d += 32) {
    const __m512i a = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)(first + d)));
    const __m512i b = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)(second + d)));
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) {
      const __m512i query = _mm512_loadu_si512(queries + q * padded + d);
      wide[0][q] = add_products(wide[0][q], a, query);
      wide[1][q] = add_products(wide[1][q], b, query);
    }
  }
  __m256i sum[2][kQueries];
  for (int key = 0; key < 2; ++key) {
    for (int q = 0; q < kQueries; ++q) {
      sum[key][q] = _mm256_add_epi32(_mm512_castsi512_si256(wide[key][q]),
                                     _mm512_extracti64x4_epi64(wide[key][q], 1));
    }
  }
#elif defined(__AVX2__)
  __m256i sum[2][kQueries] = {};
#pragma GCC unroll 8
  for (int64_t d = 0; d < padded; d += 16) {
    const __m256i a = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(first + d)));
    const __m256i b = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(second + d)));
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) {
      __m256i query = _mm256_loadu_si256((const __m256i*)(queries + q * padded + d));
      in_register(query);
      sum[0][q] = add_products(sum[0][q], a, query);
      sum[1][q] = add_products(sum[1][q], b, query);
    }
  }
#else
  PairInts result{};
  for (int q = 0; q < kQueries; ++q) {
    int32_t a = 0, b = 0;
    for (int64_t d = 0; d < padded; ++d) {
      a += int32_t{first[d]} * int32_t{queries[q * padded + d]};
      b += int32_t{second[d]} * int32_t{queries[q * padded + d]};
    }
    result[q] = a;
    result[kQueries + q] = b;
  }
  return result;
#endif
#if defined(__AVX2__)
  const __m256i a = sums_of_halves(sum[0]), b = sums_of_halves(sum[1]);
  return (PairInts)_mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20),
                                    _mm256_permute2x128_si256(a, b, 0x31));
#endif
}

// Product of one key [padded] with one query [padded].
inline int32_t product(const int8_t* key, const int16_t* query, int64_t padded) {
#if defined(__AVX2__)
  __m256i sum = _mm256_setzero_si256();
  for (int64_t d = 0; d < padded; d += 16) {
    const __m256i a = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(key + d)));
    sum = add_products(sum, a, _mm256_loadu_si256((const __m256i*)(query + d)));
  }
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1));
  return _mm_cvtsi128_si32(half);
#else
  int32_t sum = 0;
  for (int64_t d = 0; d < padded; ++d) sum += int32_t{key[d]} * int32_t{query[d]};
  return sum;
#endif
}

// The score that both planes give, as every implementation rounds it.
inline float score_of(int32_t high, int32_t low, float scale) {
  return static_cast<float>(int64_t{256} * high + low) * scale;
}

// 256 high + low as an fp32 for each query: at most 38 bits, which fp64 holds, so they are rounded
// once, as `score_of` does.
inline QueryFloats scores_of(QueryInts high, QueryInts low) {
  const QueryDoubles sum = __builtin_convertvector(high, QueryDoubles) * 256.0 +
                           __builtin_convertvector(low, QueryDoubles);
  return __builtin_convertvector(sum, QueryFloats);
}

}  // namespace m3
