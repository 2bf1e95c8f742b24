// index_topk: one pass over the index keys for all heads and all rows of a tile, then top-k per
// row.
//
// Work is cut into (tile of query rows, range of blocks). A block's keys are converted and turned
// once per item, so with one query row the pass runs at memory speed and with a full tile at the
// speed of the multiply-adds. Scores live for one wave of tiles only.
#include "native_common.h"

#include <algorithm>
#include <vector>

namespace m3 {
namespace {

constexpr int64_t kTileLanes = 128;                    // (row, head) pairs of a tile
constexpr int64_t kWaveFloats = 16 * 1024 * 1024;      // scores alive at once: 64 MiB
constexpr int64_t kItemsPerThread = 8;
constexpr int64_t kMaxBlocksPerItem = 64;

struct Tile {
  int64_t request, row, rows, position;
  int64_t blocks;  // visible to the last row
  float* scores;   // [rows * heads, blocks]; null when every visible block is chosen anyway
};

struct Item {
  const Tile* tile;
  int64_t first_block, last_block;
};

struct Candidate {
  float score;
  int32_t id;
};

// True if a ranks before b.
bool better(const Candidate& a, const Candidate& b) {
  return a.score > b.score || (a.score == b.score && a.id < b.id);
}

// Appends the `count` best ids of [first, last) to `ids`.
void select(const float* scores, int64_t first, int64_t last, int64_t count, Candidate* heap,
            int32_t*& ids) {
  if (last - first <= count) {
    for (int64_t b = first; b < last; ++b) *ids++ = static_cast<int32_t>(b);
    return;
  }
  if (count <= 0) return;
  for (int64_t i = 0; i < count; ++i) {
    heap[i] = {scores[first + i], static_cast<int32_t>(first + i)};
  }
  std::make_heap(heap, heap + count, better);
  for (int64_t b = first + count; b < last; ++b) {
    // Ids rise, so an equal score never displaces an earlier block.
    if (scores[b] > heap[0].score) {
      std::pop_heap(heap, heap + count, better);
      heap[count - 1] = {scores[b], static_cast<int32_t>(b)};
      std::push_heap(heap, heap + count, better);
    }
  }
  for (int64_t i = 0; i < count; ++i) *ids++ = heap[i].id;
}

class IndexTopk {
 public:
  IndexTopk(const Array& q, const Array& pages, const Array* scales, const Batch& batch,
            const Array& out, int64_t num_local, int64_t num_init, const Team& team)
      : q_(q), pages_(pages), scales_(scales), batch_(batch), out_(out), num_local_(num_local),
        num_init_(num_init), team_(team), threads_(team.threads), heads_(q.size[1]),
        dim_(q.size[2]),
        page_size_(pages.size[1]), topk_(out.size[2]),
        tile_rows_(std::max<int64_t>(1, kTileLanes / std::max<int64_t>(1, heads_))) {}

  int64_t run(int64_t* bad) {
    clear();
    if (heads_ == 0 || !batch_.rows_inside(q_.size[0], failure_)) return failure_.report(bad);
    std::vector<Tile> tiles = cut_into_tiles();
    if (failure_.status != kOk) return failure_.report(bad);
    int64_t work = 0;
    for (const Tile& tile : tiles) {
      if (scored(tile)) work += (tile.rows * heads_ + kConversionWork) * tile.blocks;
    }
    threads_ = team_.size(work * page_size_ * dim_);
    const int64_t lanes = tile_rows_ * heads_;
    const Scratch scratch(threads_, lanes * (dim_ + kPanel + kLanes) + dim_ * kPanel);
    std::vector<Candidate> heaps(threads_ * topk_);

    for (size_t begin = 0; begin < tiles.size();) {
      size_t end = begin;
      int64_t floats = 0, blocks = 0;
      while (end < tiles.size()) {
        const int64_t more = scored(tiles[end]) ? tiles[end].rows * heads_ * tiles[end].blocks : 0;
        if (end > begin && floats + more > kWaveFloats) break;
        floats += more;
        blocks += more > 0 ? tiles[end].blocks : 0;
        ++end;
      }
      const Scratch scores(1, floats);
      const std::vector<Item> items = cut_into_items(&tiles[begin], &tiles[end], blocks, scores);
      run_wave(&tiles[begin], static_cast<int64_t>(end - begin), items, scratch, heaps.data());
      begin = end;
    }
    return failure_.report(bad);
  }

 private:
  bool scored(const Tile& tile) const { return tile.blocks > topk_; }

  int32_t* ids(int64_t head, int64_t row) const {
    return static_cast<int32_t*>(out_.data) + head * out_.stride[0] + row * out_.stride[1];
  }

  void clear() const {
    for (int64_t head = 0; head < out_.size[0]; ++head) {
      for (int64_t row = 0; row < out_.size[1]; ++row) {
        std::fill_n(ids(head, row), topk_, -1);
      }
    }
  }

  std::vector<Tile> cut_into_tiles() {
    std::vector<Tile> tiles;
    for (int64_t r = 0; r < batch_.requests(); ++r) {
      const Batch::Rows rows = batch_.visible_rows(r);
      for (int64_t row = rows.first; row < rows.last; row += tile_rows_) {
        const int64_t count = std::min(tile_rows_, rows.last - row);
        const int64_t position = rows.position + row - rows.first;
        const int64_t blocks = (position + count - 1) / page_size_ + 1;
        if (blocks > batch_.max_pages()) failure_.set(kPageTableTooNarrow, blocks);
        tiles.push_back({r, row, count, position, blocks, nullptr});
      }
    }
    return tiles;
  }

  std::vector<Item> cut_into_items(Tile* begin, Tile* end, int64_t blocks,
                                   const Scratch& scores) const {
    const int64_t wanted = ceil_div(blocks, threads_ * kItemsPerThread);
    const int64_t step = std::min(kMaxBlocksPerItem, std::max<int64_t>(1, wanted));
    std::vector<Item> items;
    float* next = scores.part(0);
    for (Tile* tile = begin; tile != end; ++tile) {
      if (!scored(*tile)) continue;
      tile->scores = next;
      next += tile->rows * heads_ * tile->blocks;
      for (int64_t b = 0; b < tile->blocks; b += step) {
        items.push_back({tile, b, std::min(b + step, tile->blocks)});
      }
    }
    return items;
  }

  void run_wave(const Tile* tiles, int64_t num_tiles, const std::vector<Item>& items,
                const Scratch& scratch, Candidate* heaps) {
    std::atomic<int64_t> next_item{0}, next_tile{0};
    const int64_t num_items = static_cast<int64_t>(items.size());
#pragma omp parallel num_threads(static_cast<int>(threads_))
    {
      const int64_t thread = omp_get_thread_num();
      for (int64_t i; (i = next_item.fetch_add(1)) < num_items;) {
        score(items[i], scratch.part(thread));
      }
#pragma omp barrier
      for (int64_t i; (i = next_tile.fetch_add(1)) < num_tiles;) {
        choose(tiles[i], heaps + thread * topk_);
      }
    }
  }

  // Block maxima of one item; scratch: queries, products and running maxima of all lanes, one
  // panel.
  void score(const Item& item, float* scratch) {
    const Tile& tile = *item.tile;
    const int64_t lanes = tile.rows * heads_;
    float* queries = scratch;
    float* products = queries + lanes * dim_;
    float* maxima = products + lanes * kPanel;
    float* panel = maxima + lanes * kLanes;
    const float* a[kTileLanes];
    float* c[kTileLanes];
    std::vector<const float*> many_a;
    std::vector<float*> many_c;
    const float** query_rows = a;
    float** product_rows = c;
    if (lanes > kTileLanes) {
      many_a.resize(lanes);
      many_c.resize(lanes);
      query_rows = many_a.data();
      product_rows = many_c.data();
    }
    for (int64_t row = 0; row < tile.rows; ++row) {
      for (int64_t head = 0; head < heads_; ++head) {
        const int64_t lane = row * heads_ + head;
        const int64_t offset = (tile.row + row) * q_.stride[0] + head * q_.stride[1];
        load_floats(queries + lane * dim_, element(q_, offset), q_.dtype, dim_);
        query_rows[lane] = queries + lane * dim_;
        product_rows[lane] = products + lane * kPanel;
      }
    }
    const int64_t last_position = tile.position + tile.rows - 1;
    for (int64_t block = item.first_block; block < item.last_block; ++block) {
      const int64_t page = batch_.page(tile.request, block);
      if (page < 0 || page >= pages_.size[0]) {
        failure_.set(kPageOutsidePool, page);
        return;
      }
      const int64_t keys = std::min(page_size_, last_position - block * page_size_ + 1);
      for (int64_t lane = 0; lane < lanes; ++lane) {
        store(maxima + lane * kLanes, splat(kMinusInfinity));
      }
      for (int64_t key = 0; key < keys; key += kPanel) {
        const int64_t present = std::min(kPanel, keys - key);
        const int64_t offset = page * pages_.stride[0] + key * pages_.stride[1];
        const char* rows = element(pages_, offset);
        stream_rows(rows, pages_.stride[1], pages_.dtype, present, dim_);
        pack_keys(panel, rows, pages_.stride[1], pages_.dtype, present, dim_);
        multiply_panel(query_rows, lanes, panel, dim_, product_rows);
        if (scales_ != nullptr) {
          scale_products(products, lanes, page * scales_->stride[0] + key, present);
        }
        for (int64_t lane = 0; lane < lanes; ++lane) {
          const int64_t position = tile.position + lane / heads_;
          const int64_t seen = std::min(present, position - block * page_size_ - key + 1);
          Floats best = load<Floats>(maxima + lane * kLanes);
          for (int v = 0; v < kPanelVectors; ++v) {
            Floats dot = load<Floats>(products + lane * kPanel + v * kLanes);
            if (seen < kPanel) dot = first_lanes(seen - v * kLanes) ? dot : splat(kMinusInfinity);
            // False for NaN, which therefore counts as -inf.
            best = dot > best ? dot : best;
          }
          store(maxima + lane * kLanes, best);
        }
      }
      for (int64_t lane = 0; lane < lanes; ++lane) {
        tile.scores[lane * tile.blocks + block] = reduce_max(load<Floats>(maxima + lane * kLanes));
      }
    }
  }

  // Products with stored keys become products with the keys they stand for.
  void scale_products(float* products, int64_t lanes, int64_t offset, int64_t present) const {
    float scale[kPanel] = {};
    load_floats(scale, element(*scales_, offset), scales_->dtype, present);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      for (int v = 0; v < kPanelVectors; ++v) {
        float* part = products + lane * kPanel + v * kLanes;
        store(part, load<Floats>(part) * load<Floats>(scale + v * kLanes));
      }
    }
  }

  void choose(const Tile& tile, Candidate* heap) const {
    for (int64_t row = 0; row < tile.rows; ++row) {
      const int64_t visible = (tile.position + row) / page_size_ + 1;
      const int64_t init_end = std::min(num_init_, visible);
      const int64_t local_begin = std::max(init_end, visible - std::min(num_local_, visible));
      for (int64_t head = 0; head < heads_; ++head) {
        int32_t* const begin = ids(head, tile.row + row);
        int32_t* end = begin;
        if (visible <= topk_) {
          for (int64_t b = 0; b < visible; ++b) *end++ = static_cast<int32_t>(b);
          continue;
        }
        const float* scores = tile.scores + (row * heads_ + head) * tile.blocks;
        select(scores, 0, init_end, topk_, heap, end);
        select(scores, local_begin, visible, topk_ - (end - begin), heap, end);
        select(scores, init_end, local_begin, topk_ - (end - begin), heap, end);
        std::sort(begin, end);
      }
    }
  }

  const Array &q_, &pages_;
  const Array* const scales_;  // of stored keys; null where keys are stored as they are
  const Batch& batch_;
  const Array& out_;
  const int64_t num_local_, num_init_;
  const Team team_;
  int64_t threads_;
  const int64_t heads_, dim_, page_size_, topk_, tile_rows_;
  Failure failure_;
};

}  // namespace
}  // namespace m3

extern "C" int64_t m3_index_topk(const m3::Array* q, const m3::Array* pages,
                                 const m3::Array* scales, const m3::Array* page_table,
                                 const m3::Array* cu_seqlens_q, const m3::Array* seq_lens,
                                 const m3::Array* out, int64_t num_local, int64_t num_init,
                                 int64_t threads, int64_t work_per_thread, int64_t* bad) {
  try {
    const m3::Batch batch{*page_table, *cu_seqlens_q, *seq_lens};
    const m3::Team team{threads, work_per_thread};
    return m3::IndexTopk(*q, *pages, scales, batch, *out, num_local, num_init, team).run(bad);
  } catch (const std::bad_alloc&) {
    return m3::kOutOfMemory;
  }
}
