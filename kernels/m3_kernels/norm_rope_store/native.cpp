// Norm and RoPE of a layer's heads: q, k, index q and index k in one call, one token after another.
#include "native_common.h"

namespace m3 {
namespace {

// Heads of one kind: [T, heads, dim], what multiplies them, and where they go.
struct Part {
  const Array& heads;
  const Array& weight;
  const Array& out;

  int64_t count() const { return heads.size[1]; }
  int64_t dim() const { return heads.size[2]; }
  int64_t padded_dim() const { return round_up(dim(), kLanes); }
};

// 1 + w, zeros behind it.
void load_factors(float* to, const Part& part) {
  load_floats(to, element(part.weight, 0), part.weight.dtype, part.dim());
  for (int64_t c = 0; c < part.dim(); ++c) to[c] += 1.0f;
  for (int64_t c = part.dim(); c < part.padded_dim(); ++c) to[c] = 0.0f;
}

// One head. `x` holds padded_dim floats; cosines and sines have `half` numbers each.
void norm_and_rope(const Part& part, int64_t token, int64_t head, const float* factors,
                   const float* cosines, const float* sines, int64_t half, float eps, float* x) {
  const int64_t dim = part.dim(), padded = part.padded_dim();
  const Array& from = part.heads;
  load_floats(x, element(from, token * from.stride[0] + head * from.stride[1]), from.dtype, dim);
  for (int64_t c = dim; c < padded; ++c) x[c] = 0.0f;
  Floats squares{};
  for (int64_t c = 0; c < padded; c += kLanes) {
    const Floats value = load<Floats>(x + c);
    squares = squares + value * value;
  }
  const float inverse = 1.0f / std::sqrt(reduce_sum(squares) / static_cast<float>(dim) + eps);
  for (int64_t c = 0; c < padded; ++c) x[c] = x[c] * inverse * factors[c];
  for (int64_t c = 0; c < half; ++c) {
    const float first = x[c], second = x[half + c];
    x[c] = first * cosines[c] - second * sines[c];
    x[half + c] = second * cosines[c] + first * sines[c];
  }
  const Array& to = part.out;
  store_floats(const_cast<char*>(element(to, token * to.stride[0] + head * to.stride[1])),
               to.dtype, x, dim);
}

}  // namespace
}  // namespace m3

extern "C" int64_t m3_norm_and_rope(
    const m3::Array* q, const m3::Array* q_weight, const m3::Array* q_out, const m3::Array* k,
    const m3::Array* k_weight, const m3::Array* k_out, const m3::Array* index_q,
    const m3::Array* index_q_weight, const m3::Array* index_q_out, const m3::Array* index_k,
    const m3::Array* index_k_weight, const m3::Array* index_k_out, const m3::Array* cos_sin,
    float eps, int64_t threads, int64_t work_per_thread, int64_t*) {
  using namespace m3;
  const Part parts[] = {{*q, *q_weight, *q_out},
                        {*k, *k_weight, *k_out},
                        {*index_q, *index_q_weight, *index_q_out},
                        {*index_k, *index_k_weight, *index_k_out}};
  const int64_t tokens = cos_sin->size[0], rotary = cos_sin->size[1], half = rotary / 2;
  int64_t elements = 0, widest = 0, all_factors = 0;
  for (const Part& part : parts) {
    elements += tokens * part.count() * part.dim();
    widest = part.padded_dim() > widest ? part.padded_dim() : widest;
    all_factors += part.padded_dim();
  }
  const Team team{threads, work_per_thread};
  const int members_wanted = static_cast<int>(team.size(elements * 2 * kConversionWork));
  try {
    const Scratch shared(1, all_factors);
    float* const factors = shared.part(0);
    float* next = factors;
    for (const Part& part : parts) {
      load_factors(next, part);
      next += part.padded_dim();
    }
    const Scratch scratch(members_wanted, widest + rotary);
#pragma omp parallel num_threads(members_wanted)
    {
      const int64_t members = omp_get_num_threads(), thread = omp_get_thread_num();
      float* const head_floats = scratch.part(thread);
      float* const angles = head_floats + widest;
      for (int64_t t = tokens * thread / members; t < tokens * (thread + 1) / members; ++t) {
        load_floats(angles, element(*cos_sin, t * cos_sin->stride[0]), cos_sin->dtype, rotary);
        const float* own = factors;
        for (const Part& part : parts) {
          for (int64_t head = 0; head < part.count(); ++head) {
            norm_and_rope(part, t, head, own, angles, angles + half, half, eps, head_floats);
          }
          own += part.padded_dim();
        }
      }
    }
  } catch (const std::bad_alloc&) {
    return kOutOfMemory;
  }
  return kOk;
}
