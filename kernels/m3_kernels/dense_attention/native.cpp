// dense_attention: every block up to a row's own, in segments of kSegmentBlocks blocks.
//
// The partial softmaxes of a segment's blocks merge upwards into the segment's, and those of the
// segments upwards into the row's. A work item is (tile of rows of one request, KV head), or one
// segment of it where there are too few of those to feed all threads. Both merge in the same order
// by the same function, so both give the same bits.
#include "native_attention.h"

namespace m3 {
namespace {

// Large enough that the partial results of segments are a small part of what a step reads: for
// MiniMax-M3 in decode a 64th.
constexpr int64_t kSegmentBlocks = 8;
// Rows of one request that convert pages together even where it leaves threads to the segments.
constexpr int64_t kFewRows = 8;

class DenseAttention : private PagedAttention {
 public:
  DenseAttention(const Array& q, const Array& k, const Array& v, const Batch& batch, float scale,
                 const Array& out, const Array* lse, const Team& team)
      : PagedAttention(q, k, v, batch, scale, out, lse), threads_(team.size(work())) {}

  int64_t run(int64_t* bad) {
    if (!batch_.rows_inside(q_.size[0], failure_)) return failure_.report(bad);
    if (group_ > 0) {
      const int64_t fair = rows_per_tile(q_.size[0], kv_heads_, group_, threads_);
      const int64_t most = std::max<int64_t>(1, kTileLanes / group_);
      tiles_ = cut_into_tiles(std::min(most, std::max(fair, kFewRows)));
      const int64_t items = static_cast<int64_t>(tiles_.size()) * kv_heads_;
      if (items < threads_ * kItemsPerThread && threads_ > 1) {
        run_split();
      } else {
        run_tiles();
      }
    }
    return failure_.report(bad);
  }

 private:
  // The lanes' segment in the making, and after all of these what the segments before have become.
  struct Workspace : AttentionWorkspace {
    Softmax& segment(int64_t lane) { return states[lane]; }
    Softmax& total(int64_t lane) { return states[states.size() / 2 + lane]; }
  };

  int64_t work() const {
    int64_t blocks = 0;
    for (int64_t r = 0; r < batch_.requests(); ++r) {
      const Batch::Rows rows = batch_.visible_rows(r);
      const int64_t visible = ceil_div(std::max<int64_t>(0, batch_.seq_len(r)), page_size_);
      blocks += (rows.last - rows.first) * visible;
    }
    return work_of(blocks * kv_heads_);
  }

  // Segments that some row of the tile reads.
  int64_t segments(const Tile& tile) const {
    if (tile.position < 0) return 0;
    return (tile.position + tile.rows - 1) / (page_size_ * kSegmentBlocks) + 1;
  }

  // The first row of the tile that reads something of the segment or block which begins there.
  int64_t first_row(const Tile& tile, int64_t position) const {
    return std::max<int64_t>(0, position - tile.position);
  }

  std::vector<std::unique_ptr<Workspace>> new_workspaces() const {
    int64_t rows = 1;
    for (const Tile& tile : tiles_) rows = std::max(rows, tile.rows);
    std::vector<std::unique_ptr<Workspace>> workspaces;
    for (int64_t t = 0; t < threads_; ++t) {
      workspaces.push_back(std::make_unique<Workspace>());
      make(*workspaces.back(), rows, 2);
    }
    return workspaces;
  }

  void load_tile(Workspace& w, const Tile& tile, int64_t head) const {
    for (int64_t row = 0; row < tile.rows; ++row) {
      load_queries(head, tile.row + row, w.queries + row * group_ * width_);
    }
  }

  // The partial softmax of one segment for every lane of the rows that read it.
  void attend_segment(Workspace& w, const Tile& tile, int64_t head, int64_t segment) {
    const int64_t begin = segment * kSegmentBlocks;
    for (int64_t lane = first_row(tile, begin * page_size_) * group_; lane < tile.rows * group_;
         ++lane) {
      clear(w.segment(lane), width_);
    }
    const int64_t own = (tile.position + tile.rows - 1) / page_size_;
    for (int64_t block = begin; block < begin + kSegmentBlocks && block <= own; ++block) {
      const int64_t start = block * page_size_;
      w.readers.clear();
      for (int64_t row = first_row(tile, start); row < tile.rows; ++row) {
        const int64_t seen = tile.position + row - start + 1;
        w.readers.push_back({row * group_, std::min(page_size_, seen)});
      }
      attend_block(w, tile.request, head, block, [&](int64_t lane, const Softmax& part) {
        merge(w.segment(lane), part, width_);
      });
    }
  }

  void write_tile(Workspace& w, const Tile& tile, int64_t head) const {
    for (int64_t row = 0; row < tile.rows; ++row) {
      for (int64_t g = 0; g < group_; ++g) {
        write(head, tile.row + row, g, w.total(row * group_ + g));
      }
    }
  }

  void clear_totals(Workspace& w, const Tile& tile) const {
    for (int64_t lane = 0; lane < tile.rows * group_; ++lane) clear(w.total(lane), width_);
  }

  void run_tile(Workspace& w, const Tile& tile, int64_t head) {
    clear_totals(w, tile);
    if (tile.position >= 0) load_tile(w, tile, head);
    for (int64_t segment = 0; segment < segments(tile); ++segment) {
      attend_segment(w, tile, head, segment);
      const int64_t start = segment * kSegmentBlocks * page_size_;
      for (int64_t lane = first_row(tile, start) * group_; lane < tile.rows * group_; ++lane) {
        merge(w.total(lane), w.segment(lane), width_);
      }
    }
    write_tile(w, tile, head);
  }

  void run_tiles() {
    const int64_t items = static_cast<int64_t>(tiles_.size()) * kv_heads_;
    const auto workspaces = new_workspaces();
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(static_cast<int>(threads_))
    {
      Workspace& w = *workspaces[omp_get_thread_num()];
      for (int64_t i; (i = next.fetch_add(1)) < items;) {
        // The last tiles of a prompt read most and come first, so that no thread is left with one.
        const int64_t item = items - 1 - i;
        run_tile(w, tiles_[item / kv_heads_], item % kv_heads_);
      }
    }
  }

  // Every (tile, KV head, segment) is an item; only for steps of few rows.
  void run_split() {
    struct Part {
      int64_t tile, head, segment, first;  // the first of its lanes among all results
    };
    std::vector<Part> items;
    std::vector<int64_t> first_items;  // of each (tile, KV head)
    int64_t results = 0;
    for (size_t t = 0; t < tiles_.size(); ++t) {
      for (int64_t head = 0; head < kv_heads_; ++head) {
        first_items.push_back(static_cast<int64_t>(items.size()));
        for (int64_t segment = 0; segment < segments(tiles_[t]); ++segment) {
          items.push_back({static_cast<int64_t>(t), head, segment, results});
          results += tiles_[t].rows * group_;
        }
      }
    }
    first_items.push_back(static_cast<int64_t>(items.size()));
    const Scratch values(1, (results + 1) * width_);
    std::vector<Softmax> parts(results);
    for (int64_t i = 0; i < results; ++i) parts[i].values = values.part(0) + i * width_;
    const auto workspaces = new_workspaces();
    const int64_t num_items = static_cast<int64_t>(items.size());
    const int64_t num_tiles = static_cast<int64_t>(tiles_.size()) * kv_heads_;
    std::atomic<int64_t> next_item{0}, next_tile{0};
#pragma omp parallel num_threads(static_cast<int>(threads_))
    {
      Workspace& w = *workspaces[omp_get_thread_num()];
      int64_t loaded_tile = -1, loaded_head = -1;
      for (int64_t i; (i = next_item.fetch_add(1)) < num_items;) {
        const Part& item = items[i];
        const Tile& tile = tiles_[item.tile];
        if (loaded_tile != item.tile || loaded_head != item.head) load_tile(w, tile, item.head);
        loaded_tile = item.tile;
        loaded_head = item.head;
        attend_segment(w, tile, item.head, item.segment);
        const int64_t start = item.segment * kSegmentBlocks * page_size_;
        for (int64_t lane = first_row(tile, start) * group_; lane < tile.rows * group_; ++lane) {
          copy(parts[item.first + lane], w.segment(lane), width_);
        }
      }
#pragma omp barrier
      for (int64_t i; (i = next_tile.fetch_add(1)) < num_tiles;) {
        const Tile& tile = tiles_[i / kv_heads_];
        clear_totals(w, tile);
        for (int64_t n = first_items[i]; n < first_items[i + 1]; ++n) {
          const int64_t start = items[n].segment * kSegmentBlocks * page_size_;
          for (int64_t lane = first_row(tile, start) * group_; lane < tile.rows * group_; ++lane) {
            merge(w.total(lane), parts[items[n].first + lane], width_);
          }
        }
        write_tile(w, tile, i % kv_heads_);
      }
    }
  }

  const int64_t threads_;
  std::vector<Tile> tiles_;
};

}  // namespace
}  // namespace m3

extern "C" int64_t m3_dense_attention(const m3::Array* q, const m3::Array* k, const m3::Array* v,
                                      const m3::Array* page_table, const m3::Array* cu_seqlens_q,
                                      const m3::Array* seq_lens, float scale, const m3::Array* out,
                                      const m3::Array* lse, int64_t threads,
                                      int64_t work_per_thread, int64_t* bad) {
  try {
    const m3::Batch batch{*page_table, *cu_seqlens_q, *seq_lens};
    const m3::Team team{threads, work_per_thread};
    return m3::DenseAttention(*q, *k, *v, batch, scale, *out, lse, team).run(bad);
  } catch (const std::bad_alloc&) {
    return m3::kOutOfMemory;
  }
}
