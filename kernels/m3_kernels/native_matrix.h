// Products with weights that stay in their stored codes: StoredMatrix of stored_matrix.py.
//
// Every result is kLanes chains of fused multiply-adds, chain j over the columns j, kLanes + j,
// 2 kLanes + j, ..., and the fixed tree of `reduce_sum` over them, whether the weights are decoded
// in registers (few rows of x) or once for a tile of rows (many). So a row's bits do not depend on
// the rows beside it.
#pragma once

#include "native_common.h"

#include <algorithm>
#include <array>
#include <vector>

#if defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace m3 {

// Columns decoded at once; groups are multiples of it.
constexpr int64_t kUnit = 16;
constexpr int kUnitVectors = kUnit / kLanes;

// Weight rows of one work item at most: the sums and x of kManyRows rows stay in the second cache.
constexpr int64_t kTileRows = 64;
// Weight rows of one work item of few rows of x, which has no sums to keep.
constexpr int64_t kFewTileRows = 16;
// Weight rows and columns decoded at once for many rows of x: 16 KiB of floats.
constexpr int64_t kStrip = 16;
constexpr int64_t kChunk = 256;
// Rows of x whose sums are kept while the weights are walked once.
constexpr int64_t kManyRows = 96;
// Up to so many rows of x the weights are decoded in registers and never stored.
constexpr int64_t kFewRows = 4;

// Weight rows of one work item for so many rows of x.
inline int64_t tile_rows(int64_t rows) { return rows <= kFewRows ? kFewTileRows : kTileRows; }

enum Kind : int64_t {
  kPlain = 0,
  kMxfp8 = 1,
  kFp8 = 2,
  kMxfp4 = 3,
  kNvfp4 = 4,
  kInt4 = 5,
  // plain numbers of two bytes, as their dtype says
  kPlainBfloat16 = 6,
  kPlainFloat16 = 7,
};

constexpr bool is_plain(int64_t kind) { return kind == kPlain || kind > kInt4; }

struct Matrix {
  const Array& codes;
  const Array* scales;
  const Array* zeros;
  const Array* factors;
  int64_t kind;
  int64_t group;

  bool four_bits() const { return kind == kMxfp4 || kind == kNvfp4 || kind == kInt4; }
  int64_t groups() const { return codes.size[0]; }
  int64_t rows() const { return codes.size[1]; }
  int64_t columns() const { return codes.size[2] * (four_bits() ? 2 : 1); }
};

// One rounding, told to the compiler: it contracts `a * b + c` in some loops and not in others.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return bits<Floats>(_mm512_fmadd_ps(bits<__m512>(a), bits<__m512>(b), bits<__m512>(c)));
#elif defined(__FMA__) && defined(__F16C__)
  return bits<Floats>(_mm256_fmadd_ps(bits<__m256>(a), bits<__m256>(b), bits<__m256>(c)));
#elif defined(__aarch64__)
  return bits<Floats>(
      vfmaq_f32(bits<float32x4_t>(c), bits<float32x4_t>(a), bits<float32x4_t>(b)));
#else
  for (int i = 0; i < kLanes; ++i) c[i] = std::fma(a[i], b[i], c[i]);
  return c;
#endif
}

inline float decode_e4m3(uint32_t code) {
  const uint32_t half = ((code & 0x80u) << 8) | ((code & 0x7fu) << 7);
  return widen_float16(Words{} + half)[0] * 256.0f;
}

struct E4m3Table {
  float values[256];
  E4m3Table() {
    for (uint32_t code = 0; code < 256; ++code) values[code] = decode_e4m3(code);
  }
};

// 2 ** (stored - 127); 0 is a subnormal.
inline float power_of_two(uint8_t stored) {
  return bits<float>(stored == 0 ? 1u << 22 : static_cast<uint32_t>(stored) << 23);
}

// One row of a matrix of that kind.
template <int64_t kind>
struct WeightRow {
  const uint8_t* codes;
  const char* scales;
  const uint8_t* zeros;
  float factor;
  int64_t dtype;  // of scales

  WeightRow() = default;
  WeightRow(const Matrix& m, int64_t group, int64_t row) {
    const int64_t at = group * m.codes.size[1] + row;
    codes = reinterpret_cast<const uint8_t*>(element(m.codes, at * m.codes.size[2]));
    scales = m.scales == nullptr ? nullptr : element(*m.scales, at * m.scales->size[2]);
    zeros = m.zeros == nullptr
                ? nullptr
                : reinterpret_cast<const uint8_t*>(element(*m.zeros, at * m.zeros->size[2]));
    factor = m.factors == nullptr ? 1.0f : load<float>(element(*m.factors, at));
    dtype = is_plain(kind) ? m.codes.dtype : m.scales->dtype;
  }

  // What the numbers of `decode` are to be multiplied by. It holds the power of two by which those
  // differ from the codes' values: 256 for e4m3 read as fp16, 1/2 for e2m1 read as integers.
  float scale(int64_t group) const {
    if constexpr (kind == kMxfp8) return power_of_two(scales[group]) * 256.0f;
    if constexpr (kind == kFp8) return load<float>(scales + 4 * group) * 256.0f;
    if constexpr (kind == kMxfp4) return power_of_two(scales[group]) * 0.5f;
    if constexpr (kind == kNvfp4) {
      static const E4m3Table table;
      return table.values[static_cast<uint8_t>(scales[group])] * factor * 0.5f;
    }
    if constexpr (kind == kInt4) {
      return load_one_as_float(scales + group * element_size(dtype), dtype);
    }
    return 1.0f;
  }

  int zero(int64_t group) const {
    if constexpr (kind == kInt4) return zeros == nullptr ? 8 : zeros[group];
    return 0;
  }

  static constexpr int64_t bytes(int64_t columns) {
    if constexpr (kind == kPlain) return 4 * columns;
    if constexpr (is_plain(kind)) return 2 * columns;
    return kind >= kMxfp4 ? columns / 2 : columns;
  }

  // The row that many bytes behind this one is read next: hardware foresees no further than a page,
  // and starts anew with each row.
  void prefetch(int64_t column, int64_t ahead) const {
    const int64_t at = bytes(column);
    if (at % 64 == 0) __builtin_prefetch(codes + at + ahead, 0, 2);
  }

  void decode(int64_t column, float scale, int zero, Floats (&to)[kUnitVectors]) const {
    if constexpr (is_plain(kind)) {
      constexpr int64_t own = kind == kPlain           ? kFloat32
                              : kind == kPlainBfloat16 ? kBfloat16
                                                       : kFloat16;
      const char* from = reinterpret_cast<const char*>(codes) + column * (own == kFloat32 ? 4 : 2);
      for (int v = 0; v < kUnitVectors; ++v) {
#if (defined(__FMA__) && defined(__F16C__)) || defined(__aarch64__)
        if constexpr (own == kFloat16) {
          to[v] = widen_halves(from + v * kLanes * 2);
          continue;
        }
#endif
        to[v] = load_as_float(from + v * kLanes * (own == kFloat32 ? 4 : 2), own);
      }
    } else if constexpr (kind == kMxfp8 || kind == kFp8) {
      decode_e4m3_unit(codes + column, scale, to);
    } else {
      decode_nibble_unit(codes + column / 2, scale, zero, to);
    }
  }

 private:
#if defined(__FMA__) && defined(__F16C__)
  static Floats widen_halves(const char* from) {
#if defined(__AVX512F__)
    return bits<Floats>(_mm512_cvtph_ps(load<__m256i>(from)));
#else
    return bits<Floats>(_mm256_cvtph_ps(load<__m128i>(from)));
#endif
  }

  // A byte moved below the sign bit of an fp16 is the number divided by 256.
  static void decode_e4m3_unit(const uint8_t* from, float scale, Floats (&to)[kUnitVectors]) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m256i high = _mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8);
    const __m256i keep = _mm256_set1_epi16(static_cast<int16_t>(0xbfff));
    const __m256i halves = _mm256_and_si256(_mm256_srai_epi16(high, 1), keep);
#if defined(__AVX512F__)
    to[0] = bits<Floats>(_mm512_cvtph_ps(halves)) * scale;
#else
    to[0] = bits<Floats>(_mm256_cvtph_ps(_mm256_castsi256_si128(halves))) * scale;
    to[1] = bits<Floats>(_mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))) * scale;
#endif
  }

  static void decode_nibble_unit(const uint8_t* from, float scale, int zero,
                                 Floats (&to)[kUnitVectors]) {
    const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    const __m128i mask = _mm_set1_epi8(15);
    const __m128i even = _mm_and_si128(packed, mask);
    const __m128i odd = _mm_and_si128(_mm_srli_epi16(packed, 4), mask);
    __m128i values = _mm_unpacklo_epi8(even, odd);
    if constexpr (kind == kInt4) {
      values = _mm_sub_epi8(values, _mm_set1_epi8(static_cast<int8_t>(zero)));
    } else {
      values = _mm_shuffle_epi8(
          _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), values);
    }
#if defined(__AVX512F__)
    to[0] = bits<Floats>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(values))) * scale;
#else
    const __m256i low = _mm256_cvtepi8_epi32(values);
    const __m256i high = _mm256_cvtepi8_epi32(_mm_srli_si128(values, 8));
    to[0] = bits<Floats>(_mm256_cvtepi32_ps(low)) * scale;
    to[1] = bits<Floats>(_mm256_cvtepi32_ps(high)) * scale;
#endif
  }
#elif defined(__aarch64__)
  static Floats widen_halves(const char* from) {
    return bits<Floats>(vcvt_f32_f16(load<float16x4_t>(from)));
  }

  // A byte moved below the sign bit of an fp16 is the number divided by 256.
  static void decode_e4m3_unit(const uint8_t* from, float scale, Floats (&to)[kUnitVectors]) {
    const uint8x16_t bytes = vld1q_u8(from);
    const uint8x8_t parts[2] = {vget_low_u8(bytes), vget_high_u8(bytes)};
    for (int half = 0; half < 2; ++half) {
      const int16x8_t high = vreinterpretq_s16_u16(vshll_n_u8(parts[half], 8));
      const int16x8_t moved = vandq_s16(vshrq_n_s16(high, 1), vdupq_n_s16(int16_t(0xbfff)));
      const float16x8_t halves = vreinterpretq_f16_s16(moved);
      to[2 * half] = bits<Floats>(vcvt_f32_f16(vget_low_f16(halves))) * scale;
      to[2 * half + 1] = bits<Floats>(vcvt_f32_f16(vget_high_f16(halves))) * scale;
    }
  }

  static void decode_nibble_unit(const uint8_t* from, float scale, int zero,
                                 Floats (&to)[kUnitVectors]) {
    static constexpr int8_t kTwice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    const uint8x8_t packed = vld1_u8(from);
    const uint8x8_t even = vand_u8(packed, vdup_n_u8(15)), odd = vshr_n_u8(packed, 4);
    const uint8x16_t codes = vcombine_u8(vzip1_u8(even, odd), vzip2_u8(even, odd));
    const int8x16_t values = kind == kInt4
                                 ? vsubq_s8(vreinterpretq_s8_u8(codes), vdupq_n_s8(int8_t(zero)))
                                 : vqtbl1q_s8(vld1q_s8(kTwice), codes);
    const int8x8_t parts[2] = {vget_low_s8(values), vget_high_s8(values)};
    for (int half = 0; half < 2; ++half) {
      const int16x8_t wide = vmovl_s8(parts[half]);
      to[2 * half] = bits<Floats>(vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)))) * scale;
      to[2 * half + 1] = bits<Floats>(vcvtq_f32_s32(vmovl_s16(vget_high_s16(wide)))) * scale;
    }
  }
#else
  static void decode_e4m3_unit(const uint8_t* from, float scale, Floats (&to)[kUnitVectors]) {
    for (int v = 0; v < kUnitVectors; ++v) {
      Words half;
      for (int i = 0; i < kLanes; ++i) {
        const uint32_t code = from[v * kLanes + i];
        half[i] = ((code & 0x80u) << 8) | ((code & 0x7fu) << 7);
      }
      to[v] = widen_float16(half) * scale;
    }
  }

  static void decode_nibble_unit(const uint8_t* from, float scale, int zero,
                                 Floats (&to)[kUnitVectors]) {
    static constexpr int kTwice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    for (int v = 0; v < kUnitVectors; ++v) {
      Ints values;
      for (int i = 0; i < kLanes; ++i) {
        const int at = v * kLanes + i;
        const int code = (from[at / 2] >> (4 * (at % 2))) & 15;
        values[i] = kind == kInt4 ? code - zero : kTwice[code];
      }
      to[v] = __builtin_convertvector(values, Floats) * scale;
    }
  }
#endif
};

// sums[m][n] of Rows rows of x and Weights weight rows, decoded in registers.
template <int64_t kind, int Rows, int Weights>
inline void dot_in_registers(const WeightRow<kind>* weights, const float* const* x,
                             int64_t columns, int64_t group, float* sums) {
  Floats sum[Rows][Weights] = {};
  const int64_t ahead = Weights * WeightRow<kind>::bytes(columns);
  for (int64_t begin = 0, g = 0; begin < columns; begin += group, ++g) {
    const int64_t end = std::min(columns, begin + group);
    float scale[Weights];
    int zero[Weights];
#pragma GCC unroll 4
    for (int n = 0; n < Weights; ++n) {
      scale[n] = weights[n].scale(g);
      zero[n] = weights[n].zero(g);
    }
    for (int64_t column = begin; column < end; column += kUnit) {
#pragma GCC unroll 4
      for (int n = 0; n < Weights; ++n) {
        Floats w[kUnitVectors];
        weights[n].prefetch(column, ahead);
        weights[n].decode(column, scale[n], zero[n], w);
#pragma GCC unroll 4
        for (int m = 0; m < Rows; ++m) {
#pragma GCC unroll 4
          for (int v = 0; v < kUnitVectors; ++v) {
            sum[m][n] = multiply_add(load<Floats>(x[m] + column + v * kLanes), w[v], sum[m][n]);
          }
        }
      }
    }
  }
  for (int m = 0; m < Rows; ++m) {
    for (int n = 0; n < Weights; ++n) sums[m * kTileRows + n] = reduce_sum(sum[m][n]);
  }
}

// GCC would read x again for each weight: more loads than the processor has time for.
inline Floats in_register(Floats value) {
#if defined(__AVX2__)
  __asm__("" : "+v"(value));
#endif
  return value;
}

// sum[m][n] += over the decoded columns of a chunk.
template <int Rows, int Weights>
inline void dot_decoded(const float* const* x, const float* decoded, int64_t width, Floats* sums) {
  Floats sum[Rows][Weights];
#pragma GCC unroll 6
  for (int m = 0; m < Rows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < Weights; ++n) sum[m][n] = sums[m * kTileRows + n];
  }
  for (int64_t column = 0; column < width; column += kLanes) {
    Floats a[Rows];
#pragma GCC unroll 6
    for (int m = 0; m < Rows; ++m) a[m] = in_register(load<Floats>(x[m] + column));
#pragma GCC unroll 4
    for (int n = 0; n < Weights; ++n) {
      const Floats w = in_register(load<Floats>(decoded + n * kChunk + column));
#pragma GCC unroll 6
      for (int m = 0; m < Rows; ++m) sum[m][n] = multiply_add(a[m], w, sum[m][n]);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < Rows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < Weights; ++n) sums[m * kTileRows + n] = sum[m][n];
  }
}

// `reduce_sum` of kLanes vectors.
inline Floats reduce_sums(const Floats* vectors) {
  Words turned[kLanes];
  for (int i = 0; i < kLanes; ++i) turned[i] = bits<Words>(vectors[i]);
  transpose(turned);
  Floats x[kLanes];
  for (int i = 0; i < kLanes; ++i) x[i] = bits<Floats>(turned[i]);
#pragma GCC unroll 4
  for (int width = kLanes / 2; width > 0; width /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  }
  return x[0];
}

// What one thread needs for `multiply_tile`.
class TileWorkspace {
 public:
  // rows: of x at once, at most
  explicit TileWorkspace(int64_t rows)
      : kept_(std::min(rows, kManyRows) * kTileRows),
        scratch_(1, kept_ + (rows <= kFewRows ? 0 : kept_ * kLanes + (kStrip + kManyRows) * kChunk)) {}
  // [rows][kTileRows]
  float* results() { return scratch_.part(0); }
  Floats* sums() { return reinterpret_cast<Floats*>(results() + kept_); }
  // [kStrip][kChunk]
  float* decoded() { return results() + kept_ * (kLanes + 1); }
  // [kManyRows][kChunk]: of x, side by side whatever its stride is
  float* input() { return decoded() + kStrip * kChunk; }

 private:
  int64_t kept_;
  Scratch scratch_;
};

// results[m][n] = x[m] . weights[n] for at most kManyRows rows and kTileRows weight rows.
template <int64_t kind>
void multiply_tile_of(const Matrix& matrix, int64_t group, const int64_t* weight_rows,
                      int64_t count, const float* const* x, int64_t rows, TileWorkspace& w) {
  const int64_t columns = matrix.columns();
  const int64_t per_scale = is_plain(kind) ? columns : matrix.group;
  std::array<WeightRow<kind>, kTileRows> weights;
  for (int64_t n = 0; n < count; ++n) {
    weights[n] = WeightRow<kind>(matrix, group, weight_rows[n]);
  }
  float* results = w.results();
  if (rows <= kFewRows) {
    const auto few = [&](auto rows_at_once, auto weights_at_once) {
      constexpr int kRows = decltype(rows_at_once)::value;
      constexpr int kWeights = decltype(weights_at_once)::value;
      for (int64_t n = 0; n < count; n += kWeights) {
        if (n + kWeights > count) {
          // the last weight once more: its results are nobody's
          for (int64_t i = count; i < n + kWeights; ++i) weights[i] = weights[count - 1];
        }
        dot_in_registers<kind, kRows, kWeights>(&weights[n], x, columns, per_scale, results + n);
      }
    };
    using std::integral_constant;
    if (rows == 1) few(integral_constant<int, 1>{}, integral_constant<int, 4>{});
    if (rows == 2) few(integral_constant<int, 2>{}, integral_constant<int, 4>{});
    if (rows == 3) few(integral_constant<int, 3>{}, integral_constant<int, 2>{});
    if (rows == 4) few(integral_constant<int, 4>{}, integral_constant<int, 2>{});
    return;
  }
  // as many sums as registers hold
  constexpr int kRowsAtOnce = kLanes == 8 ? 3 : 6;
  Floats* sums = w.sums();
  float* decoded = w.decoded();
  float* input = w.input();
  std::fill(sums, sums + rows * kTileRows, Floats{});
  for (int64_t begin = 0; begin < columns; begin += kChunk) {
    const int64_t width = std::min(kChunk, columns - begin);
    for (int64_t m = 0; m < rows; ++m) {
      std::memcpy(input + m * kChunk, x[m] + begin, width * sizeof(float));
    }
    for (int64_t strip = 0; strip < count; strip += kStrip) {
      const int64_t here = std::min(kStrip, count - strip), padded = round_up(here, 4);
      for (int64_t n = 0; n < padded; ++n) {
        float* to = decoded + n * kChunk;
        if (n >= here) {
          std::fill(to, to + width, 0.0f);
          continue;
        }
        const WeightRow<kind>& weight = weights[strip + n];
        for (int64_t column = begin; column < begin + width;) {
          const int64_t g = column / per_scale;
          const int64_t end = std::min(begin + width, (g + 1) * per_scale);
          const float scale = weight.scale(g);
          const int zero = weight.zero(g);
          for (; column < end; column += kUnit) {
            Floats unit[kUnitVectors];
            weight.decode(column, scale, zero, unit);
            for (int v = 0; v < kUnitVectors; ++v) store(to + column - begin + v * kLanes, unit[v]);
          }
        }
      }
      const float* part[kRowsAtOnce];
      int64_t m = 0;
      for (; m + kRowsAtOnce <= rows; m += kRowsAtOnce) {
        for (int i = 0; i < kRowsAtOnce; ++i) part[i] = input + (m + i) * kChunk;
        Floats* sum = sums + m * kTileRows + strip;
        for (int64_t n = 0; n < padded; n += 4) {
          dot_decoded<kRowsAtOnce, 4>(part, decoded + n * kChunk, width, sum + n);
        }
      }
      for (; m < rows; ++m) {
        part[0] = input + m * kChunk;
        Floats* sum = sums + m * kTileRows + strip;
        for (int64_t n = 0; n < padded; n += 4) {
          dot_decoded<1, 4>(part, decoded + n * kChunk, width, sum + n);
        }
      }
    }
  }
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < count; n += kLanes) {
      store(results + m * kTileRows + n, reduce_sums(sums + m * kTileRows + n));
    }
  }
}

inline void multiply_tile(const Matrix& matrix, int64_t group, const int64_t* weight_rows,
                          int64_t count, const float* const* x, int64_t rows, TileWorkspace& w) {
  switch (matrix.kind) {
    case kPlain:
      switch (matrix.codes.dtype) {
        case kBfloat16:
          return multiply_tile_of<kPlainBfloat16>(matrix, group, weight_rows, count, x, rows, w);
        case kFloat16:
          return multiply_tile_of<kPlainFloat16>(matrix, group, weight_rows, count, x, rows, w);
        default:
          return multiply_tile_of<kPlain>(matrix, group, weight_rows, count, x, rows, w);
      }
    case kMxfp8:
      return multiply_tile_of<kMxfp8>(matrix, group, weight_rows, count, x, rows, w);
    case kFp8:
      return multiply_tile_of<kFp8>(matrix, group, weight_rows, count, x, rows, w);
    case kMxfp4:
      return multiply_tile_of<kMxfp4>(matrix, group, weight_rows, count, x, rows, w);
    case kNvfp4:
      return multiply_tile_of<kNvfp4>(matrix, group, weight_rows, count, x, rows, w);
    default:
      return multiply_tile_of<kInt4>(matrix, group, weight_rows, count, x, rows, w);
  }
}

// Rows of x as fp32: as they lie if they are, else widened once by all threads.
class FloatRows {
 public:
  FloatRows(const Array& x, int64_t threads) {
    const int64_t rows = x.size[0], columns = x.size[1];
    pointers_.resize(rows);
    if (x.dtype == kFloat32) {
      for (int64_t t = 0; t < rows; ++t) {
        pointers_[t] = reinterpret_cast<const float*>(element(x, t * x.stride[0]));
      }
      return;
    }
    wide_ = std::make_unique<Scratch>(rows, columns);
#pragma omp parallel for num_threads(static_cast<int>(threads))
    for (int64_t t = 0; t < rows; ++t) {
      load_floats(wide_->part(t), element(x, t * x.stride[0]), x.dtype, columns);
      pointers_[t] = wide_->part(t);
    }
  }
  const float* row(int64_t t) const { return pointers_[t]; }
  const float* const* rows() const { return pointers_.data(); }

 private:
  std::unique_ptr<Scratch> wide_;
  std::vector<const float*> pointers_;
};

}  // namespace m3
