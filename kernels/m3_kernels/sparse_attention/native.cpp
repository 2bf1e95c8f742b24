// sparse_attention: one partial softmax per chosen block, merged in ascending block order.
//
// Prefill: a work item is (tile of rows of one request, KV head). It walks the union of the rows'
// blocks upwards, converts each page once and serves every row that chose it. Decode: with too few
// tiles to feed all threads, a work item is one chosen block of one row, and the partials are
// merged afterwards, in the same order and by the same function. Both give the same bits.
#include "native_attention.h"

namespace m3 {
namespace {

class SparseAttention : private PagedAttention {
 public:
  SparseAttention(const Array& q, const Array& k, const Array& v, const Array& ids,
                  const Batch& batch, float scale, const Array& out, const Array* lse,
                  const Team& team)
      : PagedAttention(q, k, v, batch, scale, out, lse), ids_(ids), topk_(ids.size[2]),
        threads_(team.size(work())),
        tile_rows_(rows_per_tile(q.size[0], kv_heads_, group_, threads_)) {}

  int64_t run(int64_t* bad) {
    if (!batch_.rows_inside(q_.size[0], failure_)) return failure_.report(bad);
    if (group_ > 0) {
      const std::vector<Tile> tiles = cut_into_tiles(tile_rows_);
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
  struct Workspace : AttentionWorkspace {
    std::vector<int32_t> ids, counts, cursors;
  };

  // At most; ids that are not valid cost nothing.
  int64_t work() const {
    int64_t blocks = 0;
    for (int64_t r = 0; r < batch_.requests(); ++r) {
      const Batch::Rows rows = batch_.visible_rows(r);
      const int64_t visible = ceil_div(std::max<int64_t>(0, batch_.seq_len(r)), page_size_);
      blocks += (rows.last - rows.first) * std::min(topk_, visible);
    }
    return work_of(blocks * kv_heads_);
  }

  std::unique_ptr<Workspace> new_workspace(int64_t rows) const {
    auto w = std::make_unique<Workspace>();
    make(*w, rows, 1);
    w->ids.resize(rows * topk_);
    w->counts.resize(rows);
    w->cursors.resize(rows);
    return w;
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
      attend_block(w, tile.request, head, block, [&](int64_t lane, const Softmax& part) {
        merge(w.states[lane], part, width_);
      });
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
    for (int64_t i = 0; i < items; ++i) {
      for (int64_t g = 0; g < group_; ++g) parts[i * group_ + g].values = values.part(i) + g * width_;
    }
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
        attend_block(w, s.request, s.head, block, [&](int64_t lane, const Softmax& part) {
          copy(parts[i * group_ + lane], part, width_);
        });
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

  const Array& ids_;
  const int64_t topk_, threads_, tile_rows_;
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
