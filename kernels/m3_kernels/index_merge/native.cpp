// index_merge: the best blocks among the candidates of several ranks, for each row and head. A few
// dozen numbers each, so one thread does them all.
#include "native_common.h"

#include <algorithm>
#include <vector>

namespace m3 {
namespace {

struct Candidate {
  int64_t tier;
  float score;
  int32_t id;
};

bool before(const Candidate& a, const Candidate& b) {
  if (a.tier != b.tier) return a.tier < b.tier;
  return a.score > b.score || (a.score == b.score && a.id < b.id);
}

template <typename T>
const T* row_of(const Array& array, int64_t rank, int64_t head, int64_t row) {
  return static_cast<const T*>(array.data) + rank * array.stride[0] + head * array.stride[1] +
         row * array.stride[2];
}

void merge(const Array& ids, const Array& scores, int64_t head, int64_t row, int64_t own,
           int64_t num_local, int64_t num_init, std::vector<Candidate>& found, int32_t* out) {
  const int64_t topk = ids.size[3];
  found.clear();
  for (int64_t rank = 0; rank < ids.size[0]; ++rank) {
    const int32_t* const id = row_of<int32_t>(ids, rank, head, row);
    const float* const score = row_of<float>(scores, rank, head, row);
    for (int64_t i = 0; i < topk; ++i) {
      if (id[i] < 0) continue;
      const int64_t tier = id[i] < num_init ? 0 : id[i] > own - num_local ? 1 : 2;
      found.push_back({tier, score[i] == score[i] ? score[i] : kMinusInfinity, id[i]});
    }
  }
  const int64_t count = std::min<int64_t>(topk, found.size());
  std::partial_sort(found.begin(), found.begin() + count, found.end(), before);
  for (int64_t i = 0; i < count; ++i) out[i] = found[i].id;
  std::sort(out, out + count);
}

}  // namespace
}  // namespace m3

extern "C" int64_t m3_index_merge(const m3::Array* ids, const m3::Array* scores,
                                  const m3::Array* cu_seqlens_q, const m3::Array* seq_lens,
                                  const m3::Array* out, int64_t page_size, int64_t num_local,
                                  int64_t num_init, int64_t, int64_t, int64_t* bad) {
  const auto out_row = [&](int64_t head, int64_t row) {
    return static_cast<int32_t*>(out->data) + head * out->stride[0] + row * out->stride[1];
  };
  try {
    const int64_t heads = ids->size[1], rows = ids->size[2], topk = ids->size[3];
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t row = 0; row < rows; ++row) std::fill_n(out_row(head, row), topk, -1);
    }
    const int32_t* const starts = static_cast<const int32_t*>(cu_seqlens_q->data);
    const int32_t* const lengths = static_cast<const int32_t*>(seq_lens->data);
    std::vector<m3::Candidate> found;
    for (int64_t request = 0; request < seq_lens->size[0]; ++request) {
      const int64_t first = starts[request], last = starts[request + 1];
      if (first < 0 || last > rows) {
        *bad = first < 0 ? first : last;
        return m3::kRowsOutsideQueries;
      }
      for (int64_t row = first; row < last; ++row) {
        const int64_t position = lengths[request] - (last - row);
        if (position < 0) continue;
        for (int64_t head = 0; head < heads; ++head) {
          m3::merge(*ids, *scores, head, row, position / page_size, num_local, num_init, found,
                    out_row(head, row));
        }
      }
    }
  } catch (const std::bad_alloc&) {
    return m3::kOutOfMemory;
  }
  return m3::kOk;
}
