// index_topk: one pass over the index keys for all heads and all rows of a tile, then top-k per
// row. A share of each request's blocks gives the best of these, with their scores.
//
// Work is cut into (tile of query rows, range of blocks). A block's keys are converted and turned
// once per item, so with one query row the pass runs at memory speed and with a full tile at the
// speed of the multiply-adds. Scores live for one wave of tiles only.
#include "native_common.h"
#include "native_planes.h"

#include <algorithm>
#include <functional>
#include <memory>
#include <vector>

namespace m3 {
namespace {

constexpr int64_t kTileLanes = 128;                    // (row, head) pairs of a tile
constexpr int64_t kWaveFloats = 16 * 1024 * 1024;      // scores alive at once: 64 MiB
constexpr int64_t kItemsPerThread = 8;
constexpr int64_t kMaxBlocksPerItem = 64;
// If more than one block of so many would be scored whole for a row and head, all are, and those of
// the rows and heads beside it.
constexpr int64_t kCrowded = 4;
// Where a range of blocks was so, the next are scored whole at once; one of so many looks again.
constexpr int64_t kLooks = 16;
constexpr int64_t kUsualChannels = 128;
constexpr int64_t kKeysAhead = 16;
constexpr int64_t kManyLanes = 24;  // of a tile, from which on keys are turned to columns

struct Tile {
  int64_t request, row, rows, position;
  int64_t visible;  // blocks visible to the last row
  int64_t begin;    // the first of them that is scanned; all blocks below are counted from it
  int64_t blocks;   // scanned
  float* scores;    // [rows * heads, blocks]; null when every visible block is chosen anyway
};

// What of each request is scanned, and where the scores of what is chosen go; null for all blocks.
struct Share {
  const Array* first;
  const Array* end;
  const Array* scores;

  bool given() const { return first != nullptr; }
  static int64_t at(const Array& array, int64_t request) {
    return static_cast<const int32_t*>(array.data)[request * array.stride[0]];
  }
  float* row(int64_t head, int64_t row) const {
    return static_cast<float*>(scores->data) + head * scores->stride[0] + row * scores->stride[1];
  }
};

struct Item {
  const Tile* tile;
  int64_t first_block, last_block;
  int64_t number;  // of its tile
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

// A step cut into tiles, and tiles into waves of items; what is done with them is the subclass's.
class TiledStep {
 public:
  TiledStep(const Array& q, const Array& pages, const Batch& batch, const Array& out,
            const Share& share, int64_t num_local, int64_t num_init, const Team& team,
            int64_t floats_per_score)
      : q_(q), pages_(pages), batch_(batch), out_(out), share_(share), num_local_(num_local),
        num_init_(num_init), team_(team), threads_(team.threads), heads_(q.size[1]),
        dim_(q.size[2]),
        page_size_(pages.size[1]), topk_(out.size[2]),
        tile_rows_(std::max<int64_t>(1, kTileLanes / std::max<int64_t>(1, heads_))),
        floats_per_score_(floats_per_score) {}
  virtual ~TiledStep() = default;

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
    start();
    for (size_t begin = 0; begin < tiles.size();) {
      size_t end = begin;
      int64_t floats = 0, blocks = 0;
      while (end < tiles.size()) {
        const int64_t more = scored(tiles[end]) ? floats_of(tiles[end]) : 0;
        if (end > begin && floats + more > kWaveFloats) break;
        floats += more;
        blocks += more > 0 ? tiles[end].blocks : 0;
        ++end;
      }
      const Scratch scores(1, floats);
      const std::vector<Item> items = cut_into_items(&tiles[begin], &tiles[end], blocks, scores);
      run_wave(&tiles[begin], static_cast<int64_t>(end - begin), items);
      begin = end;
    }
    return failure_.report(bad);
  }

 protected:
  // Memory of `threads_` threads.
  virtual void start() = 0;
  virtual void run_wave(Tile* tiles, int64_t num_tiles, const std::vector<Item>& items) = 0;

  bool scored(const Tile& tile) const { return tile.visible > topk_ && tile.blocks > 0; }

  // Scanned blocks that a row of a tile sees, the forced ones from 0 to `init_end` and from
  // `local_begin`; whether it sees no more blocks, scanned or not, than are chosen.
  struct Visible {
    int64_t blocks, init_end, local_begin;
    bool all;
  };
  Visible visible_to(const Tile& tile, int64_t row) const {
    const int64_t visible = (tile.position + row) / page_size_ + 1;
    const auto scanned = [&](int64_t block) {
      return std::min(std::max<int64_t>(block - tile.begin, 0), tile.blocks);
    };
    const int64_t init_end = scanned(std::min(num_init_, visible));
    const int64_t local_begin = scanned(visible - std::min(num_local_, visible));
    return {scanned(visible), init_end, std::max(init_end, local_begin), visible <= topk_};
  }
  int64_t floats_of(const Tile& tile) const {
    return tile.rows * heads_ * tile.blocks * floats_per_score_;
  }

  int32_t* ids(int64_t head, int64_t row) const {
    return static_cast<int32_t*>(out_.data) + head * out_.stride[0] + row * out_.stride[1];
  }

  // The blocks chosen for a row and head, counted from the first that is scanned, become ids; with a
  // share their scores are told as well.
  template <typename ScoreOf>
  void finish(const Tile& tile, int64_t row, int64_t head, int32_t* begin, int32_t* end,
              const ScoreOf& score_of) const {
    std::sort(begin, end);
    if (!share_.given()) return;
    float* const scores = share_.row(head, tile.row + row);
    for (int32_t* id = begin; id != end; ++id) {
      scores[id - begin] = score_of(*id);
      *id += static_cast<int32_t>(tile.begin);
    }
  }

  void clear() const {
    for (int64_t head = 0; head < out_.size[0]; ++head) {
      for (int64_t row = 0; row < out_.size[1]; ++row) {
        std::fill_n(ids(head, row), topk_, -1);
        if (share_.given()) std::fill_n(share_.row(head, row), topk_, kMinusInfinity);
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
        const int64_t visible = (position + count - 1) / page_size_ + 1;
        if (visible > batch_.max_pages()) failure_.set(kPageTableTooNarrow, visible);
        int64_t begin = 0, end = visible;
        if (share_.given()) {
          begin = std::min(std::max<int64_t>(Share::at(*share_.first, r), 0), visible);
          end = std::min(std::max(Share::at(*share_.end, r), begin), visible);
        }
        tiles.push_back({r, row, count, position, visible, begin, end - begin, nullptr});
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
      next += floats_of(*tile);
      for (int64_t b = 0; b < tile->blocks; b += step) {
        items.push_back({tile, b, std::min(b + step, tile->blocks), b / step});
      }
    }
    return items;
  }

  const Array &q_, &pages_;
  const Batch& batch_;
  const Array& out_;
  const Share& share_;
  const int64_t num_local_, num_init_;
  const Team team_;
  int64_t threads_;
  const int64_t heads_, dim_, page_size_, topk_, tile_rows_, floats_per_score_;
  Failure failure_;
};

class IndexTopk : public TiledStep {
 public:
  IndexTopk(const Array& q, const Array& pages, const Array* scales, const Batch& batch,
            const Array& out, const Share& share, int64_t num_local, int64_t num_init,
            const Team& team)
      : TiledStep(q, pages, batch, out, share, num_local, num_init, team, 1), scales_(scales) {}

 private:
  void start() override {
    const int64_t lanes = tile_rows_ * heads_;
    scratch_ = std::make_unique<Scratch>(threads_,
                                         lanes * (dim_ + kPanel + kLanes) + dim_ * kPanel);
    heaps_.resize(threads_ * topk_);
  }

  void run_wave(Tile* tiles, int64_t num_tiles, const std::vector<Item>& items) override {
    std::atomic<int64_t> next_item{0}, next_tile{0};
    const int64_t num_items = static_cast<int64_t>(items.size());
#pragma omp parallel num_threads(static_cast<int>(threads_))
    {
      const int64_t thread = omp_get_thread_num();
      for (int64_t i; (i = next_item.fetch_add(1)) < num_items;) {
        score(items[i], scratch_->part(thread));
      }
#pragma omp barrier
      for (int64_t i; (i = next_tile.fetch_add(1)) < num_tiles;) {
        choose(tiles[i], heaps_.data() + thread * topk_);
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
    for (int64_t scanned = item.first_block; scanned < item.last_block; ++scanned) {
      const int64_t block = tile.begin + scanned;
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
        tile.scores[lane * tile.blocks + scanned] =
            reduce_max(load<Floats>(maxima + lane * kLanes));
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
      const auto [visible, init_end, local_begin, all] = visible_to(tile, row);
      for (int64_t head = 0; head < heads_; ++head) {
        int32_t* const begin = ids(head, tile.row + row);
        int32_t* end = begin;
        if (all) {
          for (int64_t b = 0; b < visible; ++b) *end++ = static_cast<int32_t>(tile.begin + b);
          continue;
        }
        const float* scores = tile.scores + (row * heads_ + head) * tile.blocks;
        select(scores, 0, init_end, topk_, heap, end);
        select(scores, local_begin, visible, topk_ - (end - begin), heap, end);
        select(scores, init_end, local_begin, topk_ - (end - begin), heap, end);
        finish(tile, row, head, begin, end, [&](int64_t b) { return scores[b]; });
      }
    }
  }

  const Array* const scales_;  // of stored keys; null where keys are stored as they are
  std::unique_ptr<Scratch> scratch_;
  std::vector<Candidate> heaps_;
};

// The same for keys in two planes. One pass over the high planes bounds every block's score from
// above; scores are then computed of those blocks alone that the bounds leave in question.
//
// Kept per row, head and block: the largest bound of its tokens, the token it is of, and the second
// largest. Where the second does not reach what the first token really scores, that is the block's
// score, and two rows of bytes have told it. Of a block scored whole: the score, no token, and -inf.
class PlanesTopk : public TiledStep {
 public:
  PlanesTopk(const Array& q, const Array& high, const Array& low, const Array& scales,
             const Batch& batch, const Array& out, const Share& share, int64_t num_local,
             int64_t num_init, const Team& team)
      : TiledStep(q, high, batch, out, share, num_local, num_init, team, 3), low_(low),
        scales_(scales), padded_(round_up(dim_, kChannels)) {}

 private:
  // In place of a token: the block's bound is its score.
  static constexpr float kWhole = -1.0f;

  // A block and what its score is at least and at most.
  struct Range {
    float low, high;
    int32_t id;
  };

  // What a thread works with: queries and slacks of a tile's lanes, scales, copies of rows, a heap.
  struct Memory {
    std::vector<int16_t> codes;
    std::vector<float> slack, scale;
    std::vector<int8_t> rows;
    std::vector<int32_t> products;
    std::vector<Candidate> heap;
    std::vector<int32_t> likely;
    std::vector<Range> ranges;
    std::vector<float> values;
    std::vector<char> whole;  // of each lane: whether an item's blocks are scored whole at once
    const Tile* tile = nullptr;  // whose queries these are
    // Of tiles of many lanes: queries, products, a panel and what was found, and where these lie.
    std::vector<float> floats;
    std::vector<const float*> query_rows;
    std::vector<float*> product_rows;
    const Tile* rows_of_tile = nullptr;
  };

  void start() override {
    const int64_t lanes = round_up(tile_rows_ * heads_, kQueries);
    memory_.resize(threads_);
    for (Memory& memory : memory_) {
      memory.codes.resize(lanes * padded_);
      memory.slack.resize(lanes);
      memory.scale.resize(page_size_ + 1);
      memory.rows.resize((page_size_ + 2) * padded_);
      memory.products.resize((page_size_ + 1) * 2 * kQueries);
      memory.whole.resize(lanes);
      if (lanes >= kManyLanes) {
        memory.floats.resize(lanes * (dim_ + kPanel + 3 * kLanes) + dim_ * kPanel);
      }
      memory.heap.resize(topk_);
      memory.likely.resize(topk_);
    }
  }

  void run_wave(Tile* tiles, int64_t num_tiles, const std::vector<Item>& items) override {
    std::atomic<int64_t> next_item{0}, next_lane{0}, next_exact{0}, next_choice{0};
    const int64_t num_items = static_cast<int64_t>(items.size());
    // Lanes of all tiles in one row, for threads to share.
    std::vector<int64_t> first_lane(num_tiles + 1, 0);
    for (int64_t t = 0; t < num_tiles; ++t) {
      first_lane[t + 1] = first_lane[t] + tiles[t].rows * heads_;
    }
    // By the first lane of each `kQueries`, which are multiplied together: whether the last look at
    // a range of blocks left too many in doubt; whether all of them did. When threads see the former
    // decides what is scored whole, never what is chosen.
    std::vector<std::atomic<bool>> crowded(first_lane[num_tiles]), given_up(first_lane[num_tiles]);
    for (auto& flag : crowded) flag.store(false);
    for (auto& flag : given_up) flag.store(false);
    for (Memory& memory : memory_) memory.tile = memory.rows_of_tile = nullptr;
    const auto tile_of = [&](int64_t lane) {
      return std::upper_bound(first_lane.begin(), first_lane.end(), lane) - first_lane.begin() - 1;
    };
#pragma omp parallel num_threads(static_cast<int>(threads_))
    {
      Memory& memory = memory_[omp_get_thread_num()];
      for (int64_t i; (i = next_item.fetch_add(1)) < num_items;) {
        bound(items[i], &crowded[first_lane[items[i].tile - tiles]], memory);
      }
#pragma omp barrier
      // Without a page there are no bounds to choose by.
      const bool complete = failure_.status == kOk;
      for (int64_t i; complete && (i = next_lane.fetch_add(1)) < first_lane[num_tiles];) {
        const int64_t t = tile_of(i);
        const int64_t lane = i - first_lane[t];
        if (!choose(tiles[t], lane, memory, false)) given_up[i - lane % kQueries].store(true);
      }
#pragma omp barrier
      for (int64_t i; complete && (i = next_exact.fetch_add(1)) < num_items;) {
        score(items[i], &given_up[first_lane[items[i].tile - tiles]], memory);
      }
#pragma omp barrier
      for (int64_t i; complete && (i = next_choice.fetch_add(1)) < first_lane[num_tiles];) {
        const int64_t t = tile_of(i);
        const int64_t lane = i - first_lane[t];
        if (given_up[i - lane % kQueries].load()) choose(tiles[t], lane, memory, true);
      }
    }
  }

  float* bounds(const Tile& tile, int64_t lane) const { return tile.scores + lane * tile.blocks; }
  float* seconds(const Tile& tile, int64_t lane) const {
    return bounds(tile, tile.rows * heads_ + lane);
  }
  float* tokens(const Tile& tile, int64_t lane) const {
    return bounds(tile, 2 * tile.rows * heads_ + lane);
  }

  void load_queries(const Tile& tile, Memory& memory) const {
    if (memory.tile == &tile) return;
    memory.tile = &tile;
    std::vector<float> query(dim_);
    const int64_t lanes = tile.rows * heads_;
    for (int64_t lane = 0; lane < round_up(lanes, kQueries); ++lane) {
      int16_t* codes = &memory.codes[lane * padded_];
      if (lane >= lanes) {
        std::memset(codes, 0, padded_ * sizeof(int16_t));
        memory.slack[lane] = 0.0f;
        continue;
      }
      const int64_t row = tile.row + lane / heads_, head = lane % heads_;
      const int64_t offset = row * q_.stride[0] + head * q_.stride[1];
      load_floats(query.data(), element(q_, offset), q_.dtype, dim_);
      memory.slack[lane] = fixed_point(query.data(), dim_, padded_, codes);
    }
  }

  int64_t page_of(const Tile& tile, int64_t block) {
    const int64_t page = batch_.page(tile.request, tile.begin + block);
    if (page >= 0 && page < pages_.size[0]) return page;
    failure_.set(kPageOutsidePool, page);
    return -1;
  }

  // A row of a plane; a copy with zeros behind it where vectors would read past its end.
  const int8_t* row_of(const Array& plane, int64_t page, int64_t token, int8_t* copy) const {
    const char* row = element(plane, page * plane.stride[0] + token * plane.stride[1]);
    if (padded_ == dim_) return reinterpret_cast<const int8_t*>(row);
    std::memset(copy, 0, padded_);
    std::memcpy(copy, row, dim_);
    return copy;
  }

  // Rows of a block's high plane, `*stride` apart; copies where vectors would read past their ends.
  const int8_t* rows_of(int64_t page, int64_t keys, Memory& memory, int64_t* stride) const {
    *stride = padded_ == dim_ ? pages_.stride[1] : padded_;
    int8_t* const copies = &memory.rows[2 * padded_];
    if (padded_ == dim_) return row_of(pages_, page, 0, copies);
    for (int64_t key = 0; key < keys; ++key) row_of(pages_, page, key, copies + key * padded_);
    return copies;
  }

  float scale_of(int64_t page, int64_t token) const {
    return load_one_as_float(element(scales_, page * scales_.stride[0] + token), scales_.dtype);
  }

  // Tokens of a block that a lane's row sees.
  int64_t seen_by(const Tile& tile, int64_t lane, int64_t block) const {
    const int64_t first = (tile.begin + block) * page_size_;
    return std::min(page_size_, tile.position + lane / heads_ - first + 1);
  }

  // Upper bounds of the blocks of an item, from the high plane; where too many would be in doubt,
  // their scores.
  void bound(const Item& item, std::atomic<bool>* crowded, Memory& memory) {
    const Tile& tile = *item.tile;
    load_queries(tile, memory);
    const int64_t lanes = tile.rows * heads_;
    const bool look = item.number % kLooks == 0;
    bool any_bounds = false;
    for (int64_t lane = 0; lane < lanes; lane += kQueries) {
      memory.whole[lane] = !look && crowded[lane].load(std::memory_order_relaxed);
      any_bounds = any_bounds || !memory.whole[lane];
    }
    for (int64_t block = item.first_block; block < item.last_block; ++block) {
      const int64_t page = page_of(tile, block);
      if (page < 0) return;
      const int64_t keys = seen_by(tile, lanes - 1, block);
      load_scales(page, keys, memory);
      const bool causal = seen_by(tile, 0, block) < keys;
      int64_t stride;
      const int8_t* const rows = rows_of(page, keys, memory, &stride);
      if (lanes >= kManyLanes && any_bounds) bound_panels(tile, block, page, keys, causal, memory);
      for (int64_t lane = 0; lane < lanes; lane += kQueries) {
        const int64_t count = std::min(kQueries, lanes - lane);
        if (memory.whole[lane]) {
          score_block(tile, lane, count, block, page, keys, memory);
        } else if (lanes >= kManyLanes) {
          continue;
        } else if (dim_ == kUsualChannels) {
          bound_block<kUsualChannels>(tile, lane, count, block, rows, stride, keys, causal, memory);
        } else {
          bound_block<0>(tile, lane, count, block, rows, stride, keys, causal, memory);
        }
      }
    }
    for (int64_t lane = 0; lane < lanes; lane += kQueries) {
      if (memory.whole[lane]) continue;
      // Keys make crowds, which all queries meet: one of those beside each other is asked.
      const bool found = in_doubt(item, lane, memory);
      memory.whole[lane] = found;
      crowded[lane].store(found, std::memory_order_relaxed);
    }
    score_where(item, [&](int64_t lane) { return memory.whole[lane] != 0; }, memory);
  }

  // Whether most of an item's blocks would have to be scored whole to find the best quarter of them.
  bool in_doubt(const Item& item, int64_t lane, Memory& memory) {
    const Tile& tile = *item.tile;
    const int64_t first = item.first_block, last = item.last_block;
    const int64_t count = std::min(topk_, (last - first) / kCrowded);
    if (count == 0) return false;
    const float floor = floor_of(tile, lane, first, last, count, memory);
    const float* const second = seconds(tile, lane);
    int64_t doubts = 0, left = last - first;
    for (int64_t b = first; b < last && 2 * (doubts + left) > last - first; ++b, --left) {
      doubts += second[b] >= floor && second[b] > score_of_token(tile, lane, b, memory);
    }
    return 2 * doubts > last - first;
  }

  // As `bound_block` for all lanes of a tile: with many of them, keys are worth turning to columns,
  // and multiply-adds of fp32 are as fast as those of 16-bit integers. Their rounding is in `slack`.
  void bound_panels(const Tile& tile, int64_t block, int64_t page, int64_t keys, bool causal,
                    Memory& memory) {
    const int64_t lanes = tile.rows * heads_;
    float* const queries = memory.floats.data();
    float* const products = queries + lanes * dim_;
    float* const panel = products + lanes * kPanel;
    float* const state = panel + dim_ * kPanel;  // per lane: best, second, token of each vector lane
    if (memory.rows_of_tile != &tile) {
      memory.rows_of_tile = &tile;
      memory.query_rows.resize(lanes);
      memory.product_rows.resize(lanes);
      for (int64_t lane = 0; lane < lanes; ++lane) {
        for (int64_t d = 0; d < dim_; ++d) {
          queries[lane * dim_ + d] = memory.codes[lane * padded_ + d];
        }
        memory.query_rows[lane] = queries + lane * dim_;
        memory.product_rows[lane] = products + lane * kPanel;
      }
    }
    for (int64_t lane = 0; lane < lanes; ++lane) {
      store(state + (3 * lane) * kLanes, splat(kMinusInfinity));
      store(state + (3 * lane + 1) * kLanes, splat(kMinusInfinity));
      store(state + (3 * lane + 2) * kLanes, Floats{});
    }
    float scale[kPanel];
    for (int64_t key = 0; key < keys; key += kPanel) {
      const int64_t present = std::min(kPanel, keys - key);
      const char* rows = element(pages_, page * pages_.stride[0] + key * pages_.stride[1]);
      stream_rows(rows, pages_.stride[1], pages_.dtype, present, dim_);
      pack_keys(panel, rows, pages_.stride[1], pages_.dtype, present, dim_);
      multiply_panel(memory.query_rows.data(), lanes, panel, dim_, memory.product_rows.data());
      for (int64_t j = 0; j < kPanel; ++j) {
        scale[j] = j < present ? memory.scale[key + j] : std::numeric_limits<float>::quiet_NaN();
      }
      for (int64_t lane = 0; lane < lanes; ++lane) {
        float* const own = state + 3 * lane * kLanes;
        const Floats slack = splat(memory.slack[lane]);
        Floats best = load<Floats>(own), second = load<Floats>(own + kLanes);
        Floats token = load<Floats>(own + 2 * kLanes);
        const int64_t seen = causal ? seen_by(tile, lane, block) - key : kPanel;
        for (int v = 0; v < kPanelVectors; ++v) {
          Floats bound = load<Floats>(products + lane * kPanel + v * kLanes);
          bound = (bound * 256.0f + slack) * load<Floats>(scale + v * kLanes);
          if (seen < kPanel) {
            bound = first_lanes(seen - v * kLanes) ? bound : splat(kMinusInfinity);
          }
          const Floats number = lane_numbers() + splat(static_cast<float>(key + v * kLanes));
          const Ints better = bound > best;
          const Floats behind = bound > second ? bound : second;
          second = better ? best : behind;
          best = better ? bound : best;
          token = better ? number : token;
        }
        store(own, best);
        store(own + kLanes, second);
        store(own + 2 * kLanes, token);
      }
    }
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const float* const own = state + 3 * lane * kLanes;
      int64_t first = 0;
      for (int64_t i = 1; i < kLanes; ++i) first = own[i] > own[first] ? i : first;
      float second = own[kLanes + first];
      for (int64_t i = 0; i < kLanes; ++i) {
        if (i != first) second = own[i] > second ? own[i] : second;
      }
      bounds(tile, lane)[block] = own[first];
      seconds(tile, lane)[block] = second;
      tokens(tile, lane)[block] = own[2 * kLanes + first];
    }
  }

  template <int64_t Channels>
  void bound_block(const Tile& tile, int64_t lane, int64_t count, int64_t block,
                   const int8_t* rows, int64_t stride, int64_t keys, bool causal,
                   Memory& memory) const {
    const PairFloats nothing = PairFloats{} + kMinusInfinity;
    PairFloats slack, best = nothing, second = nothing;
    PairInts seen{}, token{}, number{0, 0, 0, 0, 1, 1, 1, 1};
    for (int64_t i = 0; i < 2 * kQueries; ++i) {
      slack[i] = memory.slack[lane + i % kQueries];
      seen[i] = static_cast<int32_t>(
          i % kQueries < count ? seen_by(tile, lane + i % kQueries, block) : 0);
    }
    const int16_t* codes = &memory.codes[lane * padded_];
    const float* scale = memory.scale.data();
    const int64_t padded = padded_;
    int32_t* const products = memory.products.data();
    for (int64_t key = 0; key < keys; key += 2) {
      const int8_t* const row = rows + key * stride;
      if (lane == 0) {
        // Beyond the end of a block this asks for what lies there, which does no harm.
        for (int64_t byte = 0; byte < 2 * padded; byte += 64) {
          __builtin_prefetch(row + kKeysAhead * stride + byte);
        }
      }
      store(products + 4 * key, products_of_pair<Channels>(
                                    row, key + 1 < keys ? row + stride : row, codes, padded));
    }
    // Apart from the products, which take all registers.
    for (int64_t key = 0; key < keys; key += 2) {
      const PairInts sums = load<PairInts>(products + 4 * key);
      const float a = scale[key], b = scale[key + 1];
      const PairFloats scales{a, a, a, a, b, b, b, b};
      PairFloats bound = (__builtin_convertvector(sums, PairFloats) * 256.0f + slack) * scales;
      if (causal) bound = number < seen ? bound : nothing;
      // False for NaN, which therefore counts as -inf.
      const PairInts better = bound > best;
      const PairFloats behind = bound > second ? bound : second;
      second = better ? best : behind;
      best = better ? bound : best;
      token = better ? number : token;
      number += 2;
    }
    for (int64_t i = 0; i < count; ++i) {
      const bool odd = best[i + kQueries] > best[i];
      const int64_t first = odd ? i + kQueries : i, last = odd ? i : i + kQueries;
      bounds(tile, lane + i)[block] = best[first];
      seconds(tile, lane + i)[block] = std::max(best[last], second[first]);
      tokens(tile, lane + i)[block] = static_cast<float>(token[first]);
    }
  }

  void load_scales(int64_t page, int64_t keys, Memory& memory) const {
    float* const scale = memory.scale.data();
    load_floats(scale, element(scales_, page * scales_.stride[0]), scales_.dtype, keys);
    scale[keys] = std::numeric_limits<float>::quiet_NaN();  // of the second of an odd pair
  }

  // Scores of the blocks of an item that have none, for the lanes that could not be chosen for.
  void score(const Item& item, const std::atomic<bool>* given_up, Memory& memory) {
    load_queries(*item.tile, memory);
    score_where(item, [&](int64_t lane) { return given_up[lane].load(); }, memory);
  }

  // Scores in place of bounds, for those `kQueries` lanes each that are asked for by the first.
  template <typename Asked>
  void score_where(const Item& item, const Asked& asked, Memory& memory) {
    const Tile& tile = *item.tile;
    const int64_t lanes = tile.rows * heads_;
    bool any = false;
    for (int64_t lane = 0; lane < lanes; lane += kQueries) any = any || asked(lane);
    for (int64_t block = item.first_block; any && block < item.last_block; ++block) {
      const int64_t page = page_of(tile, block);
      if (page < 0) return;
      const int64_t keys = seen_by(tile, lanes - 1, block);
      load_scales(page, keys, memory);
      for (int64_t lane = 0; lane < lanes; lane += kQueries) {
        if (!asked(lane) || tokens(tile, lane)[block] == kWhole) continue;
        score_block(tile, lane, std::min(kQueries, lanes - lane), block, page, keys, memory);
      }
    }
  }

  void score_block(const Tile& tile, int64_t lane, int64_t count, int64_t block, int64_t page,
                   int64_t keys, Memory& memory) const {
    if (dim_ == kUsualChannels) {
      score_block_of<kUsualChannels>(tile, lane, count, block, page, keys, memory);
    } else {
      score_block_of<0>(tile, lane, count, block, page, keys, memory);
    }
  }

  template <int64_t Channels>
  void score_block_of(const Tile& tile, int64_t lane, int64_t count, int64_t block, int64_t page,
                      int64_t keys, Memory& memory) const {
    const int16_t* codes = &memory.codes[lane * padded_];
    const int64_t padded = padded_;
    int32_t* const products = memory.products.data();
    for (int64_t key = 0; key < keys; ++key) {
      store(products + 2 * kQueries * key,
            products_of_pair<Channels>(row_of(pages_, page, key, &memory.rows[0]),
                                       row_of(low_, page, key, &memory.rows[padded_]), codes,
                                       padded));
    }
    QueryInts seen{};
    for (int64_t i = 0; i < count; ++i) {
      seen[i] = static_cast<int32_t>(seen_by(tile, lane + i, block));
    }
    const float* scale = memory.scale.data();
    const QueryFloats nothing = QueryFloats{} + kMinusInfinity;
    QueryFloats best = nothing;
    for (int64_t key = 0; key < keys; ++key) {
      const int32_t* const both = products + 2 * kQueries * key;
      QueryFloats found = scores_of(load<QueryInts>(both), load<QueryInts>(both + kQueries));
      found = static_cast<int32_t>(key) < seen ? found * scale[key] : nothing;
      best = found > best ? found : best;  // false for NaN, which therefore counts as -inf
    }
    for (int64_t i = 0; i < count; ++i) {
      const bool finite = memory.slack[lane + i] == memory.slack[lane + i];
      bounds(tile, lane + i)[block] = finite ? best[i] : kMinusInfinity;
      seconds(tile, lane + i)[block] = kMinusInfinity;
      tokens(tile, lane + i)[block] = kWhole;
    }
  }

  // False if so many blocks are in question that all should be scored at once.
  bool choose(const Tile& tile, int64_t lane, Memory& memory, bool exact) {
    const int64_t row = lane / heads_, head = lane % heads_;
    const auto [visible, init_end, local_begin, all] = visible_to(tile, row);
    int32_t* const begin = ids(head, tile.row + row);
    int32_t* end = begin;
    if (all) {
      for (int64_t b = 0; b < visible; ++b) *end++ = static_cast<int32_t>(tile.begin + b);
      return true;
    }
    load_queries(tile, memory);
    const int64_t edges[] = {0, init_end, local_begin, visible, init_end, local_begin};
    for (int part = 0; part < 6; part += 2) {
      const int64_t first = edges[part], last = edges[part + 1], count = topk_ - (end - begin);
      if (exact || last - first <= count || count <= 0) {
        select(bounds(tile, lane), first, last, count, memory.heap.data(), end);
      } else if (!select_bounded(tile, lane, first, last, count, memory, end)) {
        return false;
      }
    }
    finish(tile, row, head, begin, end, [&](int64_t b) {
      const bool whole = tokens(tile, lane)[b] == kWhole;
      return whole ? bounds(tile, lane)[b] : score_of_block(tile, lane, b, memory);
    });
    return true;
  }

  // Appends the `count` best ids of more than so many to `ids`; false if too many are in question.
  bool select_bounded(const Tile& tile, int64_t lane, int64_t first, int64_t last, int64_t count,
                      Memory& memory, int32_t*& ids) {
    const float* const bound = bounds(tile, lane);
    const float* const second = seconds(tile, lane);
    Candidate* const heap = memory.heap.data();
    const float least = floor_of(tile, lane, first, last, count, memory);
    std::vector<Range>& ranges = memory.ranges;
    ranges.clear();
    for (int64_t b = first; b < last; ++b) {
      if (!(bound[b] >= least)) continue;
      const float score = score_of_token(tile, lane, b, memory);
      ranges.push_back({score, std::max(score, second[b]), static_cast<int32_t>(b)});
    }
    // Better than all that could be the next best is chosen; worse than `count` others is not. Of
    // the rest those are scored whole whose second token leaves a doubt.
    const float floor = nth_largest(&Range::low, count, memory);
    const float ceiling = static_cast<int64_t>(ranges.size()) > count
                              ? nth_largest(&Range::high, count + 1, memory)
                              : kMinusInfinity;
    int64_t left = count, doubts = 0;
    Candidate* end = heap;
    for (Range& range : ranges) {
      if (range.low > ceiling) {
        *ids++ = range.id;
        --left;
        range.high = kMinusInfinity;
        range.id = -1;
      } else if (range.high >= floor && range.high > range.low) {
        if (++doubts > (last - first) / kCrowded) {
          ids -= count - left;
          return false;
        }
        range.low = score_of_block(tile, lane, range.id, memory);
      }
    }
    for (const Range& range : ranges) {
      if (range.id < 0 || range.high < floor) continue;
      const Candidate found{range.low, range.id};
      if (end - heap < left) {
        *end++ = found;
        if (end - heap == left) std::make_heap(heap, end, better);
      } else if (left > 0 && better(found, heap[0])) {
        std::pop_heap(heap, end, better);
        end[-1] = found;
        std::push_heap(heap, end, better);
      }
    }
    for (Candidate* chosen = heap; chosen != end; ++chosen) *ids++ = chosen->id;
    return true;
  }

  // What one token of a block scores, the block scores at least: `count` blocks of more than so
  // many reach the least of these, so that no block whose bound stays below it is among the best.
  float floor_of(const Tile& tile, int64_t lane, int64_t first, int64_t last, int64_t count,
                 Memory& memory) {
    int32_t* const likely = memory.likely.data();
    int32_t* end = likely;
    select(bounds(tile, lane), first, last, count, memory.heap.data(), end);
    float least = std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < count; ++i) {
      least = std::min(least, score_of_token(tile, lane, likely[i], memory));
    }
    return least;
  }

  // The n-th largest, from one on, of one end of the ranges.
  static float nth_largest(float Range::*side, int64_t n, Memory& memory) {
    std::vector<float>& values = memory.values;
    values.clear();
    for (const Range& range : memory.ranges) values.push_back(range.*side);
    std::nth_element(values.begin(), values.begin() + n - 1, values.end(), std::greater<float>());
    return values[n - 1];
  }

  float score_of_token(const Tile& tile, int64_t lane, int64_t block, Memory& memory) {
    const float slack = memory.slack[lane];
    if (!(slack == slack) || bounds(tile, lane)[block] == kMinusInfinity) return kMinusInfinity;
    if (tokens(tile, lane)[block] == kWhole) return bounds(tile, lane)[block];
    const int64_t token = static_cast<int64_t>(tokens(tile, lane)[block]);
    return exactly(page_of(tile, block), token, &memory.codes[lane * padded_], memory);
  }

  float score_of_block(const Tile& tile, int64_t lane, int64_t block, Memory& memory) {
    const int64_t page = page_of(tile, block), seen = seen_by(tile, lane, block);
    const int16_t* const codes = &memory.codes[lane * padded_];
    const float slack = memory.slack[lane];
    float best = kMinusInfinity;
    for (int64_t token = 0; token < seen; ++token) {
      const int32_t high = product(row_of(pages_, page, token, &memory.rows[0]), codes, padded_);
      const float scale = scale_of(page, token);
      if (!((high * 256.0f + slack) * scale > best)) continue;
      const int8_t* low = row_of(low_, page, token, &memory.rows[padded_]);
      const float found = score_of(high, product(low, codes, padded_), scale);
      best = found > best ? found : best;
    }
    return best;
  }

  float exactly(int64_t page, int64_t token, const int16_t* codes, Memory& memory) const {
    const int8_t* high = row_of(pages_, page, token, &memory.rows[0]);
    const int8_t* low = row_of(low_, page, token, &memory.rows[padded_]);
    const float score = score_of(product(high, codes, padded_), product(low, codes, padded_),
                                 scale_of(page, token));
    return score == score ? score : kMinusInfinity;
  }

  const Array &low_, &scales_;
  const int64_t padded_;
  std::vector<Memory> memory_;
};

}  // namespace
}  // namespace m3

extern "C" int64_t m3_index_topk(const m3::Array* q, const m3::Array* pages,
                                 const m3::Array* scales_of_keys, const m3::Array* low,
                                 const m3::Array* page_table,
                                 const m3::Array* cu_seqlens_q, const m3::Array* seq_lens,
                                 const m3::Array* out, const m3::Array* share_first,
                                 const m3::Array* share_end, const m3::Array* scores,
                                 int64_t num_local, int64_t num_init, int64_t threads,
                                 int64_t work_per_thread, int64_t* bad) {
  try {
    const m3::Batch batch{*page_table, *cu_seqlens_q, *seq_lens};
    const m3::Team team{threads, work_per_thread};
    const m3::Share share{share_first, share_end, scores};
    if (low != nullptr) {
      return m3::PlanesTopk(*q, *pages, *low, *scales_of_keys, batch, *out, share, num_local,
                            num_init, team)
          .run(bad);
    }
    return m3::IndexTopk(*q, *pages, scales_of_keys, batch, *out, share, num_local, num_init, team)
        .run(bad);
  } catch (const std::bad_alloc&) {
    return m3::kOutOfMemory;
  }
}
