// quantised_linear: a work item is a tile of weight rows of one group and a tile of its rows of x.
#include "native_matrix.h"

namespace m3 {
namespace {

void run(const Array& x, const Matrix& matrix, const Array& starts, const Array& out,
         const Team& team) {
  const int64_t groups = matrix.groups(), rows = matrix.rows();
  const auto start = [&](int64_t g) -> int64_t { return load<int32_t>(element(starts, g)); };
  const int64_t used = start(groups) - start(0);
  const int64_t threads = team.size(used * rows * matrix.columns());
  const FloatRows input(x, threads);
  struct Item {
    int64_t group, row, rows, first;
  };
  std::vector<Item> items;
  int64_t most = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t last = start(g + 1);
    const int64_t step = tile_rows(last - start(g));
    for (int64_t t = start(g); t < last; t += kManyRows) {
      const int64_t here = std::min(kManyRows, last - t);
      most = std::max(most, here);
      for (int64_t first = 0; first < rows; first += step) items.push_back({g, t, here, first});
    }
  }
  const int64_t num_items = static_cast<int64_t>(items.size());
  std::vector<std::unique_ptr<TileWorkspace>> workspaces;
  for (int64_t t = 0; t < threads; ++t) workspaces.push_back(std::make_unique<TileWorkspace>(most));
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    TileWorkspace& w = *workspaces[omp_get_thread_num()];
    for (int64_t i; (i = next.fetch_add(1)) < num_items;) {
      const Item& item = items[i];
      const int64_t step = tile_rows(start(item.group + 1) - start(item.group));
      const int64_t count = std::min(step, rows - item.first);
      int64_t weight_rows[kTileRows];
      for (int64_t n = 0; n < count; ++n) weight_rows[n] = item.first + n;
      multiply_tile(matrix, item.group, weight_rows, count, input.rows() + item.row, item.rows, w);
      for (int64_t m = 0; m < item.rows; ++m) {
        const int64_t at = (item.row + m) * out.stride[0] + item.first;
        char* to = const_cast<char*>(element(out, at));
        store_floats(to, out.dtype, w.results() + m * kTileRows, count);
      }
    }
  }
}

}  // namespace
}  // namespace m3

extern "C" int64_t m3_quantised_linear(const m3::Array* x, const m3::Array* codes,
                                       const m3::Array* scales, const m3::Array* zeros,
                                       const m3::Array* factors, int64_t kind, int64_t group,
                                       const m3::Array* starts, const m3::Array* out,
                                       int64_t threads, int64_t work_per_thread, int64_t* bad) {
  *bad = 0;
  try {
    const m3::Matrix matrix{*codes, scales, zeros, factors, kind, group};
    m3::run(*x, matrix, *starts, *out, {threads, work_per_thread});
    return m3::kOk;
  } catch (const std::bad_alloc&) {
    return m3::kOutOfMemory;
  }
}

extern "C" const char* m3_vector_family() { return m3::vector_family(); }
