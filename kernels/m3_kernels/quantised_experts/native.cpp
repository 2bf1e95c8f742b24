// quantised_experts: tokens sorted by expert, products with w13 and the activation, then with w2.
//
// A work item of the first half is a tile of an expert's gate rows with the up rows that belong to
// them, one of the second a tile of output channels, of which its thread adds up all experts in
// their order. So each stored byte of an expert that has tokens is read once per kManyRows of them.
#include "native_matrix.h"

namespace m3 {
namespace {

struct Activation {
  float alpha, limit, beta;

  float operator()(float gate, float up) const {
    const float g = gate > limit ? limit : gate;
    const float u = up > limit ? limit : up < -limit ? -limit : up;
    const float z = alpha * g;
    // e^-|z| never overflows
    const float e = exp_nonpositive(z < 0 ? z : -z);
    const float sigmoid = z < 0 ? e / (1.0f + e) : 1.0f / (1.0f + e);
    return (u + beta) * (g * sigmoid);
  }
};

class Experts {
 public:
  Experts(const Array& x, const Matrix& w13, const Matrix& w2, const Array& ids,
          const Array& weights, const Activation& activation, const Array& out, const Team& team)
      : w13_(w13), w2_(w2), weights_(weights), activation_(activation), out_(out) {
    const int64_t tokens = ids.size[0], choices = ids.size[1], experts = w13.groups();
    starts_.assign(experts + 1, 0);
    const auto id = [&](int64_t t, int64_t k) -> int64_t {
      const int64_t found = load<int32_t>(element(ids, t * ids.stride[0] + k * ids.stride[1]));
      return found < 0 || found >= experts ? -1 : found;
    };
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t k = 0; k < choices; ++k) {
        if (id(t, k) >= 0) ++starts_[id(t, k) + 1];
      }
    }
    for (int64_t e = 0; e < experts; ++e) starts_[e + 1] += starts_[e];
    places_.resize(starts_[experts]);
    std::vector<int64_t> next(starts_.begin(), starts_.end() - 1);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t k = 0; k < choices; ++k) {
        if (id(t, k) >= 0) places_[next[id(t, k)]++] = {t, k};
      }
    }
    const int64_t inner = w2.columns();
    threads_ = team.size(starts_[experts] * 3 * inner * w13.columns());
    input_ = std::make_unique<FloatRows>(x, threads_);
    const int64_t chosen = static_cast<int64_t>(places_.size());
    inner_ = std::make_unique<Scratch>(chosen, inner);
    for (const Place& place : places_) hidden_rows_.push_back(input_->row(place.token));
    for (int64_t i = 0; i < chosen; ++i) inner_rows_.push_back(inner_->part(i));
    sums_ = std::make_unique<Scratch>(tokens, w2.rows());
  }

  void run() {
    const int64_t inner = w2_.columns(), hidden = w2_.rows(), experts = w13_.groups();
    struct Item {
      int64_t expert, first, count;
    };
    std::vector<Item> items;
    int64_t most = 0;
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t tokens = starts_[e + 1] - starts_[e];
      if (tokens == 0) continue;
      most = std::max(most, tokens);
      const int64_t pairs = tile_rows(tokens) / 2;
      for (int64_t first = 0; first < inner; first += pairs) {
        items.push_back({e, first, std::min(pairs, inner - first)});
      }
    }
    const int64_t num_items = static_cast<int64_t>(items.size());
    const int64_t step = tile_rows(most), num_tiles = ceil_div(hidden, step);
    std::vector<std::unique_ptr<TileWorkspace>> workspaces;
    for (int64_t t = 0; t < threads_; ++t) {
      workspaces.push_back(std::make_unique<TileWorkspace>(most));
    }
    std::atomic<int64_t> next_item{0}, next_tile{0};
#pragma omp parallel num_threads(static_cast<int>(threads_))
    {
      TileWorkspace& w = *workspaces[omp_get_thread_num()];
      for (int64_t i; (i = next_item.fetch_add(1)) < num_items;) {
        activate(w, items[i].expert, items[i].first, items[i].count);
      }
#pragma omp barrier
      for (int64_t i; (i = next_tile.fetch_add(1)) < num_tiles;) {
        const int64_t first = i * step;
        add_up(w, first, std::min(step, hidden - first));
      }
    }
  }

 private:
  struct Place {
    int64_t token, choice;
  };

  // SwiGLU of an expert's channels first .. first + count, for its tokens.
  void activate(TileWorkspace& w, int64_t expert, int64_t first, int64_t count) {
    int64_t rows[kTileRows];
    for (int64_t n = 0; n < count; ++n) {
      rows[n] = first + n;
      rows[count + n] = w2_.columns() + first + n;
    }
    for (int64_t i = starts_[expert]; i < starts_[expert + 1]; i += kManyRows) {
      const int64_t tile = std::min(kManyRows, starts_[expert + 1] - i);
      multiply_tile(w13_, expert, rows, 2 * count, hidden_rows_.data() + i, tile, w);
      for (int64_t m = 0; m < tile; ++m) {
        const float* result = w.results() + m * kTileRows;
        float* to = inner_->part(i + m) + first;
        for (int64_t n = 0; n < count; ++n) to[n] = activation_(result[n], result[count + n]);
      }
    }
  }

  // Output channels first .. first + count of all tokens.
  void add_up(TileWorkspace& w, int64_t first, int64_t count) {
    int64_t rows[kTileRows];
    for (int64_t n = 0; n < count; ++n) rows[n] = first + n;
    for (int64_t t = 0; t < out_.size[0]; ++t) {
      std::fill_n(sums_->part(t) + first, count, 0.0f);
    }
    for (int64_t e = 0; e < w2_.groups(); ++e) {
      for (int64_t i = starts_[e]; i < starts_[e + 1]; i += kManyRows) {
        const int64_t tile = std::min(kManyRows, starts_[e + 1] - i);
        multiply_tile(w2_, e, rows, count, inner_rows_.data() + i, tile, w);
        for (int64_t m = 0; m < tile; ++m) {
          const Place& place = places_[i + m];
          const int64_t at = place.token * weights_.stride[0] + place.choice * weights_.stride[1];
          const float weight = load<float>(element(weights_, at));
          float* sum = sums_->part(place.token) + first;
          const float* result = w.results() + m * kTileRows;
          for (int64_t n = 0; n < count; ++n) sum[n] = std::fma(weight, result[n], sum[n]);
        }
      }
    }
    for (int64_t t = 0; t < out_.size[0]; ++t) {
      char* to = const_cast<char*>(element(out_, t * out_.stride[0] + first));
      store_floats(to, out_.dtype, sums_->part(t) + first, count);
    }
  }

  const Matrix& w13_;
  const Matrix& w2_;
  const Array& weights_;
  const Activation activation_;
  const Array& out_;
  int64_t threads_ = 1;
  std::vector<int64_t> starts_;  // of each expert among the places
  std::vector<Place> places_;    // tokens by expert
  std::unique_ptr<FloatRows> input_;
  std::unique_ptr<Scratch> inner_, sums_;
  std::vector<const float*> hidden_rows_, inner_rows_;
};

}  // namespace
}  // namespace m3

extern "C" int64_t m3_quantised_experts(
    const m3::Array* x, const m3::Array* codes13, const m3::Array* scales13,
    const m3::Array* zeros13, const m3::Array* factors13, const m3::Array* codes2,
    const m3::Array* scales2, const m3::Array* zeros2, const m3::Array* factors2, int64_t kind13,
    int64_t group13, int64_t kind2, int64_t group2, const m3::Array* ids,
    const m3::Array* weights, float alpha, float limit, float beta, const m3::Array* out,
    int64_t threads, int64_t work_per_thread, int64_t* bad) {
  *bad = 0;
  try {
    const m3::Matrix w13{*codes13, scales13, zeros13, factors13, kind13, group13};
    const m3::Matrix w2{*codes2, scales2, zeros2, factors2, kind2, group2};
    const m3::Activation activation{alpha, limit, beta};
    m3::Experts(*x, w13, w2, *ids, *weights, activation, *out, {threads, work_per_thread}).run();
    return m3::kOk;
  } catch (const std::bad_alloc&) {
    return m3::kOutOfMemory;
  }
}
