// AdamW, Lion, Adan, and the passes of whole-matrix rules: one pass over whatever the spans cover.
//
// Scalars come in the order of the structs' fields. A rule's loop is a function of its streams because compilers take
// `restrict` at its word only there; without it the loop of Adan stays scalar.

#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "storage.h"
#include "threads.h"

namespace ds_optim {

struct AdamW {
  static constexpr int kStreams = 4;
  float decay, one_minus_beta1, beta2, one_minus_beta2, step_size, bias2_sqrt, eps;

  DS_OPTIM_INLINE void operator()(float* const* x, int64_t i, int64_t n) const {
    update(*this, x[0] + i, x[1] + i, x[2] + i, x[3] + i, n);
  }

  DS_OPTIM_INLINE static void update(AdamW s, float* __restrict p, const float* __restrict g,
                                     float* __restrict m, float* __restrict v, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const float gradient = g[i];
      const float average = m[i] + (gradient - m[i]) * s.one_minus_beta1;
      const float square = v[i] * s.beta2 + s.one_minus_beta2 * (gradient * gradient);
      const float denominator = std::sqrt(square) / s.bias2_sqrt + s.eps;
      p[i] = p[i] * s.decay - s.step_size * (average / denominator);
      m[i] = average;
      v[i] = square;
    }
  }
};

struct Lion {
  static constexpr int kStreams = 3;
  float decay, beta1, one_minus_beta1, beta2, one_minus_beta2, lr;

  DS_OPTIM_INLINE void operator()(float* const* x, int64_t i, int64_t n) const {
    update(*this, x[0] + i, x[1] + i, x[2] + i, n);
  }

  DS_OPTIM_INLINE static void update(Lion s, float* __restrict p, const float* __restrict g,
                                     float* __restrict m, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const float gradient = g[i];
      const float mixed = m[i] * s.beta1 + gradient * s.one_minus_beta1;
      const float sign = mixed > 0.0f ? 1.0f : mixed < 0.0f ? -1.0f : mixed == 0.0f ? 0.0f : mixed;  // NaN stays NaN
      p[i] = p[i] * s.decay - s.lr * sign;
      m[i] = m[i] * s.beta2 + gradient * s.one_minus_beta2;
    }
  }
};

struct Adan {
  static constexpr int kStreams = 6;
  float decay, beta1, one_minus_beta1, beta2, one_minus_beta2, beta3, one_minus_beta3;
  float step_size, step_size_diff, bias3_sqrt, eps, shrink, has_previous;

  DS_OPTIM_INLINE void operator()(float* const* x, int64_t i, int64_t n) const {
    update(*this, x[0] + i, x[1] + i, x[2] + i, x[3] + i, x[4] + i, x[5] + i, n);
  }

  DS_OPTIM_INLINE static void update(Adan s, float* __restrict p, const float* __restrict g,
                                     float* __restrict m, float* __restrict v, float* __restrict q,
                                     float* __restrict old, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const float gradient = g[i];
      const float difference = (gradient - old[i]) * s.has_previous;
      const float average = m[i] * s.beta1 + gradient * s.one_minus_beta1;
      const float average_difference = v[i] * s.beta2 + difference * s.one_minus_beta2;
      const float lookahead = gradient + s.beta2 * difference;
      const float square = q[i] * s.beta3 + s.one_minus_beta3 * (lookahead * lookahead);
      const float denominator = std::sqrt(square) / s.bias3_sqrt + s.eps;
      const float moved = p[i] * s.decay - s.step_size * (average / denominator);
      p[i] = (moved - s.step_size_diff * (average_difference / denominator)) / s.shrink;
      m[i] = average;
      v[i] = average_difference;
      q[i] = square;
      old[i] = gradient;
    }
  }
};

// The passes of whole-matrix rules over a stack of blocks: the first stream holds gradients and becomes what the rule goes
// on with; the second is not looked at. Elements whose gradient is not a number become zero and leave state as it is.

struct Momentum {
  static constexpr int kStreams = 3;
  float beta, weight, of_average, of_gradient;

  DS_OPTIM_INLINE void operator()(float* const* x, int64_t i, int64_t n) const { update(*this, x[0] + i, x[2] + i, n); }

  DS_OPTIM_INLINE static void update(Momentum s, float* __restrict g, float* __restrict m, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const float gradient = g[i], before = m[i];
      const bool is_number = gradient == gradient;
      const float average = before * s.beta + gradient * s.weight;
      const float mixed = average * s.of_average + gradient * s.of_gradient;
      g[i] = is_number ? mixed : 0.0f;
      m[i] = is_number ? average : before;
    }
  }
};

struct AdamGraft {
  static constexpr int kStreams = 4;
  float beta1, one_minus_beta1, beta2, one_minus_beta2, bias1, bias2, eps;

  DS_OPTIM_INLINE void operator()(float* const* x, int64_t i, int64_t n) const {
    update(*this, x[0] + i, x[2] + i, x[3] + i, n);
  }

  DS_OPTIM_INLINE static void update(AdamGraft s, float* __restrict g, float* __restrict m, float* __restrict v,
                                     int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const float gradient = g[i], before = m[i], square_before = v[i];
      const bool is_number = gradient == gradient;
      const float average = before * s.beta1 + gradient * s.one_minus_beta1;
      const float square = square_before * s.beta2 + (gradient * gradient) * s.one_minus_beta2;
      const float step = (average / s.bias1) / (std::sqrt(square / s.bias2) + s.eps);
      g[i] = is_number ? step : 0.0f;
      m[i] = is_number ? average : before;
      v[i] = is_number ? square : square_before;
    }
  }
};

// A rule on n elements of fp32 streams.
template <class Rule>
__attribute__((noinline)) void update_streams(const Rule rule, float* const* x, int64_t n) {
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    for (int64_t line = i; line < i + kStep; line += kCacheLine) {
      for (int k = 0; k < Rule::kStreams; ++k) {
        if (k == kGrad) DS_OPTIM_FETCH(x[k] + line, 0);
        else DS_OPTIM_FETCH(x[k] + line, 1);
      }
    }
    rule(x, i, kStep);
  }
  if (i < n) rule(x, i, n - i);
}

// Elements [start, stop) of one tensor.
template <class Rule>
void update_range(const Rule& rule, const Streams& streams, int64_t tensor, int64_t start, int64_t stop) {
  alignas(64) float buffers[Rule::kStreams][kBuffer];
  View views[Rule::kStreams];
  for (int k = 0; k < Rule::kStreams; ++k) views[k] = View(streams, k, tensor);
  const bool direct = std::all_of(views, views + Rule::kStreams, [](const View& view) { return view.direct(); });
  const int64_t step = direct ? stop - start : kBuffer;
  for (; start < stop; start += step) {
    const int64_t n = std::min(step, stop - start);
    float* x[Rule::kStreams];
    for (int k = 0; k < Rule::kStreams; ++k) x[k] = views[k].at(start, n, buffers[k]);
    update_streams(rule, x, n);
    for (int k = 0; k < Rule::kStreams; ++k) {
      if (k != kGrad) views[k].put(start, n, x[k]);
    }
  }
}

// Spans are (tensor, start, length). Returns 0, or the number (from 1) of the first row that is out of bounds, or of
// whose elements some are to be rounded but have no place.
template <class Rule>
int64_t update_spans(const Rule& rule, const Streams& streams, const int64_t* numels, const int64_t* spans, int64_t rows,
                     int64_t threads) {
  std::vector<int64_t> before(size_t(rows) + 1, 0);  // elements of all earlier spans
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t *span = spans + 3 * row, tensor = span[0], start = span[1], length = span[2];
    if (tensor < 0 || tensor >= streams.tensors || start < 0 || length < 0 || length > numels[tensor] - start) {
      return row + 1;
    }
    if (!streams.placed(tensor, start, length)) return row + 1;
    before[size_t(row) + 1] = before[size_t(row)] + length;
  }
  const int64_t total = before.back();
  run_tasks((total + kTask - 1) / kTask, threads, [&](int64_t task) {
    int64_t position = task * kTask;
    const int64_t stop = std::min(position + kTask, total);
    int64_t row = std::upper_bound(before.begin(), before.end(), position) - before.begin() - 1;
    for (; position < stop; ++row) {
      const int64_t *span = spans + 3 * row, first = position - before[size_t(row)];
      const int64_t last = std::min(span[2], first + stop - position);
      update_range(rule, streams, span[0], span[1] + first, span[1] + last);
      position += last - first;
    }
  });
  return 0;
}

}  // namespace ds_optim
