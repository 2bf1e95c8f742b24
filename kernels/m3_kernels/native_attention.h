// Attention over the blocks of paged keys: what `sparse_attention` and `dense_attention` share.
//
// Every block that a row reads becomes a partial softmax of its own; partials are merged one after
// another by `merge`. An op says which blocks a row reads and in which order they are merged, and
// has one order for every way of dividing the work: that is what makes bits independent of it.
#pragma once

#include "native_common.h"

#include <algorithm>
#include <vector>

namespace m3 {

constexpr int64_t kTileLanes = 1024;  // (row, query head of the group) pairs of a tile, at most
constexpr int64_t kItemsPerThread = 4;
// Lanes that go through a block together: their queries and logits stay in the nearest cache.
constexpr int64_t kChunkLanes = 4 * kRowTile;

// Rows share converted pages within a tile, threads share tiles: as large as leaves enough tiles.
inline int64_t rows_per_tile(int64_t rows, int64_t kv_heads, int64_t group, int64_t threads) {
  const int64_t most = kTileLanes / std::max<int64_t>(1, group);
  const int64_t fair = rows * kv_heads / (threads * kItemsPerThread);
  return std::max<int64_t>(1, std::min(most, fair));
}

// Sum of exponentials relative to `max`, and the weighted values, of one query head over some keys.
struct Softmax {
  float max, sum;
  float* values;
};

inline void clear(Softmax& state, int64_t width) {
  state.max = kMinusInfinity;
  state.sum = 0;
  std::memset(state.values, 0, width * 4);
}

inline void copy(Softmax& into, const Softmax& from, int64_t width) {
  into.max = from.max;
  into.sum = from.sum;
  std::memcpy(into.values, from.values, width * 4);
}

// exp(x - max) where max is the largest of several; both may be -inf.
inline float weight(float x, float max) {
  return x == kMinusInfinity ? 0.0f : exp_nonpositive(x - max);
}

inline void merge(Softmax& into, const Softmax& part, int64_t width) {
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

// Consecutive rows of one request; the first stands at `position`, -1 if none of them sees a key.
struct Tile {
  int64_t request, row, rows, position;
};

// One row's share of a block: which query rows, and how many of the block's keys it sees.
struct Reader {
  int64_t lane;  // of its first query head
  int64_t keys;
};

// What one thread needs to work on one tile.
struct AttentionWorkspace {
  std::unique_ptr<Scratch> memory;
  float *queries, *k_panels, *v_panels, *logits;
  std::vector<Softmax> states;  // one per lane of the tile
  std::vector<Softmax> parts;   // one per lane of a chunk
  std::vector<const float*> a;
  std::vector<float*> c;
  std::vector<Reader> readers;
};

class PagedAttention {
 protected:
  PagedAttention(const Array& q, const Array& k, const Array& v, const Batch& batch, float scale,
                 const Array& out, const Array* lse)
      : q_(q), k_(k), v_(v), batch_(batch), scale_(scale), out_(out), lse_(lse),
        kv_heads_(k.size[1]), group_(q.size[1] / k.size[1]), dim_(q.size[2]),
        width_(round_up(dim_, kPanel)), page_size_(k.size[2]),
        padded_keys_(round_up(page_size_, kPanel)) {}

  // Multiply-adds of one row and KV head over `blocks` blocks, conversion of their pages included.
  int64_t work_of(int64_t blocks) const {
    return blocks * (group_ + kConversionWork) * page_size_ * dim_ * 2;
  }

  // For tiles of up to `rows` rows with `states_per_lane` results in the making.
  void make(AttentionWorkspace& w, int64_t rows, int64_t states_per_lane) const {
    const int64_t lanes = rows * group_, chunk = kChunkLanes;
    const int64_t k_floats = padded_keys_ * dim_, v_floats = page_size_ * width_;
    w.memory = std::make_unique<Scratch>(
        1, k_floats + v_floats + lanes * width_ * (1 + states_per_lane) +
               chunk * (padded_keys_ + width_) + 6 * kCacheLine);
    float* next = w.memory->part(0);
    const auto take = [&](int64_t floats) {
      float* const taken = next;
      next += round_up(floats, kCacheLine);
      return taken;
    };
    w.k_panels = take(k_floats);
    w.v_panels = take(v_floats);
    w.logits = take(chunk * padded_keys_);
    float* const parts = take(chunk * width_);
    w.queries = take(lanes * width_);
    float* const states = take(lanes * states_per_lane * width_);
    w.states.resize(lanes * states_per_lane);
    w.parts.resize(chunk);
    w.a.resize(chunk);
    w.c.resize(chunk);
    w.readers.reserve(rows);
    for (size_t i = 0; i < w.states.size(); ++i) w.states[i].values = states + i * width_;
    for (int64_t i = 0; i < chunk; ++i) w.parts[i].values = parts + i * width_;
  }

  std::vector<Tile> cut_into_tiles(int64_t tile_rows) const {
    std::vector<Tile> tiles;
    // Rows of no request, padding among them, become tiles at position -1: zero and nothing else.
    int64_t done = 0;
    const auto add = [&](int64_t request, int64_t first, int64_t last, int64_t position) {
      for (int64_t row = first; row < last; row += tile_rows) {
        const int64_t at = position < 0 ? -1 : position + row - first;
        tiles.push_back({request, row, std::min(tile_rows, last - row), at});
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

  void load_queries(int64_t head, int64_t row, float* to) const {
    for (int64_t g = 0; g < group_; ++g) {
      const int64_t offset = row * q_.stride[0] + (head * group_ + g) * q_.stride[1];
      load_floats(to + g * width_, element(q_, offset), q_.dtype, dim_);
    }
  }

  // The partial softmax of one block for every reader, handed to `done(lane, part)`. Readers are in
  // the order of their rows, so that those which see equally many keys stand together.
  template <typename Done>
  void attend_block(AttentionWorkspace& w, int64_t request, int64_t head, int64_t block,
                    const Done& done) {
    if (w.readers.empty()) return;
    const int64_t page = block < batch_.max_pages() ? batch_.page(request, block) : -1;
    if (page < 0 || page >= k_.size[0]) {
      if (block < batch_.max_pages()) {
        failure_.set(kPageOutsidePool, page);
      } else {
        failure_.set(kPageTableTooNarrow, block + 1);
      }
      clear(w.parts[0], width_);
      for (const Reader& reader : w.readers) {
        for (int64_t g = 0; g < group_; ++g) done(reader.lane + g, w.parts[0]);
      }
      return;
    }
    const char* keys = element(k_, page * k_.stride[0] + head * k_.stride[1]);
    const char* values = element(v_, page * v_.stride[0] + head * v_.stride[1]);
    const int64_t count = w.readers.back().keys;
    // A page is converted once: panel by panel as it is needed if all lanes go together.
    const bool together = static_cast<int64_t>(w.readers.size()) * group_ <= kChunkLanes &&
                          w.readers.front().keys == count;
    if (!together) {
      for (int64_t key = 0; key < count; key += kPanel) {
        pack_key_panel(keys, key, count, w.k_panels + key * dim_);
      }
      stream_rows(values, v_.stride[2], v_.dtype, count, dim_);
      for (int64_t d = 0; d < dim_; d += kPanel) {
        pack_value_panel(values, d, count, w.v_panels + d * page_size_);
      }
    }
    // No row's sum runs past the keys it sees: what lies there may be NaN, and a weight of zero
    // would not silence it.
    for (size_t first = 0; first < w.readers.size();) {
      const int64_t seen = w.readers[first].keys;
      size_t last = first;
      while (last < w.readers.size() && w.readers[last].keys == seen) ++last;
      const int64_t lanes = static_cast<int64_t>(last - first) * group_;
      for (int64_t from = 0; from < lanes; from += kChunkLanes) {
        const int64_t rows = std::min(kChunkLanes, lanes - from);
        const auto lane = [&](int64_t i) {
          return w.readers[first + (from + i) / group_].lane + (from + i) % group_;
        };
        for (int64_t i = 0; i < rows; ++i) w.a[i] = w.queries + lane(i) * width_;
        for (int64_t key = 0; key < seen; key += kPanel) {
          float* panel = together ? w.k_panels : w.k_panels + key * dim_;
          if (together) pack_key_panel(keys, key, count, panel);
          for (int64_t i = 0; i < rows; ++i) w.c[i] = w.logits + i * padded_keys_ + key;
          multiply_panel(w.a.data(), rows, panel, dim_, w.c.data());
        }
        for (int64_t i = 0; i < rows; ++i) {
          w.a[i] = w.logits + i * padded_keys_;
          exponentiate(w.logits + i * padded_keys_, seen, w.parts[i]);
        }
        if (together) stream_rows(values, v_.stride[2], v_.dtype, count, dim_);
        for (int64_t d = 0; d < dim_; d += kPanel) {
          float* panel = together ? w.v_panels : w.v_panels + d * page_size_;
          if (together) pack_value_panel(values, d, count, panel);
          for (int64_t i = 0; i < rows; ++i) w.c[i] = w.parts[i].values + d;
          multiply_panel(w.a.data(), rows, panel, seen, w.c.data());
        }
        for (int64_t i = 0; i < rows; ++i) done(lane(i), w.parts[i]);
      }
      first = last;
    }
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

  const Array &q_, &k_, &v_;
  const Batch& batch_;
  const float scale_;
  const Array& out_;
  const Array* lse_;
  const int64_t kv_heads_, group_, dim_, width_, page_size_, padded_keys_;
  Failure failure_;

 private:
  void pack_key_panel(const char* keys, int64_t key, int64_t count, float* panel) const {
    const int64_t present = std::min(kPanel, count - key);
    const char* rows = keys + key * k_.stride[2] * element_size(k_.dtype);
    stream_rows(rows, k_.stride[2], k_.dtype, present, dim_);
    pack_keys(panel, rows, k_.stride[2], k_.dtype, present, dim_);
  }

  void pack_value_panel(const char* values, int64_t d, int64_t count, float* panel) const {
    pack_rows(panel, values + d * element_size(v_.dtype), v_.stride[2], v_.dtype, count,
              std::min(kPanel, dim_ - d));
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
};

}  // namespace m3
