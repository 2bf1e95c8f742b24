// What the C++ kernels share: array descriptors, vectors, dtype loads and stores, and the
// one inner product everything is built from.
//
// A result row must not depend by a single bit on what is computed beside it. Therefore every
// output of `multiply_panel` is one chain of fused multiply-adds over k = 0, 1, 2, ..., in lanes of
// its own, whichever tile of rows it is part of.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#include <omp.h>

#if !defined(__GNUC__)
#error "needs the vector extensions of GCC or Clang"
#endif

namespace m3 {

// Also set by a test, to run what has 16 lanes where vectors are shorter.
#if defined(__AVX512F__) && !defined(M3_SIXTEEN_LANES)
#define M3_SIXTEEN_LANES
#endif

// Lanes of the machine's own vectors: compilers turn choices and shuffles of wider ones into scalar
// code and keep no sums in registers. The sums of kRowTile x kPanelVectors fill the register file.
#if defined(M3_SIXTEEN_LANES)
constexpr int64_t kLanes = 16;
constexpr int kRowTile = 8;
constexpr int kPanelVectors = 2;
#elif defined(__aarch64__)
constexpr int64_t kLanes = 4;
constexpr int kRowTile = 5;
constexpr int kPanelVectors = 4;
#else
constexpr int64_t kLanes = 8;
constexpr int kRowTile = 6;
constexpr int kPanelVectors = 2;
#endif
constexpr int64_t kPanel = kPanelVectors * kLanes;
constexpr int64_t kCacheLine = 64 / sizeof(float);

// What the compiler was told of the machine, for a person to read.
inline const char* vector_family() {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  return "AVX-512 with VNNI, 16 lanes";
#elif defined(__AVX512F__)
  return "AVX-512, 16 lanes";
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
  return "AVX2 with FMA and F16C, 8 lanes";
#elif defined(__AVX2__)
  return "AVX2, 8 lanes";
#elif defined(__aarch64__)
  return "NEON, 4 lanes";
#elif defined(__SSE2__)
  return "SSE2, 8 lanes in two vectors";
#else
  return "no vectors that were tried, 8 lanes";
#endif
}

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

enum Dtype : int64_t {
  kFloat32 = 0,
  kBfloat16 = 1,
  kFloat16 = 2,
  kInt32 = 3,
  kInt64 = 4,
  kInt8 = 5,
  kUint8 = 6,
};

// A tensor as the caller describes it; strides count elements. Mirrored in native_build.py.
struct Array {
  void* data;
  int64_t dtype;
  int64_t size[4];
  int64_t stride[4];
};

enum Status : int64_t {
  kOk = 0,
  kOutOfMemory = 1,
  kPageOutsidePool = 2,
  kRowsOutsideQueries = 3,
  kPageTableTooNarrow = 4,
  kSlotOutsidePool = 5,
};

// The first failure seen by any thread, and the offending value.
struct Failure {
  std::atomic<int64_t> status{kOk};
  std::atomic<int64_t> value{0};
  void set(Status code, int64_t bad) {
    int64_t expected = kOk;
    if (status.compare_exchange_strong(expected, code)) value.store(bad);
  }
  int64_t report(int64_t* bad) const {
    *bad = value.load();
    return status.load();
  }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// How many threads to wake, and the amount of work below which one more is not worth waking: a team
// costs microseconds on an idle machine and milliseconds on a busy one. Work counts multiply-adds.
struct Team {
  int64_t threads;
  int64_t work_per_thread;
  int64_t size(int64_t work) const {
    const int64_t useful = work / (work_per_thread > 0 ? work_per_thread : 1);
    return useful < 1 ? 1 : useful < threads ? useful : threads;
  }
};

// Converting an element of a page costs about as much as this many multiply-adds.
constexpr int64_t kConversionWork = 4;

inline int64_t element_size(int64_t dtype) {
  if (dtype == kInt64) return 8;
  if (dtype == kInt8 || dtype == kUint8) return 1;
  return (dtype == kFloat32 || dtype == kInt32) ? 4 : 2;
}

inline const char* element(const Array& array, int64_t offset) {
  return static_cast<const char*>(array.data) + offset * element_size(array.dtype);
}

// Cache-line aligned floats, one equal part per thread.
class Scratch {
 public:
  Scratch(int64_t parts, int64_t floats_per_part)
      : part_(round_up(floats_per_part, kCacheLine)),
        data_(static_cast<float*>(std::aligned_alloc(64, round_up(parts * part_ * 4 + 64, 64)))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* part(int64_t index) const { return data_ + index * part_; }

 private:
  int64_t part_;
  float* data_;
};

template <typename T>
inline T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

template <typename T>
inline void store(void* to, T value) {
  std::memcpy(to, &value, sizeof(T));
}

template <typename To, typename From>
inline To bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

inline Floats splat(float value) { return value - Floats{}; }

#if defined(__clang__)
#define M3_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define M3_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Words{__VA_ARGS__})
#endif

// Turns rows into columns: 4x4 elements within each 128-bit part of a vector, then the parts.
// Shuffles that stay within parts, or move whole ones, are the cheap ones everywhere.
#if defined(M3_SIXTEEN_LANES)
inline void transpose(Words (&x)[kLanes]) {
  Words y[kLanes];
  for (int i = 0; i < 16; i += 2) {
    const Words a = x[i], b = x[i + 1];
    y[i] = M3_SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    y[i + 1] = M3_SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int half = 0; half < 2; ++half) {
      const Words a = y[i + half], b = y[i + half + 2];
      x[i + 2 * half] = M3_SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
      x[i + 2 * half + 1] =
          M3_SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
  }
  for (int c = 0; c < 4; ++c) {
    for (int pair = 0; pair < 2; ++pair) {
      const Words a = x[8 * pair + c], b = x[8 * pair + 4 + c];
      y[8 * pair + c] = M3_SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
      y[8 * pair + 4 + c] =
          M3_SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
  }
  for (int c = 0; c < 4; ++c) {
    for (int half = 0; half < 2; ++half) {
      const Words a = y[4 * half + c], b = y[8 + 4 * half + c];
      x[8 * half + c] = M3_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
      x[8 * half + 4 + c] =
          M3_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    }
  }
}
#elif defined(__aarch64__)
inline void transpose(Words (&x)[kLanes]) {
  Words y[kLanes];
  for (int i = 0; i < 4; i += 2) {
    const Words a = x[i], b = x[i + 1];
    y[i] = M3_SHUFFLE(a, b, 0, 4, 1, 5);
    y[i + 1] = M3_SHUFFLE(a, b, 2, 6, 3, 7);
  }
  for (int half = 0; half < 2; ++half) {
    const Words a = y[half], b = y[half + 2];
    x[2 * half] = M3_SHUFFLE(a, b, 0, 1, 4, 5);
    x[2 * half + 1] = M3_SHUFFLE(a, b, 2, 3, 6, 7);
  }
}
#else
inline void transpose(Words (&x)[kLanes]) {
  Words y[kLanes];
  for (int i = 0; i < 8; i += 2) {
    const Words a = x[i], b = x[i + 1];
    y[i] = M3_SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13);
    y[i + 1] = M3_SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int half = 0; half < 2; ++half) {
      const Words a = y[i + half], b = y[i + half + 2];
      x[i + 2 * half] = M3_SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
      x[i + 2 * half + 1] = M3_SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (int c = 0; c < 4; ++c) {
    const Words a = x[c], b = x[4 + c];
    x[c] = M3_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
    x[4 + c] = M3_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  }
}
#endif

// Brings rows into the cache in the order of their addresses, which the hardware can foresee; the
// packing below reads them in another order, at less than half the speed if they come from memory.
inline void stream_rows(const char* rows, int64_t row_stride, int64_t dtype, int64_t count,
                        int64_t width) {
  const int64_t size = element_size(dtype);
  for (int64_t j = 0; j < count; ++j) {
    const volatile char* row = rows + j * row_stride * size;
    for (int64_t byte = 0; byte < width * size; byte += 64) (void)row[byte];
  }
}

// Exact: shift the fields into place, then rescale the exponent; infinity and NaN need its top
// value.
inline Floats widen_float16(Words half) {
  const Words magnitude = (half & 0x7fffu) << 13;
  const Floats scaled = bits<Floats>(magnitude) * 0x1p112f;
  const Words special = (Words)((half & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return bits<Floats>(bits<Words>(scaled) | special | ((half & 0x8000u) << 16));
}

inline Floats widen(Words half, int64_t dtype) {
  return dtype == kBfloat16 ? bits<Floats>(half << 16) : widen_float16(half);
}

inline Floats load_as_float(const char* from, int64_t dtype) {
  if (dtype == kFloat32) return load<Floats>(from);
  return widen(__builtin_convertvector(load<Halves>(from), Words), dtype);
}

inline float load_one_as_float(const char* from, int64_t dtype) {
  if (dtype == kFloat32) return load<float>(from);
  if (dtype == kInt8) return load<int8_t>(from);
  return widen(Words{} + static_cast<uint32_t>(load<uint16_t>(from)), dtype)[0];
}

// Round to nearest, ties to even; NaN stays NaN.
inline Words narrow_bfloat16(Floats value) {
  const Words raw = bits<Words>(value);
  const Words rounded = (raw + 0x7fffu + ((raw >> 16) & 1u)) >> 16;
  return value == value ? rounded : ((raw >> 16) | 0x40u);
}

inline Words narrow_float16(Floats value) {
  const Words raw = bits<Words>(value);
  const Words sign = (raw >> 16) & 0x8000u;
  const Words magnitude = raw & 0x7fffffffu;
  const Words normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding one half aligns the bits of a subnormal result with the end of the fraction.
  const Words small = bits<Words>(bits<Floats>(magnitude) + 0.5f) - 0x3f000000u;
  const Words overflow = magnitude > 0x7f800000u ? (Words{} + 0x7e00u) : (Words{} + 0x7c00u);
  Words result = magnitude < (113u << 23) ? small : normal;
  result = magnitude >= (143u << 23) ? overflow : result;
  return result | sign;
}

inline void store_floats(char* to, int64_t dtype, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = count - i < kLanes ? count - i : kLanes;
    Floats value{};
    std::memcpy(&value, from + i, n * 4);
    if (dtype == kFloat32) {
      std::memcpy(to + i * 4, &value, n * 4);
    } else {
      const Words wide = dtype == kBfloat16 ? narrow_bfloat16(value) : narrow_float16(value);
      const Halves half = __builtin_convertvector(wide, Halves);
      std::memcpy(to + i * 2, &half, n * 2);
    }
  }
}

inline void load_floats(float* to, const char* from, int64_t dtype, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store(to + i, load_as_float(from + i * element_size(dtype), dtype));
  }
  for (; i < count; ++i) to[i] = load_one_as_float(from + i * element_size(dtype), dtype);
}

inline float reduce_max(Floats v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// A fixed tree, so that the sum is the same wherever it is taken.
inline float reduce_sum(Floats v) {
  float x[kLanes];
  store(x, v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  }
  return x[0];
}

inline Floats lane_numbers() {
  Floats numbers{};
  for (int i = 0; i < kLanes; ++i) numbers[i] = static_cast<float>(i);
  return numbers;
}

// All ones in the lanes below `count`.
inline Ints first_lanes(int64_t count) {
  const int64_t clamped = count < 0 ? 0 : count > kLanes ? kLanes : count;
  return lane_numbers() < splat(static_cast<float>(clamped));
}

// e^x for x <= 0 within two units in the last place; NaN stays NaN. Below the smallest normal
// number: 0. Polynomial: Cephes expf.
inline Floats exp_nonpositive(Floats x) {
  const Floats lowest = splat(-87.0f);
  const Floats clamped = x < lowest ? lowest : x;
  const Floats shifted = clamped * 1.44269504088896341f + 12582912.0f;
  const Floats n = shifted - 12582912.0f;
  Floats r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Floats p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // The low bits of `shifted` hold n; as a power of two they go to the exponent field.
  const Words exponent = (bits<Words>(shifted) - 0x4b400000u + 127u) << 23;
  const Floats result = p * bits<Floats>(exponent);
  return x < lowest ? Floats{} : result;
}

inline float exp_nonpositive(float x) { return exp_nonpositive(splat(x))[0]; }

// Keys to columns: panel[d * kPanel + j] = key j, channel d, as float; absent keys are zero.
inline void pack_keys(float* panel, const char* keys, int64_t key_stride, int64_t dtype,
                      int64_t count, int64_t dim) {
  const int64_t size = element_size(dtype);
  const int64_t step = sizeof(Words) / size;
  for (int64_t group = 0; group < kPanel; group += kLanes) {
    const int64_t present = count - group < kLanes ? count - group : kLanes;
    float* column = panel + group;
    if (present <= 0) {
      for (int64_t d = 0; d < dim; ++d) store(column + d * kPanel, Floats{});
      continue;
    }
    const char* first = keys + group * key_stride * size;
    int64_t d = 0;
    for (; d + step <= dim; d += step) {
      Words x[kLanes];
      for (int64_t j = 0; j < kLanes; ++j) {
        x[j] = j < present ? load<Words>(first + (j * key_stride + d) * size) : Words{};
      }
      transpose(x);
      if (dtype == kFloat32) {
        for (int64_t i = 0; i < kLanes; ++i) store(column + (d + i) * kPanel, x[i]);
      } else if (dtype == kInt8) {
        for (int64_t i = 0; i < kLanes; ++i) {
          for (int byte = 0; byte < 4; ++byte) {
            const Ints value = bits<Ints>(x[i] << (24 - 8 * byte)) >> 24;
            store(column + (d + 4 * i + byte) * kPanel, __builtin_convertvector(value, Floats));
          }
        }
      } else {
        for (int64_t i = 0; i < kLanes; ++i) {
          float* pair = column + (d + 2 * i) * kPanel;
          store(pair, widen(x[i] & 0xffffu, dtype));
          store(pair + kPanel, widen(x[i] >> 16, dtype));
        }
      }
    }
    for (; d < dim; ++d) {
      for (int64_t j = 0; j < kLanes; ++j) {
        const char* from = first + (j * key_stride + d) * size;
        column[d * kPanel + j] = j < present ? load_one_as_float(from, dtype) : 0.0f;
      }
    }
  }
}

// Rows stay rows: panel[j * kPanel + i] = row j, column i of `width` columns, as float.
inline void pack_rows(float* panel, const char* rows, int64_t row_stride, int64_t dtype,
                      int64_t count, int64_t width) {
  const int64_t size = element_size(dtype);
  for (int64_t j = 0; j < count; ++j) {
    const char* from = rows + j * row_stride * size;
    float* to = panel + j * kPanel;
    if (width < kPanel) std::memset(to, 0, kPanel * 4);
    load_floats(to, from, dtype, width);
  }
}

template <int Rows>
inline void multiply_rows(const float* const* a, const float* panel, int64_t depth,
                          float* const* c) {
  Floats sum[Rows][kPanelVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Floats b[kPanelVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kPanelVectors; ++v) b[v] = load<Floats>(panel + k * kPanel + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Floats x = splat(a[r][k]);
#pragma GCC unroll 8
      for (int v = 0; v < kPanelVectors; ++v) sum[r][v] += x * b[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kPanelVectors; ++v) store(c[r] + v * kLanes, sum[r][v]);
  }
}

// c[r][0:kPanel] = sum over k of a[r][k] * panel[k][0:kPanel], for every row r.
inline void multiply_panel(const float* const* a, int64_t rows, const float* panel, int64_t depth,
                           float* const* c) {
  int64_t r = 0;
  for (; r + kRowTile <= rows; r += kRowTile) {
    if (kRowTile == 6 && rows - r == 10) {  // two of five are faster than six and four
      multiply_rows<5>(a + r, panel, depth, c + r);
      multiply_rows<5>(a + r + 5, panel, depth, c + r + 5);
      return;
    }
    multiply_rows<kRowTile>(a + r, panel, depth, c + r);
  }
  if (kRowTile > 4 && r + 4 <= rows) {
    multiply_rows<4>(a + r, panel, depth, c + r);
    r += 4;
  }
  if (r + 2 <= rows) {
    multiply_rows<2>(a + r, panel, depth, c + r);
    r += 2;
  }
  if (r < rows) multiply_rows<1>(a + r, panel, depth, c + r);
}

// The tensors which describe a step; layouts in kernels/README.md.
struct Batch {
  const Array& page_table;
  const Array& cu_seqlens_q;
  const Array& seq_lens;

  int64_t requests() const { return seq_lens.size[0]; }
  int64_t first_row(int64_t request) const { return load<int32_t>(element(cu_seqlens_q, request)); }
  int64_t seq_len(int64_t request) const { return load<int32_t>(element(seq_lens, request)); }
  int64_t page(int64_t request, int64_t block) const {
    return load<int32_t>(element(page_table, request * page_table.stride[0] + block));
  }
  int64_t max_pages() const { return page_table.size[1]; }

  // Query rows of a request that see at least one key, and the position of the first of them.
  struct Rows {
    int64_t first, last, position;
  };
  Rows visible_rows(int64_t request) const {
    const int64_t first = first_row(request), last = first_row(request + 1);
    const int64_t length = seq_len(request);
    const int64_t from = last - first > length ? last - (length > 0 ? length : 0) : first;
    return {from, last, length - (last - from)};
  }
  bool rows_inside(int64_t rows, Failure& failure) const {
    for (int64_t r = 0; r <= requests(); ++r) {
      const int64_t bound = first_row(r);
      if (bound < 0 || bound > rows || (r > 0 && bound < first_row(r - 1))) {
        failure.set(kRowsOutsideQueries, bound);
        return false;
      }
    }
    return true;
  }
};

}  // namespace m3
