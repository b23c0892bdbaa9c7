// Symmetric matrices of 32-bit elements and their packed lower triangles: row i of the triangle, i + 1 elements, begins
// at i (i + 1) / 2. Copies alone.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "threads.h"

namespace ds_optim {

constexpr int64_t kTile = 16;  // rows and columns that are mirrored together: a cache line of elements

inline int64_t row_of_triangle(int64_t row) { return row * (row + 1) / 2; }

// Calls work(matrix, first, last) for panels of rows of every matrix; their edges are multiples of kTile.
template <class Work>
void by_panels(int64_t count, int64_t order, int64_t threads, const Work& work) {
  const int64_t rows = std::max(kTile, kTask / std::max<int64_t>(order, 1) / kTile * kTile);
  const int64_t panels = (order + rows - 1) / rows;
  run_tasks(count * panels, threads, [&](int64_t task) {
    const int64_t first = task % panels * rows;
    work(task / panels, first, std::min(first + rows, order));
  });
}

inline void pack_triangles(const uint32_t* squares, uint32_t* packed, int64_t count, int64_t order, int64_t threads) {
  by_panels(count, order, threads, [&](int64_t matrix, int64_t first, int64_t last) {
    const uint32_t* square = squares + matrix * order * order;
    uint32_t* triangle = packed + matrix * row_of_triangle(order);
    for (int64_t i = first; i < last; ++i) {
      std::memcpy(triangle + row_of_triangle(i), square + i * order, size_t(i + 1) * sizeof *square);
    }
  });
}

// With `both`, what is above the diagonal mirrors what is below; otherwise it stays as it is. A panel of rows writes
// these rows up to the diagonal, and the columns above it.
inline void unpack_triangles(const uint32_t* packed, uint32_t* squares, int64_t count, int64_t order, bool both,
                             int64_t threads) {
  by_panels(count, order, threads, [&](int64_t matrix, int64_t first, int64_t last) {
    uint32_t* square = squares + matrix * order * order;
    const uint32_t* triangle = packed + matrix * row_of_triangle(order);
    for (int64_t top = first; top < last; top += kTile) {
      const int64_t bottom = std::min(top + kTile, last);
      for (int64_t i = top; i < bottom; ++i) {
        std::memcpy(square + i * order, triangle + row_of_triangle(i), size_t(i + 1) * sizeof *square);
      }
      for (int64_t left = 0; both && left < bottom; left += kTile) {
        for (int64_t j = left; j < std::min(left + kTile, bottom); ++j) {
          for (int64_t i = std::max(top, j + 1); i < bottom; ++i) square[j * order + i] = square[i * order + j];
        }
      }
    }
  });
}

}  // namespace ds_optim
