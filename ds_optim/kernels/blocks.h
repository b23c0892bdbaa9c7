// The blocks that the run tables describe (ds_optim/kernels/tables.py), and their sums of squared gradients.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "storage.h"
#include "threads.h"

namespace ds_optim {

constexpr int64_t kSumChunk = 512;             // elements summed in fp32; fp64 from there on
constexpr int64_t kSumPart = 1 << 16;          // elements summed by one thread
constexpr int64_t kSumRows = 32;               // rows of a column summed in fp32; fp64 from there on
constexpr int64_t kPartColumns = 8192;         // columns that one thread takes at a time
constexpr int64_t kBatchPerThread = 1 << 20;   // elements of column runs that are summed, then updated, together

// `blocks` neighbouring blocks of which `length` elements each lie here; numel elements each in the whole parameter.
struct Piece {
  int64_t tensor, start, blocks, length, numel, slot, cut;
};

// One row of column_runs.
struct ColumnRun {
  int64_t tensor, start, length, phase, row_length, column_start, column_stop, width, slot, cut, block_numel;

  int64_t columns() const { return column_stop - column_start; }
  int64_t blocks() const { return columns() / width; }
};
static_assert(sizeof(ColumnRun) == 11 * sizeof(int64_t), "a ColumnRun is read straight from the table");

enum Select : int64_t { kAll = 0, kUncut = 1, kCut = 2 };

struct Blocks {
  std::vector<Piece> pieces;
  std::vector<ColumnRun> columns;
};

// Reads both tables. Returns 0, or the number of the first bad row: from 1 in row_runs, from -1 downwards in column_runs.
inline int64_t read_blocks(const int64_t* row_runs, int64_t rows, const int64_t* column_runs, int64_t column_rows,
                    int64_t tensors, const int64_t* numels, const int64_t* slots, int64_t cuts, int64_t select,
                    Blocks* blocks) {
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t* run = row_runs + 8 * row;
    const int64_t tensor = run[0], start = run[1], length = run[2], phase = run[3], width = run[4], slot = run[5];
    int64_t cut_first = run[6], cut_last = run[7];
    if (tensor < 0 || tensor >= tensors || start < 0 || length < 0 || length > numels[tensor] - start) return row + 1;
    if (length == 0) continue;
    if (width <= 0 || phase < 0 || phase >= width) return row + 1;
    const int64_t count = (phase + length + width - 1) / width;
    if (count == 1) cut_first = cut_last = std::max(cut_first, cut_last);
    if (slots != nullptr && (slot < 0 || count > slots[tensor] - slot)) return row + 1;
    if (cut_first >= cuts || cut_last >= cuts) return row + 1;
    if ((phase > 0 || length < width) && cut_first < 0) return row + 1;
    if ((phase + length) % width > 0 && cut_last < 0) return row + 1;
    const int64_t first = cut_first >= 0, last = cut_last >= 0 && count > 1, whole = count - first - last;
    const int64_t first_length = std::min(width - phase, length), whole_start = start + first * first_length;
    const int64_t last_start = whole_start + whole * width;
    if (first && select != kUncut) {
      blocks->pieces.push_back({tensor, start, 1, first_length, width, slot, cut_first});
    }
    if (whole && select != kCut) {
      blocks->pieces.push_back({tensor, whole_start, whole, width, width, slot + first, -1});
    }
    if (last && select != kUncut) {
      const int64_t last_length = start + length - last_start;
      blocks->pieces.push_back({tensor, last_start, 1, last_length, width, slot + count - 1, cut_last});
    }
  }
  for (int64_t row = 0; row < column_rows; ++row) {
    ColumnRun run;
    std::memcpy(&run, column_runs + 11 * row, sizeof run);
    const int64_t bad = -(row + 1);
    if (run.tensor < 0 || run.tensor >= tensors || run.start < 0 || run.length < 0) return bad;
    if (run.length > numels[run.tensor] - run.start || run.phase < 0 || run.row_length <= 0) return bad;
    if (run.column_start < 0 || run.column_start > run.column_stop || run.column_stop > run.row_length) return bad;
    if (run.width <= 0 || (run.column_stop - run.column_start) % run.width != 0 || run.block_numel <= 0) return bad;
    if (slots != nullptr && (run.slot < 0 || run.blocks() > slots[run.tensor] - run.slot)) return bad;
    if (run.cut >= 0 && run.blocks() > cuts - run.cut) return bad;
    if (run.length == 0 || (select == kUncut && run.cut >= 0) || (select == kCut && run.cut < 0)) continue;
    blocks->columns.push_back(run);
  }
  return 0;
}

// Kept as vectors by name: as arrays, lanes spend short blocks travelling through the stack.
typedef float Lanes __attribute__((vector_size(64)));
typedef double Doubles __attribute__((vector_size(64)));
constexpr int64_t kLanes = sizeof(Lanes) / sizeof(float);

inline Doubles low(Lanes x) {
  typedef float Half __attribute__((vector_size(32)));
  Half half;
  std::memcpy(&half, &x, sizeof half);
  return __builtin_convertvector(half, Doubles);
}

inline Doubles high(Lanes x) {
  typedef float Half __attribute__((vector_size(32)));
  Half half;
  std::memcpy(&half, reinterpret_cast<const char*>(&x) + sizeof half, sizeof half);
  return __builtin_convertvector(half, Doubles);
}

inline Lanes load_lanes(const float* x) {
  Lanes lanes;
  std::memcpy(&lanes, x, sizeof lanes);
  return lanes;
}

// The squares of at most kSumChunk elements, as partial sums.
inline Doubles chunk_squares(const float* x, int64_t n) {
  Lanes even = {}, odd = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    DS_OPTIM_FETCH(x + i, 0);
    DS_OPTIM_FETCH(x + i + kLanes, 0);
    const Lanes a = load_lanes(x + i), b = load_lanes(x + i + kLanes);
    even += a * a;
    odd += b * b;
  }
  if (i + kLanes <= n) {
    const Lanes a = load_lanes(x + i);
    even += a * a;
    i += kLanes;
  }
  if (i < n) {
    float rest[kLanes] = {};
    std::memcpy(rest, x + i, size_t(n - i) * sizeof(float));
    const Lanes a = load_lanes(rest);
    odd += a * a;
  }
  return (low(even) + low(odd)) + (high(even) + high(odd));
}

inline double sum_of(Doubles x) { return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7])); }

// At most kSumPart elements.
inline double sum_part(const View& grad, int64_t start, int64_t n) {
  alignas(64) float buffer[kSumChunk];
  Doubles total = {};
  for (int64_t done = 0; done < n; done += kSumChunk) {
    const int64_t size = std::min(kSumChunk, n - done);
    total += chunk_squares(grad.at(start + done, size, buffer), size);
  }
  return sum_of(total);
}

inline double sum_squares(const View& grad, int64_t start, int64_t n) {
  if (grad.base == nullptr) return 0.0;
  double sum = 0.0;
  for (int64_t done = 0; done < n; done += kSumPart) sum += sum_part(grad, start + done, std::min(kSumPart, n - done));
  return sum;
}

// Column runs a few stripes at a time, so that their gradient is still in the shared cache when it is read again for the
// update. Memory is walked along rows; a column is summed in fp32 over the rows of one part, in fp64 over parts.
class ColumnBatch {
 public:
  // Blocks [first, last) of a run: about kPartColumns columns, all rows.
  struct Stripe {
    const ColumnRun* run;
    int64_t first, last, first_part, last_part;
    int64_t column;  // the first of the stripe's columns, counting all columns of the batch

    int64_t begin() const { return run->column_start + first * run->width; }
    int64_t end() const { return run->column_start + last * run->width; }
  };
  // Columns [first, last) of `rows` rows of a stripe; the first element is at `start`.
  struct Part {
    int64_t stripe, start, rows, first, last;
    int64_t sums;  // place of the columns' sums, -1 if they are not taken
  };

  std::vector<Stripe> stripes;
  std::vector<Part> parts;
  int64_t columns = 0;

  ColumnBatch(const Streams& streams, int64_t grad_stream, const std::vector<ColumnRun>& runs, bool sum_cut,
              int64_t threads)
      : streams_(streams), grad_stream_(grad_stream), runs_(runs), sum_cut_(sum_cut), threads_(threads) {}

  // Moves on to the next stripes and sums their columns, of cut blocks only or of whole blocks only. False at the end.
  bool next() {
    stripes.clear();
    parts.clear();
    columns = num_sums_ = 0;
    for (int64_t elements = 0; run_ < runs_.size() && elements < kBatchPerThread * threads_;) {
      const ColumnRun& run = runs_[run_];
      const int64_t last = std::min(block_ + std::max(int64_t(1), kPartColumns / run.width), run.blocks());
      elements += add_stripe(run, block_, last);
      block_ = last;
      if (block_ == run.blocks()) ++run_, block_ = 0;
    }
    sum_parts();
    return !stripes.empty();
  }

  // Sums of squares of the stripe's blocks.
  std::vector<double> block_sums(const Stripe& stripe) const {
    std::vector<double> by_column(size_t(stripe.end() - stripe.begin()), 0.0);
    for (int64_t p = stripe.first_part; p < stripe.last_part; ++p) {
      const Part& part = parts[size_t(p)];
      double* into = by_column.data() + part.first - stripe.begin();
      for (int64_t c = 0; part.sums >= 0 && c < part.last - part.first; ++c) into[c] += double(sums_[size_t(part.sums + c)]);
    }
    std::vector<double> by_block(size_t(stripe.last - stripe.first), 0.0);
    for (size_t c = 0; c < by_column.size(); ++c) by_block[c / size_t(stripe.run->width)] += by_column[c];
    return by_block;
  }

 private:
  // The end of a row begun elsewhere, whole rows, the beginning of a row that ends elsewhere. Returns their elements.
  int64_t add_stripe(const ColumnRun& run, int64_t first_block, int64_t last_block) {
    Stripe stripe{&run, first_block, last_block, int64_t(parts.size()), 0, columns};
    const bool has_grad = View(streams_, grad_stream_, run.tensor).base != nullptr;
    const bool summed = has_grad && (run.cut >= 0) == sum_cut_;
    int64_t elements = 0;
    for (int64_t position = run.phase, stop = run.phase + run.length; position < stop;) {
      const int64_t row_start = position - position % run.row_length;
      int64_t rows = 1, left = position - row_start, right = std::min(run.row_length, stop - row_start);
      if (left == 0 && right == run.row_length) rows = (stop - position) / run.row_length;
      left = std::max(left, stripe.begin());
      position = row_start + (rows - 1) * run.row_length + right;
      right = std::min(right, stripe.end());
      for (int64_t row = 0; row < rows; row += kSumRows) {
        for (int64_t c = left; c < right; c += kPartColumns) {
          const int64_t start = run.start + row_start + row * run.row_length + c - run.phase;
          const int64_t count = std::min(kSumRows, rows - row), last = std::min(c + kPartColumns, right);
          parts.push_back({int64_t(stripes.size()), start, count, c, last, summed ? num_sums_ : -1});
          if (summed) num_sums_ += last - c;
          elements += count * (last - c);
        }
      }
    }
    stripe.last_part = int64_t(parts.size());
    stripes.push_back(stripe);
    columns += stripe.end() - stripe.begin();
    return elements;
  }

  void sum_parts() {
    sums_.assign(size_t(num_sums_), 0.0f);
    if (num_sums_ == 0) return;
    run_tasks(int64_t(parts.size()), threads_, [&](int64_t task) {
      const Part& part = parts[size_t(task)];
      if (part.sums < 0) return;
      const ColumnRun& run = *stripes[size_t(part.stripe)].run;
      const View grad(streams_, grad_stream_, run.tensor);
      alignas(64) float buffer[kPartColumns];
      for (int64_t row = 0; row < part.rows; ++row) {
        const int64_t n = part.last - part.first;
        add_squares_by_column(grad.at(part.start + row * run.row_length, n, buffer), n, sums_.data() + part.sums);
      }
    });
  }

  __attribute__((noinline)) static void add_squares_by_column(const float* __restrict x, int64_t n,
                                                              float* __restrict sums) {
    int64_t c = 0;
    for (; c + kStep <= n; c += kStep) {
      for (int64_t line = c; line < c + kStep; line += kCacheLine) DS_OPTIM_FETCH(x + line, 0);
      for (int64_t i = c; i < c + kStep; ++i) sums[i] += x[i] * x[i];
    }
    for (; c < n; ++c) sums[c] += x[c] * x[c];
  }

  const Streams streams_;
  const int64_t grad_stream_;
  const std::vector<ColumnRun>& runs_;
  const bool sum_cut_;
  const int64_t threads_;
  size_t run_ = 0;
  int64_t block_ = 0, num_sums_ = 0;
  std::vector<float> sums_;
};

}  // namespace ds_optim
