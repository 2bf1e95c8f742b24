// sparse_attention: one partial softmax per chosen block, merged in ascending block order.
//
// Prefill: a work item is (tile of rows of one request, KV head). It walks the union of the rows'
// blocks upwards, converts each page once and serves every row that chose it. Decode: with too few
// tiles to feed all threads, a work item is one chosen block of one row, and the partials are
// merged afterwards, in the same order and by the same function. Both give the same bits.
#include "native_common.h"

#include <algorithm>
#include <vector>

namespace m3 {
namespace {

constexpr int64_t kTileLanes = 1024;  // (row, query head of the group) pairs of a tile, at most
constexpr int64_t kItemsPerThread = 4;

// Rows share converted pages within a tile, threads share tiles: as large as leaves enough tiles.
int64_t rows_per_tile(int64_t rows, int64_t kv_heads, int64_t group, int64_t threads) {
  const int64_t most = kTileLanes / std::max<int64_t>(1, group);
  const int64_t fair = rows * kv_heads / (threads * kItemsPerThread);
  return std::max<int64_t>(1, std::min(most, fair));
}

// Sum of exponentials relative to `max`, and the weighted values, of one query head over some keys.
struct Softmax {
  float max, sum;
  float* values;
};

void clear(Softmax& state, int64_t width) {
  state.max = kMinusInfinity;
  state.sum = 0;
  std::memset(state.values, 0, width * 4);
}

// exp(x - max) where max is the largest of several; both may be -inf.
float weight(float x, float max) { return x == kMinusInfinity ? 0.0f : exp_nonpositive(x - max); }

void merge(Softmax& into, const Softmax& part, int64_t width) {
  const float max = part.max > into.max ? part.max : into.max;
  const float old_weight = weight(into.max, max), new_weight = weight(part.max, max);
  into.max = max;
  // A block of NaN logits has no maximum but its sum is NaN and must stay so.
  into.sum = into.sum * old_weight + part.sum * (part.max == kMinusInfinity ? 1.0f : new_weight);
  for (int64_t d = 0; d < width; d += kLanes) {
    const Floats old_values = load<Floats>(into.values + d) * splat(old_weight);
    const Floats new_values = load<Floats>(part.values + d) * splat(new_weight);
    store(into.values + d, old_values + new_values);
  }
}

struct Tile {
  int64_t request, row, rows, position;
};

// One row's share of a block: which query rows, and how many of the block's keys it sees.
struct Reader {
  int64_t lane;  // of its first query head
  int64_t keys;
};

class SparseAttention {
 public:
  SparseAttention(const Array& q, const Array& k, const Array& v, const Array& ids,
                  const Batch& batch, float scale, const Array& out, const Array* lse,
                  const Team& team)
      : q_(q), k_(k), v_(v), ids_(ids), batch_(batch), scale_(scale), out_(out), lse_(lse),
        kv_heads_(k.size[1]), group_(q.size[1] / k.size[1]), dim_(q.size[2]),
        width_(round_up(dim_, kPanel)), page_size_(k.size[2]),
        padded_keys_(round_up(page_size_, kPanel)), topk_(ids.size[2]),
        threads_(team.size(work())),
        tile_rows_(rows_per_tile(q.size[0], kv_heads_, group_, threads_)) {}

  int64_t run(int64_t* bad) {
    if (!batch_.rows_inside(q_.size[0], failure_)) return failure_.report(bad);
    if (group_ > 0) {
      const std::vector<Tile> tiles = cut_into_tiles();
      const int64_t items = static_cast<int64_t>(tiles.size()) * kv_heads_;
      if (items < threads_ * kItemsPerThread && threads_ > 1) {
        run_split(tiles);
      } else {
        run_tiles(tiles);
      }
    }
    return failure_.report(bad);
  }

 private:
  // What one thread needs to work on one tile.
  struct Workspace {
    std::vector<float> memory;
    float *queries, *panel, *logits, *part_values, *values;
    std::vector<Softmax> states, parts;
    std::vector<const float*> a;
    std::vector<float*> c;
    std::vector<int32_t> ids, counts, cursors;
    std::vector<Reader> readers;
  };

  // At most; ids that are not valid cost nothing.
  int64_t work() const {
    int64_t blocks = 0;
    for (int64_t r = 0; r < batch_.requests(); ++r) {
      const Batch::Rows rows = batch_.visible_rows(r);
      const int64_t visible = ceil_div(std::max<int64_t>(0, batch_.seq_len(r)), page_size_);
      blocks += (rows.last - rows.first) * std::min(topk_, visible);
    }
    return blocks * kv_heads_ * (group_ + kConversionWork) * page_size_ * dim_ * 2;
  }

  std::unique_ptr<Workspace> new_workspace(int64_t rows) const {
    auto w = std::make_unique<Workspace>();
    const int64_t lanes = rows * group_;
    const int64_t panel = std::max(dim_, page_size_) * kPanel;
    w->memory.resize(lanes * (width_ * 3 + padded_keys_) + panel + kCacheLine);
    float* next = w->memory.data();
    next += kCacheLine - reinterpret_cast<uintptr_t>(next) / sizeof(float) % kCacheLine;
    w->panel = next;
    w->queries = w->panel + panel;
    w->values = w->queries + lanes * width_;
    w->part_values = w->values + lanes * width_;
    w->logits = w->part_values + lanes * width_;
    w->states.resize(lanes);
    w->parts.resize(lanes);
    w->a.resize(lanes);
    w->c.resize(lanes);
    w->ids.resize(rows * topk_);
    w->counts.resize(rows);
    w->cursors.resize(rows);
    w->readers.reserve(rows);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      w->states[lane].values = w->values + lane * width_;
      w->parts[lane].values = w->part_values + lane * width_;
    }
    return w;
  }

  std::vector<Tile> cut_into_tiles() const {
    std::vector<Tile> tiles;
    // Rows of no request, padding among them, become tiles at position -1: zero and nothing else.
    int64_t done = 0;
    const auto add = [&](int64_t request, int64_t first, int64_t last, int64_t position) {
      for (int64_t row = first; row < last; row += tile_rows_) {
        const int64_t at = position < 0 ? -1 : position + row - first;
        tiles.push_back({request, row, std::min(tile_rows_, last - row), at});
      }
    };
    for (int64_t r = 0; r < batch_.requests(); ++r) {
      const Batch::Rows rows = batch_.visible_rows(r);
      add(r, done, rows.first, -1);
      add(r, rows.first, rows.last, rows.position);
      done = std::max(done, rows.last);
    }
    add(0, done, q_.size[0], -1);
    return tiles;
  }

  // The row's valid ids, ascending and once each; returns their number.
  int32_t sorted_ids(int64_t head, int64_t row, int64_t position, int32_t* sorted) {
    if (position < 0) return 0;
    const int64_t own = position / page_size_;
    int32_t* end = sorted;
    for (int64_t i = 0; i < topk_; ++i) {
      const int32_t id = load<int32_t>(
          element(ids_, head * ids_.stride[0] + row * ids_.stride[1] + i));
      if (id < 0 || id > own) continue;
      if (id >= batch_.max_pages()) {
        failure_.set(kPageTableTooNarrow, id + 1);
        continue;
      }
      *end++ = id;
    }
    std::sort(sorted, end);
    return static_cast<int32_t>(std::unique(sorted, end) - sorted);
  }

  void load_queries(int64_t head, int64_t row, float* to) const {
    for (int64_t g = 0; g < group_; ++g) {
      const int64_t offset = row * q_.stride[0] + (head * group_ + g) * q_.stride[1];
      load_floats(to + g * width_, element(q_, offset), q_.dtype, dim_);
    }
  }

  // The partial softmax of one block for every reader, into `w.parts`.
  void attend_block(Workspace& w, int64_t request, int64_t head, int64_t block) {
    const int64_t page = batch_.page(request, block);
    if (page < 0 || page >= k_.size[0]) {
      failure_.set(kPageOutsidePool, page);
      for (const Reader& reader : w.readers) {
        for (int64_t g = 0; g < group_; ++g) clear(w.parts[reader.lane + g], width_);
      }
      return;
    }
    int64_t keys = 0;
    for (const Reader& reader : w.readers) keys = std::max(keys, reader.keys);
    const int64_t rows = static_cast<int64_t>(w.readers.size()) * group_;

    const int64_t k_base = page * k_.stride[0] + head * k_.stride[1];
    for (int64_t key = 0; key < keys; key += kPanel) {
      const int64_t present = std::min(kPanel, keys - key);
      const char* k_rows = element(k_, k_base + key * k_.stride[2]);
      stream_rows(k_rows, k_.stride[2], k_.dtype, present, dim_);
      pack_keys(w.panel, k_rows, k_.stride[2], k_.dtype, present, dim_);
      int64_t i = 0;
      for (const Reader& reader : w.readers) {
        for (int64_t g = 0; g < group_; ++g, ++i) {
          w.a[i] = w.queries + (reader.lane + g) * width_;
          w.c[i] = w.logits + (reader.lane + g) * padded_keys_ + key;
        }
      }
      multiply_panel(w.a.data(), rows, w.panel, dim_, w.c.data());
    }

    for (const Reader& reader : w.readers) {
      for (int64_t g = 0; g < group_; ++g) {
        const int64_t lane = reader.lane + g;
        exponentiate(w.logits + lane * padded_keys_, reader.keys, w.parts[lane]);
      }
    }

    const int64_t v_base = page * v_.stride[0] + head * v_.stride[1];
    stream_rows(element(v_, v_base), v_.stride[2], v_.dtype, keys, dim_);
    for (int64_t d = 0; d < dim_; d += kPanel) {
      pack_rows(w.panel, element(v_, v_base + d), v_.stride[2], v_.dtype, keys,
                std::min(kPanel, dim_ - d));
      // Rows that see equally many keys go together. No row's sum runs past the keys it sees: what
      // lies there may be NaN, and a weight of zero would not silence it.
      for (size_t first = 0; first < w.readers.size();) {
        const int64_t seen = w.readers[first].keys;
        int64_t i = 0;
        size_t last = first;
        for (; last < w.readers.size() && w.readers[last].keys == seen; ++last) {
          for (int64_t g = 0; g < group_; ++g, ++i) {
            w.a[i] = w.logits + (w.readers[last].lane + g) * padded_keys_;
            w.c[i] = w.parts[w.readers[last].lane + g].values + d;
          }
        }
        multiply_panel(w.a.data(), i, w.panel, seen, w.c.data());
        first = last;
      }
    }
  }

  // Logits become weights relative to their maximum.
  void exponentiate(float* logits, int64_t keys, Softmax& part) const {
    Floats best = splat(kMinusInfinity);
    for (int64_t j = 0; j < keys; j += kLanes) {
      Floats x = load<Floats>(logits + j) * splat(scale_);
      if (keys - j < kLanes) x = first_lanes(keys - j) ? x : splat(kMinusInfinity);
      store(logits + j, x);
      best = x > best ? x : best;
    }
    part.max = reduce_max(best);
    const float base = part.max == kMinusInfinity ? 0.0f : part.max;
    Floats sum{};
    for (int64_t j = 0; j < keys; j += kLanes) {
      const Floats e = exp_nonpositive(load<Floats>(logits + j) - splat(base));
      store(logits + j, e);
      sum += e;
    }
    part.sum = reduce_sum(sum);
  }

  void write(int64_t head, int64_t row, int64_t g, const Softmax& state) const {
    const int64_t q_head = head * group_ + g;
    char* to = const_cast<char*>(
        element(out_, row * out_.stride[0] + q_head * out_.stride[1]));
    const bool empty = state.sum == 0.0f;
    const float factor = empty ? 0.0f : 1.0f / state.sum;
    for (int64_t d = 0; d < dim_; ++d) state.values[d] = empty ? 0.0f : state.values[d] * factor;
    store_floats(to, out_.dtype, state.values, dim_);
    if (lse_ != nullptr) {
      const float lse = empty ? kMinusInfinity : state.max + std::log(state.sum);
      store(const_cast<char*>(
                element(*lse_, row * lse_->stride[0] + q_head * lse_->stride[1])), lse);
    }
  }

  void run_tile(Workspace& w, const Tile& tile, int64_t head) {
    for (int64_t lane = 0; lane < tile.rows * group_; ++lane) clear(w.states[lane], width_);
    for (int64_t row = 0; row < tile.rows; ++row) {
      const int64_t position = tile.position < 0 ? -1 : tile.position + row;
      w.counts[row] = sorted_ids(head, tile.row + row, position, &w.ids[row * topk_]);
      w.cursors[row] = 0;
      if (w.counts[row] > 0) load_queries(head, tile.row + row, w.queries + row * group_ * width_);
    }
    for (;;) {
      int32_t block = std::numeric_limits<int32_t>::max();
      for (int64_t row = 0; row < tile.rows; ++row) {
        if (w.cursors[row] < w.counts[row]) {
          block = std::min(block, w.ids[row * topk_ + w.cursors[row]]);
        }
      }
      if (block == std::numeric_limits<int32_t>::max()) break;
      w.readers.clear();
      for (int64_t row = 0; row < tile.rows; ++row) {
        if (w.cursors[row] < w.counts[row] && w.ids[row * topk_ + w.cursors[row]] == block) {
          ++w.cursors[row];
          const int64_t seen = tile.position + row - block * page_size_ + 1;
          w.readers.push_back({row * group_, std::min(page_size_, seen)});
        }
      }
      attend_block(w, tile.request, head, block);
      for (const Reader& reader : w.readers) {
        for (int64_t g = 0; g < group_; ++g) {
          merge(w.states[reader.lane + g], w.parts[reader.lane + g], width_);
        }
      }
    }
    for (int64_t row = 0; row < tile.rows; ++row) {
      for (int64_t g = 0; g < group_; ++g) {
        write(head, tile.row + row, g, w.states[row * group_ + g]);
      }
    }
  }

  void run_tiles(const std::vector<Tile>& tiles) {
    const int64_t items = static_cast<int64_t>(tiles.size()) * kv_heads_;
    int64_t rows = 1;
    for (const Tile& tile : tiles) rows = std::max(rows, tile.rows);
    std::vector<std::unique_ptr<Workspace>> workspaces;
    for (int64_t t = 0; t < threads_; ++t) workspaces.push_back(new_workspace(rows));
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(static_cast<int>(threads_))
    {
      Workspace& w = *workspaces[omp_get_thread_num()];
      for (int64_t i; (i = next.fetch_add(1)) < items;) {
        run_tile(w, tiles[i / kv_heads_], i % kv_heads_);
      }
    }
  }

  // Every (row, KV head, chosen block) is an item; only for steps of few rows.
  void run_split(const std::vector<Tile>& tiles) {
    struct Stripe {
      int64_t request, row, position, head, first, count;
      std::vector<int32_t> ids;
    };
    std::vector<Stripe> stripes;
    int64_t items = 0;
    for (const Tile& tile : tiles) {
      for (int64_t row = 0; row < tile.rows; ++row) {
        for (int64_t head = 0; head < kv_heads_; ++head) {
          const int64_t position = tile.position < 0 ? -1 : tile.position + row;
          Stripe s{tile.request, tile.row + row, position, head, items, 0,
                   std::vector<int32_t>(topk_)};
          s.count = sorted_ids(head, s.row, position, s.ids.data());
          items += s.count;
          stripes.push_back(std::move(s));
        }
      }
    }
    std::vector<const Stripe*> owner(items);
    for (const Stripe& s : stripes) {
      std::fill_n(owner.begin() + s.first, s.count, &s);
    }
    const Scratch values(items + 1, group_ * width_);
    std::vector<Softmax> parts(items * group_);
    std::vector<std::unique_ptr<Workspace>> workspaces;
    for (int64_t t = 0; t < threads_; ++t) workspaces.push_back(new_workspace(1));
    const int64_t num_stripes = static_cast<int64_t>(stripes.size());
    std::atomic<int64_t> next_item{0}, next_stripe{0};
#pragma omp parallel num_threads(static_cast<int>(threads_))
    {
      Workspace& w = *workspaces[omp_get_thread_num()];
      const Stripe* loaded = nullptr;
      for (int64_t i; (i = next_item.fetch_add(1)) < items;) {
        const Stripe& s = *owner[i];
        if (loaded != &s) load_queries(s.head, s.row, w.queries);
        loaded = &s;
        const int64_t block = s.ids[i - s.first];
        w.readers.assign(1, {0, std::min(page_size_, s.position - block * page_size_ + 1)});
        for (int64_t g = 0; g < group_; ++g) w.parts[g].values = values.part(i) + g * width_;
        attend_block(w, s.request, s.head, block);
        std::copy_n(w.parts.begin(), group_, parts.begin() + i * group_);
      }
#pragma omp barrier
      for (int64_t i; (i = next_stripe.fetch_add(1)) < num_stripes;) {
        const Stripe& s = stripes[i];
        for (int64_t g = 0; g < group_; ++g) {
          clear(w.states[g], width_);
          for (int64_t n = 0; n < s.count; ++n) {
            merge(w.states[g], parts[(s.first + n) * group_ + g], width_);
          }
          write(s.head, s.row, g, w.states[g]);
        }
      }
    }
  }

  const Array &q_, &k_, &v_, &ids_;
  const Batch& batch_;
  const float scale_;
  const Array& out_;
  const Array* lse_;
  const int64_t kv_heads_, group_, dim_, width_, page_size_, padded_keys_, topk_, threads_,
      tile_rows_;
  Failure failure_;
};

}  // namespace
}  // namespace m3

extern "C" int64_t m3_sparse_attention(const m3::Array* q, const m3::Array* k, const m3::Array* v,
                                       const m3::Array* ids, const m3::Array* page_table,
                                       const m3::Array* cu_seqlens_q, const m3::Array* seq_lens,
                                       float scale, const m3::Array* out, const m3::Array* lse,
                                       int64_t threads, int64_t work_per_thread, int64_t* bad) {
  try {
    const m3::Batch batch{*page_table, *cu_seqlens_q, *seq_lens};
    const m3::Team team{threads, work_per_thread};
    return m3::SparseAttention(*q, *k, *v, *ids, batch, scale, *out, lse, team).run(bad);
  } catch (const std::bad_alloc&) {
    return m3::kOutOfMemory;
  }
}
