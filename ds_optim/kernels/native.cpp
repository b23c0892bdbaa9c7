// Optimizer updates on CPU tensors: one call updates a list of flat tensors, block by block where the rule has blocks.
//
// A plain C interface without any torch header, so that it builds in seconds and outlives torch's ABI. native.py checks
// the tensors, loads this file and lends it torch's own OpenMP threads.
//
// Promises that these files keep:
// - An element's result does not depend on how tensors are cut into spans, nor on the number of threads. So: no fused
//   multiply-add (-ffp-contract=off), no approximate division or root, nothing whose order depends on the threads.
// - A block's sum of squares is taken over fixed chunks counted from the block's first local element: fp32 within a
//   chunk, fp64 from there on.
// - All arithmetic on elements is fp32, whatever the tensors' dtypes.
//
// storage.h: tensors and their formats. rounding.h: stochastic rounding to bf16. threads.h: who works on what.
// elementwise.h: AdamW, Lion, Adan, passes of whole-matrix rules. blocks.h: blocks and their sums. adam_mini.h: Adam-mini.
// coded.h: state in eight bits. triangles.h: packed symmetric matrices. This file: the interface, and the step of
// whole-matrix rules, whose updates are known.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "adam_mini.h"
#include "blocks.h"
#include "coded.h"
#include "elementwise.h"
#include "storage.h"
#include "threads.h"
#include "triangles.h"

namespace {

using namespace ds_optim;

// Sums over the local elements of cut blocks, added to cut_sums in the order of the tables.
void add_cut_sums(const Streams& streams, const Blocks& blocks, double* cut_sums, int64_t threads) {
  struct Part {
    const Piece* piece;
    int64_t start, length;
  };
  std::vector<Part> parts;
  for (const Piece& piece : blocks.pieces) {
    for (int64_t i = 0; i < piece.length; i += kSumPart) {
      parts.push_back({&piece, piece.start + i, std::min(kSumPart, piece.length - i)});
    }
  }
  std::vector<double> sums(parts.size());
  run_tasks(int64_t(parts.size()), threads, [&](int64_t task) {
    const Part& part = parts[size_t(task)];
    const View grad(streams, 0, part.piece->tensor);
    sums[size_t(task)] = grad.base == nullptr ? 0.0 : sum_part(grad, part.start, part.length);
  });
  for (size_t i = 0; i < parts.size(); ++i) cut_sums[parts[i].piece->cut] += sums[i];

  ColumnBatch batch(streams, 0, blocks.columns, true, threads);
  while (batch.next()) {
    for (const ColumnBatch::Stripe& stripe : batch.stripes) {
      double* into = cut_sums + stripe.run->cut + stripe.first;
      for (const double sum : batch.block_sums(stripe)) *into++ += sum;
    }
  }
}

// Blocks of codes as pieces. Returns 0, or the number (from 1) of the first bad row.
int64_t read_code_runs(const Streams& streams, const int64_t* code_runs, int64_t rows, const int64_t* numels,
                       const int64_t* slots, int64_t cuts, int64_t select, Blocks* blocks) {
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t* run = code_runs + 8 * row;
    if (run[4] > kCodeBlock) return row + 1;
    if (run[0] >= 0 && run[0] < streams.tensors && !streams.placed(run[0], run[1], run[2])) return row + 1;
  }
  return read_blocks(code_runs, rows, nullptr, 0, streams.tensors, numels, slots, cuts, select, blocks);
}

void subtract(float* __restrict p, const float* __restrict u, float decay, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = p[i] * decay - u[i];
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// The interface. Every function returns 0, or which row of a table is impossible (see update_spans, read_blocks).
// `rounding` is that of bf16 parameters, null for the nearest.

#pragma GCC visibility push(default)
extern "C" {

void ds_optim_use_threads(void* region, void* number) {
  parallel_region = reinterpret_cast<ParallelRegion>(region);
  thread_number = reinterpret_cast<int (*)()>(number);
}

#define DS_OPTIM_ELEMENTWISE(name, Rule)                                                                              \
  int64_t ds_optim_##name(int64_t tensors, const int64_t* const* streams, const int64_t* numels, const int64_t* spans, \
                          int64_t rows, const float* scalars, const Rounding* rounding, int64_t threads) {            \
    Rule rule;                                                                                                        \
    std::memcpy(&rule, scalars, sizeof rule);                                                                         \
    return update_spans(rule, Streams{streams, tensors, rounding}, numels, spans, rows, threads);                     \
  }

DS_OPTIM_ELEMENTWISE(adamw, AdamW)
DS_OPTIM_ELEMENTWISE(lion, Lion)
DS_OPTIM_ELEMENTWISE(adan, Adan)
DS_OPTIM_ELEMENTWISE(momentum, Momentum)
DS_OPTIM_ELEMENTWISE(adam_graft, AdamGraft)

int64_t ds_optim_partial_sums(int64_t tensors, const int64_t* const* streams, const int64_t* numels,
                              const int64_t* row_runs, int64_t rows, const int64_t* column_runs, int64_t column_rows,
                              double* cut_sums, int64_t cuts, int64_t threads) {
  Blocks blocks;
  const int64_t bad =
      read_blocks(row_runs, rows, column_runs, column_rows, tensors, numels, nullptr, cuts, kCut, &blocks);
  if (bad == 0) add_cut_sums(Streams{streams, tensors}, blocks, cut_sums, threads);
  return bad;
}

int64_t ds_optim_adam_mini(int64_t tensors, const int64_t* const* streams, const int64_t* numels, const int64_t* slots,
                           const int64_t* row_runs, int64_t rows, const int64_t* column_runs, int64_t column_rows,
                           const double* cut_sums, int64_t cuts, int64_t select, const float* scalars,
                           const Rounding* rounding, int64_t threads) {
  Blocks blocks;
  const int64_t bad =
      read_blocks(row_runs, rows, column_runs, column_rows, tensors, numels, slots, cuts, select, &blocks);
  if (bad != 0) return bad;
  const Streams all{streams, tensors, rounding};
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t* run = row_runs + 8 * row;
    if (!all.placed(run[0], run[1], run[2])) return row + 1;
  }
  for (int64_t row = 0; row < column_rows; ++row) {
    const int64_t* run = column_runs + 11 * row;
    if (!all.placed(run[0], run[1], run[2])) return -(row + 1);
  }
  AdamMini rule;
  std::memcpy(&rule, scalars, sizeof rule);
  AdamMiniStep(rule, all, blocks, cut_sums, threads).run();
  return 0;
}

// Where state is kept in eight bits: streams are parameter, gradient, codes; `scales` and `tables` by state, `slots` and
// `code_runs` of the blocks of codes. With only_maxima nothing is written but the largest magnitudes of cut blocks.
#define DS_OPTIM_CODED(name, Rule)                                                                                    \
  int64_t ds_optim_coded_##name(int64_t tensors, const int64_t* const* streams, const int64_t* numels,                \
                                const int64_t* const* scales, const int64_t* slots, const int64_t* code_runs,         \
                                int64_t rows, const CodeTable* tables, int32_t* cut_maxima, int64_t cuts,             \
                                int64_t select, int64_t only_maxima, const float* scalars, const Rounding* rounding,  \
                                int64_t threads) {                                                                    \
    const Streams all{streams, tensors, rounding};                                                                    \
    Blocks blocks;                                                                                                    \
    const int64_t bad = read_code_runs(all, code_runs, rows, numels, slots, cuts, select, &blocks);                   \
    if (bad != 0) return bad;                                                                                         \
    Rule rule;                                                                                                        \
    std::memcpy(&rule, scalars, sizeof rule);                                                                         \
    const auto apply = [&](int64_t, int64_t, float* const* x, auto n) { rule(x, 0, n); };                             \
    update_codes<Rule::kStreams - 2>(all, Codes{scales, tables, cut_maxima}, blocks.pieces, apply, only_maxima != 0,  \
                                     threads);                                                                        \
    return 0;                                                                                                         \
  }

DS_OPTIM_CODED(adamw, AdamW)
DS_OPTIM_CODED(lion, Lion)
DS_OPTIM_CODED(adan, Adan)

// Streams as for ds_optim_adam_mini, code blocks as above; all elements are updated. Bad rows of code_runs are told by a
// number beyond those of row_runs.
int64_t ds_optim_coded_adam_mini(int64_t tensors, const int64_t* const* streams, const int64_t* numels,
                                 const int64_t* const* scales, const int64_t* slots, const int64_t* code_runs,
                                 int64_t code_rows, const CodeTable* tables, int32_t* cut_maxima, int64_t code_cuts,
                                 int64_t only_maxima, const int64_t* block_slots, const int64_t* row_runs, int64_t rows,
                                 const int64_t* column_runs, int64_t column_rows, const double* cut_sums, int64_t cuts,
                                 const float* scalars, const Rounding* rounding, int64_t threads) {
  const Streams all{streams, tensors, rounding};
  Blocks coded, blocks;
  const int64_t select = only_maxima != 0 ? kCut : kAll;
  int64_t bad = read_code_runs(all, code_runs, code_rows, numels, slots, code_cuts, select, &coded);
  if (bad != 0) return rows + bad;
  bad = read_blocks(row_runs, rows, column_runs, column_rows, tensors, numels, block_slots, cuts, kAll, &blocks);
  if (bad != 0) return bad;
  AdamMini rule;
  std::memcpy(&rule, scalars, sizeof rule);
  const Codes codes{scales, tables, cut_maxima};
  if (only_maxima != 0) {
    const auto apply = [&](int64_t, int64_t, float* const* x, auto n) { rule.update(x[0], x[1], x[2], 0.0f, n); };
    update_codes<1>(all, codes, coded.pieces, apply, true, threads);
    return 0;
  }
  const std::vector<std::vector<float>> factors =
      AdamMiniStep(rule, all, blocks, cut_sums, threads).advance_blocks(block_slots);
  const BlockFactors known(row_runs, rows, column_runs, column_rows, factors);
  const auto apply = [&](int64_t tensor, int64_t start, float* const* x, auto n) {
    alignas(64) float spread[kCodeBlock];
    known.spread(tensor, start, n, spread);
    rule.update(x[0], x[1], x[2], static_cast<const float*>(spread), n);
  };
  update_codes<1>(all, codes, coded.pieces, apply, false, threads);
  return 0;
}

// param <- decay param - update over a matrix whose rows lie row_stride apart and whose updates lie row by row; `places`
// has one row, for a tensor 0 that begins at the matrix's first element.
void ds_optim_descend(void* param, int64_t dtype, const float* update, int64_t rows, int64_t columns, int64_t row_stride,
                      float decay, const Rounding* rounding, int64_t threads) {
  const int64_t total = rows * columns;
  run_tasks((total + kTask - 1) / kTask, threads, [&](int64_t task) {
    alignas(64) float buffer[kBuffer];
    const int64_t stop = std::min((task + 1) * kTask, total);
    for (int64_t done = task * kTask, n; done < stop; done += n) {
      const int64_t row = done / columns, start = row * row_stride + done - row * columns;
      n = std::min((row + 1) * columns - done, stop - done);
      if (dtype == kFloat32) {
        subtract(static_cast<float*>(param) + start, update + done, decay, n);
        continue;
      }
      n = std::min(n, kBuffer);
      load(param, dtype, start, n, buffer);
      subtract(buffer, update + done, decay, n);
      if (rounding != nullptr) {
        rounding->store(0, start, n, buffer, static_cast<uint16_t*>(param) + start);
      } else {
        store(param, dtype, start, n, buffer);
      }
    }
  });
}

// Matrices one behind the other, contiguous.
void ds_optim_pack(const uint32_t* squares, uint32_t* packed, int64_t count, int64_t order, int64_t threads) {
  pack_triangles(squares, packed, count, order, threads);
}

void ds_optim_unpack(const uint32_t* packed, uint32_t* squares, int64_t count, int64_t order, int64_t both,
                     int64_t threads) {
  unpack_triangles(packed, squares, count, order, both != 0, threads);
}

}  // extern "C"
#pragma GCC visibility pop
