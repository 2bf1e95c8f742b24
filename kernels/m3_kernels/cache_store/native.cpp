// cache_store: copies whole rows of one dtype into their pages; the caller has cast them.
#include "native_common.h"

namespace m3 {
namespace {

void copy_row(const Array& from, int64_t source, const Array& to, int64_t target, int64_t count) {
  std::memcpy(const_cast<char*>(element(to, target)), element(from, source),
              count * element_size(to.dtype));
}

}  // namespace
}  // namespace m3

extern "C" int64_t m3_cache_store(const m3::Array* k, const m3::Array* v, const m3::Array* index_k,
                                  const m3::Array* k_pages, const m3::Array* v_pages,
                                  const m3::Array* index_k_pages, const m3::Array* scales,
                                  const m3::Array* scale_pages, const m3::Array* low,
                                  const m3::Array* low_pages, const m3::Array* slot_mapping,
                                  int64_t threads, int64_t work_per_thread, int64_t* bad) {
  using namespace m3;
  const int64_t tokens = slot_mapping->size[0];
  const int64_t page_size = index_k_pages->size[1];
  const int64_t num_slots = index_k_pages->size[0] * page_size;
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t slot = load<int64_t>(element(*slot_mapping, t));
    if (slot >= num_slots) {
      *bad = slot;
      return kSlotOutsidePool;
    }
  }
  const int64_t elements = tokens * (2 * k->size[1] * k->size[2] + index_k->size[1]);
  const Team team{threads, work_per_thread};
  const int members_wanted = static_cast<int>(team.size(elements * kConversionWork));
  const auto store_token = [&](int64_t t) {
    const int64_t slot = load<int64_t>(element(*slot_mapping, t));
    if (slot < 0) return;
    const int64_t page = slot / page_size, offset = slot % page_size;
    for (int64_t head = 0; head < k->size[1]; ++head) {
      copy_row(*k, t * k->stride[0] + head * k->stride[1], *k_pages,
               page * k_pages->stride[0] + head * k_pages->stride[1] + offset * k_pages->stride[2],
               k->size[2]);
      copy_row(*v, t * v->stride[0] + head * v->stride[1], *v_pages,
               page * v_pages->stride[0] + head * v_pages->stride[1] + offset * v_pages->stride[2],
               v->size[2]);
    }
    copy_row(*index_k, t * index_k->stride[0], *index_k_pages,
             page * index_k_pages->stride[0] + offset * index_k_pages->stride[1],
             index_k->size[1]);
    if (low != nullptr) {
      copy_row(*low, t * low->stride[0], *low_pages,
               page * low_pages->stride[0] + offset * low_pages->stride[1], low->size[1]);
    }
    if (scales != nullptr) {
      copy_row(*scales, t * scales->stride[0], *scale_pages,
               page * scale_pages->stride[0] + offset, 1);
    }
  };
#pragma omp parallel num_threads(members_wanted)
  {
    const int64_t members = omp_get_num_threads(), thread = omp_get_thread_num();
    for (int64_t t = tokens * thread / members; t < tokens * (thread + 1) / members; ++t) {
      store_token(t);
    }
  }
  return kOk;
}
