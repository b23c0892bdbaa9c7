// Adam-mini: one second moment per block.
//
// Where the gradient of a block fits a core's cache it is fetched from memory once: summed, then used for the update.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "blocks.h"
#include "storage.h"
#include "threads.h"

namespace ds_optim {

constexpr int64_t kHugeBlock = 1 << 20;  // a block larger than this is summed by several threads
constexpr int64_t kGroup = 4096;         // elements of neighbouring blocks that are summed, then updated
constexpr int64_t kWideBlock = 256;       // a block of this size is worth a loop of its own
constexpr int64_t kTinyBlock = 16;       // a block smaller than this is not worth the fast sum
static_assert(kTinyBlock <= kWideBlock && kWideBlock <= kGroup && kBuffer <= kGroup, "groups hold whole blocks");

struct AdamMini {
  float decay, one_minus_beta1, beta2, one_minus_beta2, step_size, bias2_sqrt, eps;

  // Advances a block's state and returns what the block's momentum is multiplied by.
  float advance(float* square, float mean_square) const {
    *square = *square * beta2 + one_minus_beta2 * mean_square;
    return step_size / (std::sqrt(*square) / bias2_sqrt + eps);
  }

  // `factor` is one for all elements, or points to one for each.
  template <class Factor>
  __attribute__((noinline)) void update(float* p, const float* g, float* m, Factor factor, int64_t n) const {
    const AdamMini s = *this;
    int64_t i = 0;
    for (; i + kStep <= n; i += kStep) {
      for (int64_t line = i; line < i + kStep; line += kCacheLine) {
        DS_OPTIM_FETCH(g + line, 0);
        DS_OPTIM_FETCH(p + line, 1);
        DS_OPTIM_FETCH(m + line, 1);
      }
      s.update_step(p + i, g + i, m + i, from(factor, i), kStep);
    }
    if (i < n) s.update_step(p + i, g + i, m + i, from(factor, i), n - i);
  }

 private:
  static float from(float factor, int64_t) { return factor; }
  static const float* from(const float* factors, int64_t i) { return factors + i; }
  static float at(float factor, int64_t) { return factor; }
  static float at(const float* factors, int64_t i) { return factors[i]; }

  template <class Factor>
  DS_OPTIM_INLINE void update_step(float* __restrict p, const float* __restrict g, float* __restrict m, Factor factor,
                                   int64_t n) const {
    for (int64_t i = 0; i < n; ++i) {
      const float average = m[i] + (g[i] - m[i]) * one_minus_beta1;
      p[i] = p[i] * decay - average * at(factor, i);
      m[i] = average;
    }
  }
};

class AdamMiniStep {
 public:
  AdamMiniStep(const AdamMini& rule, const Streams& streams, const Blocks& blocks, const double* cut_sums,
               int64_t threads)
      : rule_(rule), streams_(streams), blocks_(blocks), cut_sums_(cut_sums), threads_(threads) {}

  void run() {
    plan();
    run_tasks(int64_t(parts_.size()), threads_, [&](int64_t task) {
      Part& part = parts_[size_t(task)];
      part.sum = sum_part(grad(*part.piece), part.start, part.length);
    });
    finish_known();
    run_tasks(int64_t(tasks_.size()), threads_, [&](int64_t task) { run_task(tasks_[size_t(task)]); });
    run_columns();
  }

  // Advances every block, and nothing else: what each one's momentum is to be multiplied by, by tensor and slot.
  std::vector<std::vector<float>> advance_blocks(const int64_t* slots) {
    std::vector<std::vector<float>> factors;
    for (int64_t tensor = 0; tensor < streams_.tensors; ++tensor) factors.emplace_back(size_t(slots[tensor]));
    plan();
    run_tasks(int64_t(parts_.size()), threads_, [&](int64_t task) {
      Part& part = parts_[size_t(task)];
      part.sum = sum_part(grad(*part.piece), part.start, part.length);
    });
    finish_known();
    for (const Known& known : known_) factors[size_t(known.piece->tensor)][size_t(known.slot)] = known.factor;
    run_tasks(int64_t(tasks_.size()), threads_, [&](int64_t task) {
      const Task& one = tasks_[size_t(task)];
      if (one.known >= 0) return;
      const Piece& piece = *one.piece;
      const Element element(streams_, piece.tensor);
      const int64_t step = piece.length < kTinyBlock ? kBuffer / piece.length : std::max(int64_t(1), kGroup / piece.length);
      for (int64_t block = one.first; block < one.last; block += step) {
        const int64_t count = std::min(step, one.last - block);
        float* into = factors[size_t(piece.tensor)].data() + piece.slot + block;
        mean_squares(element, piece, piece.start + block * piece.length, count, into);
        for (int64_t b = 0; b < count; ++b) {
          into[b] = rule_.advance(squares(piece.tensor, piece.slot + block + b), into[b]);
        }
      }
    });
    ColumnBatch batch(streams_, kGrad, blocks_.columns, false, threads_);
    while (batch.next()) {
      run_tasks(int64_t(batch.stripes.size()), threads_, [&](int64_t task) {
        const ColumnBatch::Stripe& stripe = batch.stripes[size_t(task)];
        advance_stripe(batch, stripe, [&](int64_t block, float factor) {
          factors[size_t(stripe.run->tensor)][size_t(stripe.run->slot + block)] = factor;
        });
      });
    }
    return factors;
  }

 private:
  // A part of a huge block, summed ahead of the updates so that all threads share the work.
  struct Part {
    const Piece* piece;
    int64_t start, length;
    double sum;
  };
  // A block whose sum of squares is known before the updates begin: cut, or huge.
  struct Known {
    const Piece* piece;
    int64_t slot, first_part, last_part;
    float factor;
  };
  // Whole blocks [first, last) of a piece; or elements [first, last) of its tensor, in a known block.
  struct Task {
    const Piece* piece;
    int64_t known, first, last;
  };

  View grad(const Piece& piece) const { return View(streams_, kGrad, piece.tensor); }
  float* squares(int64_t tensor, int64_t slot) const {
    return static_cast<float*>(streams_.address(kBlockState, tensor)) + slot;
  }

  void plan() {
    for (const Piece& piece : blocks_.pieces) {
      if (piece.cut < 0 && piece.length <= kHugeBlock) {
        const int64_t step = std::max(int64_t(1), kTask / piece.length);
        for (int64_t block = 0; block < piece.blocks; block += step) {
          tasks_.push_back({&piece, -1, block, std::min(block + step, piece.blocks)});
        }
        continue;
      }
      for (int64_t block = 0; block < piece.blocks; ++block) {
        const int64_t start = piece.start + block * piece.length, stop = start + piece.length;
        const int64_t first_part = int64_t(parts_.size());
        if (piece.cut < 0 && grad(piece).base != nullptr) {
          for (int64_t i = start; i < stop; i += kSumPart) {
            parts_.push_back({&piece, i, std::min(kSumPart, stop - i), 0.0});
          }
        }
        known_.push_back({&piece, piece.slot + block, first_part, int64_t(parts_.size()), 0.0f});
        for (int64_t i = start; i < stop; i += kTask) {
          tasks_.push_back({&piece, int64_t(known_.size()) - 1, i, std::min(i + kTask, stop)});
        }
      }
    }
  }

  void finish_known() {
    for (Known& known : known_) {
      double sum = 0.0;
      if (known.piece->cut >= 0) {
        sum = cut_sums_[known.piece->cut];
      } else {
        for (int64_t part = known.first_part; part < known.last_part; ++part) sum += parts_[size_t(part)].sum;
      }
      known.factor = rule_.advance(squares(known.piece->tensor, known.slot), float(sum / double(known.piece->numel)));
    }
  }

  void run_task(const Task& task) const {
    if (task.known >= 0) {
      Element element(streams_, task.piece->tensor);
      update_same(element, task.first, task.last, known_[size_t(task.known)].factor);
    } else {
      update_blocks(*task.piece, task.first, task.last);
    }
  }

  // The streams of one value per element.
  struct Element {
    View param, grad, average;
    bool direct;

    Element(const Streams& streams, int64_t tensor)
        : param(streams, kParam, tensor), grad(streams, kGrad, tensor), average(streams, kFirstState, tensor),
          direct(param.direct() && grad.direct() && average.direct()) {}
  };

  // Elements [start, stop) with one factor, or one for each.
  template <class Factor>
  void update(const Element& element, int64_t start, int64_t n, Factor factor) const {
    alignas(64) float buffers[3][kBuffer];
    float* p = element.param.at(start, n, buffers[0]);
    const float* g = element.grad.at(start, n, buffers[1]);
    float* m = element.average.at(start, n, buffers[2]);
    rule_.update(p, g, m, factor, n);
    element.param.put(start, n, p);
    element.average.put(start, n, m);
  }

  void update_same(const Element& element, int64_t start, int64_t stop, float factor) const {
    const int64_t step = element.direct ? stop - start : kBuffer;
    for (; start < stop; start += step) update(element, start, std::min(step, stop - start), factor);
  }
  void update_each(const Element& element, int64_t start, int64_t n, const float* factors) const {
    const int64_t step = element.direct ? n : kBuffer;
    for (int64_t i = 0; i < n; i += step) update(element, start + i, std::min(step, n - i), factors + i);
  }

  // Blocks [first, last) of a piece, a group of about kGroup elements at a time: enough to stream from memory, few enough
  // to find the gradient in the cache the second time.
  void update_blocks(const Piece& piece, int64_t first, int64_t last) const {
    const Element element(streams_, piece.tensor);
    const int64_t width = piece.length;
    const int64_t step = width < kTinyBlock ? kBuffer / width : std::max(int64_t(1), kGroup / width);
    for (int64_t block = first; block < last; block += step) {
      alignas(64) float values[kGroup], spread[kGroup];  // values: mean squares, then factors
      const int64_t count = std::min(step, last - block), start = piece.start + block * width, n = count * width;
      float* square = squares(piece.tensor, piece.slot + block);
      mean_squares(element, piece, start, count, values);
      for (int64_t b = 0; b < count; ++b) values[b] = rule_.advance(square + b, values[b]);
      if (width >= kWideBlock) {
        for (int64_t b = 0; b < count; ++b) {
          update_same(element, start + b * width, start + (b + 1) * width, values[b]);
        }
      } else if (width == 1) {
        update_each(element, start, n, values);
      } else {  // one long loop is faster than many short ones
        for (int64_t b = 0; b < count; ++b) std::fill(spread + b * width, spread + (b + 1) * width, values[b]);
        update_each(element, start, n, spread);
      }
    }
  }

  void mean_squares(const Element& element, const Piece& piece, int64_t start, int64_t count, float* means) const {
    const int64_t width = piece.length;
    if (width >= kTinyBlock) {
      for (int64_t b = 0; b < count; ++b) {
        means[b] = float(sum_squares(element.grad, start + b * width, width) / double(piece.numel));
      }
      return;
    }
    alignas(64) float buffer[kBuffer];
    const float* g = element.grad.at(start, count * width, buffer);
    if (width == 1) {
      for (int64_t b = 0; b < count; ++b) means[b] = g[b] * g[b];
      return;
    }
    for (int64_t b = 0; b < count; ++b) {
      double sum = 0.0;
      for (int64_t i = b * width; i < (b + 1) * width; ++i) sum += double(g[i] * g[i]);
      means[b] = float(sum / double(piece.numel));
    }
  }

  // Advances the blocks of a stripe; take(block, factor) of each.
  template <class Take>
  void advance_stripe(const ColumnBatch& batch, const ColumnBatch::Stripe& stripe, const Take& take) const {
    const ColumnRun& run = *stripe.run;
    const std::vector<double> sums = run.cut < 0 ? batch.block_sums(stripe) : std::vector<double>();
    for (int64_t block = stripe.first; block < stripe.last; ++block) {
      const double sum = run.cut < 0 ? sums[size_t(block - stripe.first)] : cut_sums_[run.cut + block];
      const float mean_square = float(sum / double(run.block_numel));
      take(block, rule_.advance(squares(run.tensor, run.slot + block), mean_square));
    }
  }

  // Column runs, batch by batch: sums, block states, elements.
  void run_columns() {
    ColumnBatch batch(streams_, kGrad, blocks_.columns, false, threads_);
    std::vector<float> factors;  // of every column of a batch
    while (batch.next()) {
      factors.resize(size_t(batch.columns));
      run_tasks(int64_t(batch.stripes.size()), threads_, [&](int64_t task) {
        const ColumnBatch::Stripe& stripe = batch.stripes[size_t(task)];
        const int64_t width = stripe.run->width;
        advance_stripe(batch, stripe, [&](int64_t block, float factor) {
          const auto spread = factors.begin() + stripe.column + (block - stripe.first) * width;
          std::fill(spread, spread + width, factor);
        });
      });
      run_tasks(int64_t(batch.parts.size()), threads_, [&](int64_t task) {
        const ColumnBatch::Part& part = batch.parts[size_t(task)];
        const ColumnBatch::Stripe& stripe = batch.stripes[size_t(part.stripe)];
        const Element element(streams_, stripe.run->tensor);
        const float* spread = factors.data() + stripe.column + part.first - stripe.begin();
        for (int64_t row = 0; row < part.rows; ++row) {
          update_each(element, part.start + row * stripe.run->row_length, part.last - part.first, spread);
        }
      });
    }
  }

  const AdamMini rule_;
  const Streams streams_;
  const Blocks& blocks_;
  const double* const cut_sums_;
  const int64_t threads_;
  std::vector<Part> parts_;
  std::vector<Known> known_;
  std::vector<Task> tasks_;
};

}  // namespace ds_optim
