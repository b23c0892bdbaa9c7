// Optimizer updates on CPU tensors: one call updates a list of flat tensors, block by block where the rule has blocks.
//
// A plain C interface without any torch header, so that it builds in seconds and outlives torch's ABI. native.py checks
// the tensors, loads this file and lends it torch's own OpenMP threads.
//
// Promises that the code below keeps:
// - An element's result does not depend on how tensors are cut into spans, nor on the number of threads. So: no fused
//   multiply-add (-ffp-contract=off), no approximate division or root, nothing whose order depends on the threads.
// - A block's sum of squares is taken over fixed chunks counted from the block's first local element: fp32 lanes within
//   a chunk of kSumChunk, fp64 from there on.
// - Where the gradient of a block fits a core's cache it is fetched from memory once.
// - All arithmetic is fp32. bf16 and fp16 pass through small buffers on the stack, which keeps one fp32 core per rule.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kBuffer = 1024;           // elements that pass through conversion buffers at a time
constexpr int64_t kTask = 1 << 15;          // elements of one unit of work
constexpr int64_t kSumChunk = 512;          // elements summed in fp32
constexpr int64_t kLanes = 32;              // partial sums side by side
constexpr int64_t kSumPart = 1 << 16;       // elements of a huge block that one unit of work sums
constexpr int64_t kHugeBlock = 1 << 20;     // a block larger than this is summed by several threads
constexpr int64_t kNarrowBlock = 64;        // a block smaller than this is updated together with its neighbours
constexpr int64_t kStripe = 512;            // columns of a column run that one unit of work takes
constexpr int64_t kStripeRows = 64;         // rows summed in fp32

enum Dtype : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum Stream : int64_t { kParam = 0, kGrad = 1, kFirstState = 2, kBlockState = 3 };

// ---------------------------------------------------------------------------------------------------------------------
// Storage formats

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float bf16_to_float(uint16_t h) { return from_bits(uint32_t(h) << 16); }

inline uint16_t float_to_bf16(float x) {  // to nearest, ties to even
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline float fp16_to_float(uint16_t h) {
  const uint32_t magnitude = h & 0x7fffu;
  const float scaled = from_bits(magnitude << 13) * 0x1p112f;  // moves the exponent's bias; exact, subnormals too
  const uint32_t bits = magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : bits_of(scaled);
  return from_bits(bits | uint32_t(h & 0x8000u) << 16);
}

inline uint16_t float_to_fp16(float x) {  // to nearest, ties to even
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = ((magnitude + 0xfffu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10);
  const uint32_t subnormal = bits_of(from_bits(magnitude) + 0.5f) - bits_of(0.5f);  // the sum's last place is 2^-24
  uint32_t h = magnitude < (113u << 23) ? subnormal : std::min(normal, 0x7c00u);
  h = magnitude > 0x7f800000u ? 0x7e00u : h;
  return uint16_t(h | ((bits >> 16) & 0x8000u));
}

__attribute__((noinline)) void load(const void* from, int64_t dtype, int64_t start, int64_t n, float* __restrict to) {
  const uint16_t* __restrict h = static_cast<const uint16_t*>(from) + start;
  if (dtype == kBFloat16) {
    for (int64_t i = 0; i < n; ++i) to[i] = bf16_to_float(h[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = fp16_to_float(h[i]);
  }
}

__attribute__((noinline)) void store(void* to, int64_t dtype, int64_t start, int64_t n, const float* __restrict from) {
  uint16_t* __restrict h = static_cast<uint16_t*>(to) + start;
  if (dtype == kBFloat16) {
    for (int64_t i = 0; i < n; ++i) h[i] = float_to_bf16(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) h[i] = float_to_fp16(from[i]);
  }
}

alignas(64) const float kZeros[kBuffer] = {};

// One stream is a parameter, gradient or state of every tensor: int64[2 * tensors], addresses, then dtypes.
struct Streams {
  const int64_t* const* tables;
  int64_t tensors;

  void* address(int64_t stream, int64_t tensor) const { return reinterpret_cast<void*>(tables[stream][tensor]); }
  int64_t dtype(int64_t stream, int64_t tensor) const { return tables[stream][tensors + tensor]; }
};

// A tensor's stream as fp32: fp32 memory as it is, anything else through a buffer. A missing gradient is zeros.
struct View {
  void* base = nullptr;
  int64_t dtype = kFloat32;

  View() = default;
  View(const Streams& streams, int64_t stream, int64_t tensor, bool present = true)
      : base(present ? streams.address(stream, tensor) : nullptr), dtype(streams.dtype(stream, tensor)) {}

  bool direct() const { return base != nullptr && dtype == kFloat32; }
  float* at(int64_t start, int64_t n, float* buffer) const {
    if (base == nullptr) return const_cast<float*>(kZeros);
    if (dtype == kFloat32) return static_cast<float*>(base) + start;
    load(base, dtype, start, n, buffer);
    return buffer;
  }
  void put(int64_t start, int64_t n, const float* buffer) const {
    if (base != nullptr && dtype != kFloat32) store(base, dtype, start, n, buffer);
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Threads

using ParallelRegion = void (*)(void (*)(void*), void*, unsigned, unsigned);
ParallelRegion parallel_region = nullptr;  // GOMP_parallel of the OpenMP runtime that torch uses
int (*thread_number)() = nullptr;          // its omp_get_thread_num

// Calls work(task) for every task. A thread starts in its own contiguous share, so that the memory it touches stays the
// same from step to step, and then helps the others.
template <class Work>
void run_tasks(int64_t tasks, int64_t threads, const Work& work) {
  threads = std::min(threads, tasks);
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) work(task);
    return;
  }
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t stop;
  };
  struct Team {
    std::vector<Share> shares;
    const Work& work;

    void run(int64_t member) {
      const int64_t size = int64_t(shares.size());
      for (int64_t turn = 0; turn < size; ++turn) {
        Share& share = shares[size_t((member + turn) % size)];
        for (int64_t task; (task = share.next.fetch_add(1, std::memory_order_relaxed)) < share.stop;) work(task);
      }
    }
  };
  Team team{std::vector<Share>(size_t(threads)), work};
  for (int64_t i = 0; i < threads; ++i) {
    team.shares[size_t(i)].next = tasks * i / threads;
    team.shares[size_t(i)].stop = tasks * (i + 1) / threads;
  }
  if (parallel_region != nullptr) {
    parallel_region([](void* data) { static_cast<Team*>(data)->run(thread_number()); }, &team, unsigned(threads), 0);
    return;
  }
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) others.emplace_back([&team, i] { team.run(i); });
  team.run(0);
  for (std::thread& other : others) other.join();
}

// ---------------------------------------------------------------------------------------------------------------------
// Elementwise rules. Scalars come in the order of the structs' fields. Streams are parameters of a function because
// compilers take `restrict` at its word only there; without it the loop of Adan stays scalar.

struct AdamW {
  static constexpr int kStreams = 4;
  float decay, one_minus_beta1, beta2, one_minus_beta2, step_size, bias2_sqrt, eps;

  void operator()(float* const* x, int64_t n) const { update(*this, x[0], x[1], x[2], x[3], n); }

  __attribute__((noinline)) static void update(AdamW s, float* __restrict p, const float* __restrict g,
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

  void operator()(float* const* x, int64_t n) const { update(*this, x[0], x[1], x[2], n); }

  __attribute__((noinline)) static void update(Lion s, float* __restrict p, const float* __restrict g,
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

  void operator()(float* const* x, int64_t n) const { update(*this, x[0], x[1], x[2], x[3], x[4], x[5], n); }

  __attribute__((noinline)) static void update(Adan s, float* __restrict p, const float* __restrict g,
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

// Elements [start, stop) of one tensor.
template <class Rule>
void update_range(const Rule& rule, const Streams& streams, int64_t tensor, bool has_grad, int64_t start, int64_t stop) {
  alignas(64) float buffers[Rule::kStreams][kBuffer];
  View views[Rule::kStreams];
  for (int k = 0; k < Rule::kStreams; ++k) views[k] = View(streams, k, tensor, k != kGrad || has_grad);
  const bool direct = std::all_of(views, views + Rule::kStreams, [](const View& view) { return view.direct(); });
  const int64_t step = direct ? stop - start : kBuffer;
  for (; start < stop; start += step) {
    const int64_t n = std::min(step, stop - start);
    float* x[Rule::kStreams];
    for (int k = 0; k < Rule::kStreams; ++k) x[k] = views[k].at(start, n, buffers[k]);
    rule(x, n);
    for (int k = 0; k < Rule::kStreams; ++k) {
      if (k != kGrad) views[k].put(start, n, x[k]);
    }
  }
}

// Spans are (tensor, start, length, has_grad). Returns 0, or the number (from 1) of the first row that is out of bounds.
template <class Rule>
int64_t update_spans(const Rule& rule, const Streams& streams, const int64_t* numels, const int64_t* spans, int64_t rows,
                     int64_t threads) {
  std::vector<int64_t> before(size_t(rows) + 1, 0);  // elements of all earlier spans
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t *span = spans + 4 * row, tensor = span[0], start = span[1], length = span[2];
    if (tensor < 0 || tensor >= streams.tensors || start < 0 || length < 0 || length > numels[tensor] - start) {
      return row + 1;
    }
    before[size_t(row) + 1] = before[size_t(row)] + length;
  }
  const int64_t total = before.back();
  run_tasks((total + kTask - 1) / kTask, threads, [&](int64_t task) {
    int64_t position = task * kTask;
    const int64_t stop = std::min(position + kTask, total);
    int64_t row = std::upper_bound(before.begin(), before.end(), position) - before.begin() - 1;
    for (; position < stop; ++row) {
      const int64_t *span = spans + 4 * row, first = position - before[size_t(row)];
      const int64_t last = std::min(span[2], first + stop - position);
      update_range(rule, streams, span[0], span[3] != 0, span[1] + first, span[1] + last);
      position += last - first;
    }
  });
  return 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// Sums of squares

double sum_lanes(const double* lanes) {
  double sums[kLanes];
  std::copy(lanes, lanes + kLanes, sums);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) sums[j] += sums[j + half];
  }
  return sums[0];
}

__attribute__((noinline)) void add_squares(const float* __restrict x, int64_t n, double* __restrict total) {
  alignas(64) float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += x[i + j] * x[i + j];
  }
  for (int64_t j = 0; i + j < n; ++j) lanes[j] += x[i + j] * x[i + j];
  for (int64_t j = 0; j < kLanes; ++j) total[j] += double(lanes[j]);
}

// At most kSumPart elements.
double sum_part(const View& grad, int64_t start, int64_t n) {
  alignas(64) float buffer[kSumChunk];
  alignas(64) double total[kLanes] = {};
  for (int64_t done = 0; done < n; done += kSumChunk) {
    const int64_t size = std::min(kSumChunk, n - done);
    add_squares(grad.at(start + done, size, buffer), size, total);
  }
  return sum_lanes(total);
}

double sum_squares(const View& grad, int64_t start, int64_t n) {
  if (grad.base == nullptr) return 0.0;
  double sum = 0.0;
  for (int64_t done = 0; done < n; done += kSumPart) sum += sum_part(grad, start + done, std::min(kSumPart, n - done));
  return sum;
}

// ---------------------------------------------------------------------------------------------------------------------
// Adam-mini

struct AdamMini {
  float decay, one_minus_beta1, beta2, one_minus_beta2, step_size, bias2_sqrt, eps;

  // Advances a block's state and returns what the block's momentum is multiplied by.
  float advance(float* square, float mean_square) const {
    *square = *square * beta2 + one_minus_beta2 * mean_square;
    return step_size / (std::sqrt(*square) / bias2_sqrt + eps);
  }

  // factor[i] for element i; or the same for all.
  __attribute__((noinline)) void update(float* __restrict p, const float* __restrict g, float* __restrict m,
                                        const float* __restrict factor, int64_t n) const {
    const AdamMini s = *this;
    for (int64_t i = 0; i < n; ++i) {
      const float average = m[i] + (g[i] - m[i]) * s.one_minus_beta1;
      p[i] = p[i] * s.decay - average * factor[i];
      m[i] = average;
    }
  }
  __attribute__((noinline)) void update(float* __restrict p, const float* __restrict g, float* __restrict m,
                                        float factor, int64_t n) const {
    const AdamMini s = *this;
    for (int64_t i = 0; i < n; ++i) {
      const float average = m[i] + (g[i] - m[i]) * s.one_minus_beta1;
      p[i] = p[i] * s.decay - average * factor;
      m[i] = average;
    }
  }
};

// `blocks` neighbouring blocks of which `length` elements each lie here; numel elements each in the whole parameter.
struct Piece {
  int64_t tensor, start, blocks, length, numel, slot, cut;
  bool has_grad;
};

// One row of column_runs.
struct ColumnRun {
  int64_t tensor, start, length, phase, row_length, column_start, column_stop, width, slot, cut, block_numel, has_grad;

  int64_t blocks() const { return (column_stop - column_start) / width; }

  // Calls visit(start, rows, first, last) for the parts of the fragment that lie in columns [from, to): `rows` rows of
  // columns [first, last), of which the first begins at element `start` of the local tensor.
  template <class Visit>
  void visit_rows(int64_t from, int64_t to, const Visit& visit) const {
    for (int64_t position = phase, stop = phase + length; position < stop;) {
      const int64_t row_start = position - position % row_length;
      int64_t rows = 1, left = position - row_start, right = std::min(row_length, stop - row_start);
      if (left == 0 && right == row_length) rows = (stop - position) / row_length;
      const int64_t first = std::max(left, from), last = std::min(right, to);
      if (first < last) visit(start + row_start + first - phase, rows, first, last);
      position = row_start + (rows - 1) * row_length + right;
    }
  }
};
static_assert(sizeof(ColumnRun) == 12 * sizeof(int64_t), "a ColumnRun is read straight from the table");

enum Select : int64_t { kAll = 0, kUncut = 1, kCut = 2 };

struct Blocks {
  std::vector<Piece> pieces;
  std::vector<ColumnRun> columns;
};

// Reads both tables. Returns 0, or the number of the first bad row: from 1 in row_runs, from -1 downwards in column_runs.
int64_t read_blocks(const int64_t* row_runs, int64_t rows, const int64_t* column_runs, int64_t column_rows,
                    int64_t tensors, const int64_t* numels, const int64_t* slots, int64_t cuts, int64_t select,
                    Blocks* blocks) {
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t* run = row_runs + 9 * row;
    const int64_t tensor = run[0], start = run[1], length = run[2], phase = run[3], width = run[4], slot = run[5];
    int64_t cut_first = run[6], cut_last = run[7];
    const bool has_grad = run[8] != 0;
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
      blocks->pieces.push_back({tensor, start, 1, first_length, width, slot, cut_first, has_grad});
    }
    if (whole && select != kCut) {
      blocks->pieces.push_back({tensor, whole_start, whole, width, width, slot + first, -1, has_grad});
    }
    if (last && select != kUncut) {
      const int64_t last_length = start + length - last_start;
      blocks->pieces.push_back({tensor, last_start, 1, last_length, width, slot + count - 1, cut_last, has_grad});
    }
  }
  for (int64_t row = 0; row < column_rows; ++row) {
    ColumnRun run;
    std::memcpy(&run, column_runs + 12 * row, sizeof run);
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

// Blocks of a column run that one unit of work takes.
int64_t stripe_blocks(const ColumnRun& run) { return std::max(int64_t(1), kStripe / run.width); }

// Sums of squares of the run's blocks [first, last): down each column in fp32 over kStripeRows rows, fp64 from there on.
void sum_columns(const ColumnRun& run, const View& grad, int64_t first, int64_t last, double* sums) {
  std::fill(sums, sums + (last - first), 0.0);
  if (grad.base == nullptr) return;
  const int64_t begin = run.column_start + first * run.width, end = run.column_start + last * run.width;
  for (int64_t from = begin; from < end; from += kStripe) {
    const int64_t to = std::min(from + kStripe, end);
    alignas(64) double columns[kStripe] = {};
    run.visit_rows(from, to, [&](int64_t start, int64_t rows, int64_t left, int64_t right) {
      alignas(64) float buffer[kStripe], squares[kStripe];
      const int64_t n = right - left;
      for (int64_t row = 0; row < rows; row += kStripeRows) {
        std::fill(squares, squares + n, 0.0f);
        for (int64_t r = row; r < std::min(row + kStripeRows, rows); ++r) {
          const float* __restrict x = grad.at(start + r * run.row_length, n, buffer);
          for (int64_t c = 0; c < n; ++c) squares[c] += x[c] * x[c];
        }
        for (int64_t c = 0; c < n; ++c) columns[left - from + c] += double(squares[c]);
      }
    });
    for (int64_t c = from; c < to; ++c) sums[(c - begin) / run.width] += columns[c - from];
  }
}

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
  // Of the three kinds of work: whole blocks [first, last) of a piece; elements [first, last) of its tensor in a known
  // block; blocks [first, last) of a column run.
  struct Task {
    const Piece* piece;
    const ColumnRun* columns;
    int64_t known, first, last;
  };

  View grad(const Piece& piece) const { return View(streams_, kGrad, piece.tensor, piece.has_grad); }
  float* squares(int64_t tensor, int64_t slot) const {
    return static_cast<float*>(streams_.address(kBlockState, tensor)) + slot;
  }

  void plan() {
    for (const Piece& piece : blocks_.pieces) {
      if (piece.cut < 0 && piece.length <= kHugeBlock) {
        const int64_t step = std::max(int64_t(1), kTask / piece.length);
        for (int64_t block = 0; block < piece.blocks; block += step) {
          tasks_.push_back({&piece, nullptr, -1, block, std::min(block + step, piece.blocks)});
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
          tasks_.push_back({&piece, nullptr, int64_t(known_.size()) - 1, i, std::min(i + kTask, stop)});
        }
      }
    }
    for (const ColumnRun& run : blocks_.columns) {
      const int64_t step = stripe_blocks(run);
      for (int64_t block = 0; block < run.blocks(); block += step) {
        tasks_.push_back({nullptr, &run, -1, block, std::min(block + step, run.blocks())});
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
    if (task.columns != nullptr) {
      update_columns(*task.columns, task.first, task.last);
    } else if (task.known >= 0) {
      Element element(streams_, task.piece->tensor, task.piece->has_grad);
      update_same(element, task.first, task.last, known_[size_t(task.known)].factor);
    } else if (task.piece->length < kNarrowBlock) {
      update_narrow(*task.piece, task.first, task.last);
    } else {
      const Piece& piece = *task.piece;
      Element element(streams_, piece.tensor, piece.has_grad);
      for (int64_t block = task.first; block < task.last; ++block) {
        const int64_t start = piece.start + block * piece.length;
        const float mean_square = float(sum_squares(element.grad, start, piece.length) / double(piece.numel));
        const float factor = rule_.advance(squares(piece.tensor, piece.slot + block), mean_square);
        update_same(element, start, start + piece.length, factor);
      }
    }
  }

  // The streams of one value per element.
  struct Element {
    View param, grad, average;
    bool direct;

    Element(const Streams& streams, int64_t tensor, bool has_grad)
        : param(streams, kParam, tensor), grad(streams, kGrad, tensor, has_grad), average(streams, kFirstState, tensor),
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

  // Blocks too short for a loop of their own: their factors are spread over the elements.
  void update_narrow(const Piece& piece, int64_t first, int64_t last) const {
    const Element element(streams_, piece.tensor, piece.has_grad);
    const int64_t width = piece.length, step = kBuffer / width;
    for (int64_t block = first; block < last; block += step) {
      alignas(64) float buffer[kBuffer], factors[kBuffer], means[kBuffer];
      const int64_t count = std::min(step, last - block), start = piece.start + block * width;
      const float* g = element.grad.at(start, count * width, buffer);
      float* square = squares(piece.tensor, piece.slot + block);
      if (width == 1) {
        for (int64_t b = 0; b < count; ++b) factors[b] = rule_.advance(square + b, g[b] * g[b]);
      } else {
        for (int64_t b = 0; b < count; ++b) {
          double sum = 0.0;
          for (int64_t i = 0; i < width; ++i) sum += double(g[b * width + i] * g[b * width + i]);
          means[b] = float(sum / double(piece.numel));
        }
        for (int64_t b = 0; b < count; ++b) means[b] = rule_.advance(square + b, means[b]);
        for (int64_t b = 0; b < count; ++b) std::fill(factors + b * width, factors + (b + 1) * width, means[b]);
      }
      update(element, start, count * width, static_cast<const float*>(factors));
    }
  }

  void update_columns(const ColumnRun& run, int64_t first, int64_t last) const {
    const Element element(streams_, run.tensor, run.has_grad != 0);
    double sums[kStripe];
    float factors[kStripe];
    if (run.cut >= 0) {
      std::copy(cut_sums_ + run.cut + first, cut_sums_ + run.cut + last, sums);
    } else {
      sum_columns(run, element.grad, first, last, sums);
    }
    for (int64_t b = 0; b < last - first; ++b) {
      const float mean_square = float(sums[b] / double(run.block_numel));
      factors[b] = rule_.advance(squares(run.tensor, run.slot + first + b), mean_square);
    }
    const int64_t begin = run.column_start + first * run.width, end = run.column_start + last * run.width;
    for (int64_t from = begin; from < end; from += kStripe) {
      const int64_t to = std::min(from + kStripe, end);
      alignas(64) float spread[kStripe];
      for (int64_t c = from; c < to; ++c) spread[c - from] = factors[(c - begin) / run.width];
      run.visit_rows(from, to, [&](int64_t start, int64_t rows, int64_t left, int64_t right) {
        for (int64_t row = 0; row < rows; ++row) {
          update(element, start + row * run.row_length, right - left, static_cast<const float*>(spread + left - from));
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

// Sums over the local elements of cut blocks, added to cut_sums in the order of the tables.
void add_cut_sums(const Streams& streams, const Blocks& blocks, double* cut_sums, int64_t threads) {
  struct Part {
    int64_t tensor, start, first, last, into;
    const ColumnRun* columns;
    bool has_grad;
  };
  std::vector<Part> parts;
  int64_t results = 0;
  for (const Piece& piece : blocks.pieces) {
    for (int64_t i = 0; i < piece.length; i += kSumPart) {
      const int64_t stop = std::min(i + kSumPart, piece.length);
      parts.push_back({piece.tensor, piece.start, i, stop, results++, nullptr, piece.has_grad});
    }
  }
  for (const ColumnRun& run : blocks.columns) {
    for (int64_t block = 0; block < run.blocks(); block += stripe_blocks(run)) {
      const int64_t last = std::min(block + stripe_blocks(run), run.blocks());
      parts.push_back({run.tensor, run.start, block, last, results, &run, run.has_grad != 0});
      results += last - block;
    }
  }
  std::vector<double> sums(size_t(results), 0.0);
  run_tasks(int64_t(parts.size()), threads, [&](int64_t task) {
    const Part& part = parts[size_t(task)];
    const View grad(streams, 0, part.tensor, part.has_grad);
    double* into = sums.data() + part.into;
    if (part.columns != nullptr) {
      sum_columns(*part.columns, grad, part.first, part.last, into);
    } else if (grad.base != nullptr) {
      *into = sum_part(grad, part.start + part.first, part.last - part.first);
    }
  });
  const double* sum = sums.data();
  for (const Piece& piece : blocks.pieces) {
    for (int64_t i = 0; i < piece.length; i += kSumPart) cut_sums[piece.cut] += *sum++;
  }
  for (const ColumnRun& run : blocks.columns) {
    for (int64_t block = 0; block < run.blocks(); ++block) cut_sums[run.cut + block] += *sum++;
  }
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// The interface. Every function returns 0, or which row of a table is impossible (see update_spans, read_blocks).

#pragma GCC visibility push(default)
extern "C" {

void ds_optim_use_threads(void* region, void* number) {
  parallel_region = reinterpret_cast<ParallelRegion>(region);
  thread_number = reinterpret_cast<int (*)()>(number);
}

#define DS_OPTIM_ELEMENTWISE(name, Rule)                                                                              \
  int64_t ds_optim_##name(int64_t tensors, const int64_t* const* streams, const int64_t* numels, const int64_t* spans, \
                          int64_t rows, const float* scalars, int64_t threads) {                                      \
    Rule rule;                                                                                                        \
    std::memcpy(&rule, scalars, sizeof rule);                                                                         \
    return update_spans(rule, Streams{streams, tensors}, numels, spans, rows, threads);                               \
  }

DS_OPTIM_ELEMENTWISE(adamw, AdamW)
DS_OPTIM_ELEMENTWISE(lion, Lion)
DS_OPTIM_ELEMENTWISE(adan, Adan)

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
                           int64_t threads) {
  Blocks blocks;
  const int64_t bad =
      read_blocks(row_runs, rows, column_runs, column_rows, tensors, numels, slots, cuts, select, &blocks);
  if (bad != 0) return bad;
  AdamMini rule;
  std::memcpy(&rule, scalars, sizeof rule);
  AdamMiniStep(rule, Streams{streams, tensors}, blocks, cut_sums, threads).run();
  return 0;
}

}  // extern "C"
#pragma GCC visibility pop
