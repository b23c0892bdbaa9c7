// Updates of state that is kept in eight bits; ds_optim/kernels/codes.py says what a byte stands for.
//
// A block of codes at a time: its state becomes fp32 in buffers that stay in the first cache, the rule's own loop runs
// over them, the largest magnitudes are found and the state becomes codes again. Nothing of a tensor's size is fp32.
//
// Loops here do one thing each, through buffers of 32-bit integers: so compilers look up sixteen values at a time.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "adam_mini.h"
#include "blocks.h"
#include "storage.h"
#include "threads.h"

namespace ds_optim {

constexpr int64_t kCodeBlock = 256;
constexpr uint32_t kMagnitude = 0x7fffffffu, kInfinite = 0x7f800000u, kOne = 0x3f800000u, kNaN = 0x7fc00000u;
constexpr float kSmallest = 0x1p-126f;

// One state's code, as native.py hands it over.
struct CodeTable {
  const float* values;    // of every byte
  const int32_t* places;  // of boundaries, by the upper half of a magnitude less first_place
  int64_t first_place, is_signed;
};
static_assert(sizeof(CodeTable) == 4 * sizeof(int64_t), "a CodeTable is read straight from 64-bit words");

// Calls `work` with a length, as a constant if it is a whole block's: nearly all are, and loops then need no remainders.
template <class Work>
DS_OPTIM_INLINE void with_length(int64_t n, const Work& work) {
  if (n == kCodeBlock) work(std::integral_constant<int64_t, kCodeBlock>());
  else work(n);
}

template <class Length>
__attribute__((noinline)) void decode(const uint8_t* __restrict codes, const float* __restrict values, float scale,
                                      float* __restrict to, Length n) {
  alignas(64) int32_t numbers[kCodeBlock];
  for (int64_t i = 0; i < n; ++i) numbers[i] = codes[i];
  for (int64_t i = 0; i < n; ++i) to[i] = values[numbers[i]] * scale;
}

// The largest magnitude, as bits, in whose order NaN is the largest.
template <class Length>
__attribute__((noinline)) uint32_t largest(const float* __restrict x, Length n) {
  uint32_t found = 0;
  for (int64_t i = 0; i < n; ++i) found = std::max(found, bits_of(x[i]) & kMagnitude);
  return found;
}

inline float scale_of(uint32_t largest) {
  const float scale = from_bits(largest < kInfinite ? largest : kNaN);
  return scale < kSmallest ? 0.0f : scale;
}

template <bool kSigned, class Length>
__attribute__((noinline)) void encode_as(const float* __restrict x, float factor, const int32_t* __restrict places,
                                         int32_t first, uint8_t* __restrict to, Length n) {
  alignas(64) int32_t bits[kCodeBlock], found[kCodeBlock];
  for (int64_t i = 0; i < n; ++i) {
    bits[i] = int32_t(bits_of(x[i] * factor));
    const int32_t magnitude = std::min(bits[i] & int32_t(kMagnitude), int32_t(kOne));  // one may be missed by rounding
    found[i] = std::max(magnitude >> 16, first) - first;
  }
  for (int64_t i = 0; i < n; ++i) found[i] = places[found[i]];
  for (int64_t i = 0; i < n; ++i) {
    const int32_t magnitude = std::min(bits[i] & int32_t(kMagnitude), int32_t(kOne));
    const int32_t number = (found[i] >> 16) + int32_t((magnitude & 0xffff) > (found[i] & 0xffff));
    if (kSigned) bits[i] = bits[i] < 0 ? 256 - std::min(number, 127) : number;
    else bits[i] = std::max(number, int32_t(int32_t(bits_of(x[i])) > 0));  // what is positive stays so
  }
  for (int64_t i = 0; i < n; ++i) to[i] = uint8_t(bits[i]);
}

template <class Length>
void encode(const float* x, float scale, const CodeTable& table, uint8_t* to, Length n) {
  if (!(scale > 0.0f)) {  // nothing but zeros, or NaN throughout
    std::memset(to, 0, size_t(n));
  } else if (table.is_signed) {
    encode_as<true>(x, 1.0f / scale, table.places, int32_t(table.first_place), to, n);
  } else {
    encode_as<false>(x, 1.0f / scale, table.places, int32_t(table.first_place), to, n);
  }
}

// The states that are kept in codes: their scales, what they mean, and the largest magnitudes of cut blocks.
struct Codes {
  const int64_t* const* scales;  // by state: addresses by tensor
  const CodeTable* tables;
  int32_t* cut_maxima;  // (cuts, states)
};

// A rule on blocks of codes. `Apply` is apply(tensor, start, x, n): the rule on n elements from start on, as fp32 streams;
// n is of any type of `with_length`.
template <int kStates, class Apply>
class CodedStep {
 public:
  CodedStep(const Streams& streams, const Codes& codes, const std::vector<Piece>& pieces, const Apply& apply)
      : streams_(streams), codes_(codes), pieces_(pieces), apply_(apply) {}

  void run(int64_t threads) const {
    struct Task {
      const Piece* piece;
      int64_t first, last;
    };
    std::vector<Task> tasks;
    for (const Piece& piece : pieces_) {
      for (int64_t block = 0; block < piece.blocks; block += kTask / kCodeBlock) {
        tasks.push_back({&piece, block, std::min(block + kTask / kCodeBlock, piece.blocks)});
      }
    }
    run_tasks(int64_t(tasks.size()), threads, [&](int64_t task) {
      const Task& one = tasks[size_t(task)];
      with_length(one.piece->length, [&](auto n) {
        for (int64_t block = one.first; block < one.last; ++block) update(*one.piece, block, n);
      });
    });
  }

  // Of the elements of cut blocks that are here; nothing else is written to.
  void enter_maxima() const {
    for (const Piece& piece : pieces_) {
      alignas(64) float param[kCodeBlock], grad[kCodeBlock], state[kStates][kCodeBlock];
      const int64_t n = piece.length;
      const float* held = View(streams_, kParam, piece.tensor).at(piece.start, n, param);
      if (held != param) std::memcpy(param, held, size_t(n) * sizeof(float));
      float* x[2 + kStates] = {param, View(streams_, kGrad, piece.tensor).at(piece.start, n, grad)};
      advance(piece, piece.slot, piece.start, x, state, n);
      for (int k = 0; k < kStates; ++k) {
        int32_t& known = codes_.cut_maxima[piece.cut * kStates + k];
        known = std::max(known, int32_t(largest(state[k], n)));
      }
    }
  }

 private:
  uint8_t* codes(int64_t state, int64_t tensor) const {
    return static_cast<uint8_t*>(streams_.address(kFirstState + state, tensor));
  }
  float* scale(int64_t state, int64_t tensor, int64_t slot) const {
    return reinterpret_cast<float*>(codes_.scales[state][tensor]) + slot;
  }

  // x: parameter and gradient; the states join them.
  template <class Length>
  DS_OPTIM_INLINE void advance(const Piece& piece, int64_t slot, int64_t start, float** x, float (*state)[kCodeBlock],
                               Length n) const {
    for (int k = 0; k < kStates; ++k) {
      x[2 + k] = state[k];
      decode(codes(k, piece.tensor) + start, codes_.tables[k].values, *scale(k, piece.tensor, slot), state[k], n);
    }
    apply_(piece.tensor, start, x, n);
  }

  template <class Length>
  void update(const Piece& piece, int64_t block, Length n) const {
    alignas(64) float buffers[2][kCodeBlock], state[kStates][kCodeBlock];
    const int64_t start = piece.start + block * n, slot = piece.slot + block;
    const View param(streams_, kParam, piece.tensor), grad(streams_, kGrad, piece.tensor);
    float* x[2 + kStates] = {param.at(start, n, buffers[0]), grad.at(start, n, buffers[1])};
    for (int64_t line = 0; line < kCodeBlock; line += kCacheLine) {
      DS_OPTIM_FETCH(x[kGrad] + line, 0);
      DS_OPTIM_FETCH(x[kParam] + line, 1);
    }
    for (int k = 0; k < kStates; ++k) {
      for (int64_t line = 0; line < kCodeBlock; line += 64) {
        __builtin_prefetch(codes(k, piece.tensor) + start + 4 * kCodeBlock + line, 1);
      }
    }
    advance(piece, slot, start, x, state, n);
    param.put(start, n, x[kParam]);
    for (int k = 0; k < kStates; ++k) {
      const bool known = piece.cut >= 0;
      const float now = scale_of(known ? uint32_t(codes_.cut_maxima[piece.cut * kStates + k]) : largest(state[k], n));
      *scale(k, piece.tensor, slot) = now;
      encode(state[k], now, codes_.tables[k], codes(k, piece.tensor) + start, n);
    }
  }

  const Streams streams_;
  const Codes codes_;
  const std::vector<Piece>& pieces_;
  const Apply& apply_;
};

template <int kStates, class Apply>
void update_codes(const Streams& streams, const Codes& codes, const std::vector<Piece>& pieces, const Apply& apply,
                  bool only_maxima, int64_t threads) {
  const CodedStep<kStates, Apply> step(streams, codes, pieces, apply);
  if (only_maxima) step.enter_maxima();
  else step.run(threads);
}

// What the momentum of every element is multiplied by under Adam-mini, once all blocks have advanced.
class BlockFactors {
 public:
  BlockFactors(const int64_t* row_runs, int64_t rows, const int64_t* column_runs, int64_t column_rows,
               const std::vector<std::vector<float>>& factors)
      : factors_(factors), by_tensor_(factors.size()) {
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t* run = row_runs + 8 * row;
      if (run[2] > 0) by_tensor_[size_t(run[0])].push_back({run[1], run[1] + run[2], run[3], run[4], run[5], -1});
    }
    for (int64_t row = 0; row < column_rows; ++row) {
      ColumnRun run;
      std::memcpy(&run, column_runs + 11 * row, sizeof run);
      if (run.length == 0) continue;
      std::vector<Stretch>& known = by_tensor_[size_t(run.tensor)];
      if (known.empty() || known.back().start != run.start || known.back().row < 0) {
        known.push_back({run.start, run.start + run.length, run.phase, run.row_length, 0, int64_t(rows_.size())});
        rows_.emplace_back(size_t(run.row_length));
      }
      for (int64_t c = run.column_start; c < run.column_stop; ++c) {
        const int64_t slot = run.slot + (c - run.column_start) / run.width;
        rows_.back()[size_t(c)] = factors_[size_t(run.tensor)][size_t(slot)];
      }
    }
    for (std::vector<Stretch>& known : by_tensor_) {
      std::sort(known.begin(), known.end(), [](const Stretch& a, const Stretch& b) { return a.start < b.start; });
    }
  }

  // Of elements [start, start + n).
  void spread(int64_t tensor, int64_t start, int64_t n, float* to) const {
    const std::vector<Stretch>& known = by_tensor_[size_t(tensor)];
    auto one = std::upper_bound(known.begin(), known.end(), start,
                                [](int64_t wanted, const Stretch& stretch) { return wanted < stretch.start; });
    for (const int64_t stop = start + n; start < stop; ++one) {
      const Stretch& here = *(one - 1);
      for (const int64_t end = std::min(stop, here.stop); start < end;) {
        const int64_t position = start - here.start + here.phase, within = position % here.width;
        const int64_t count = std::min(here.width - within, end - start);
        if (here.row < 0) {
          std::fill(to, to + count, factors_[size_t(tensor)][size_t(here.slot + position / here.width)]);
        } else {
          std::copy_n(rows_[size_t(here.row)].begin() + within, count, to);
        }
        start += count;
        to += count;
      }
    }
  }

 private:
  // Elements [start, stop): blocks of `width` that follow one another, or rows of `width` columns, whose factors are
  // `row`.
  struct Stretch {
    int64_t start, stop, phase, width, slot, row;
  };
  const std::vector<std::vector<float>>& factors_;
  std::vector<std::vector<Stretch>> by_tensor_;
  std::vector<std::vector<float>> rows_;
};

}  // namespace ds_optim
