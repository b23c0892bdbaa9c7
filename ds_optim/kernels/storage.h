// The tensors of a call, and how their elements become fp32 and go back: bf16 and fp16 pass through small buffers on the
// stack, which keeps one fp32 core per rule. Rounding is torch's, to nearest with ties to even; parameters in bf16 may be
// rounded stochastically instead.

#pragma once

#include <algorithm>
#include <cstdint>

#include "bits.h"
#include "rounding.h"

namespace ds_optim {

constexpr int64_t kBuffer = 1024;  // elements that pass through conversion buffers at a time

enum Dtype : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum Stream : int64_t { kParam = 0, kGrad = 1, kFirstState = 2, kBlockState = 3 };

#define DS_OPTIM_INLINE __attribute__((always_inline)) inline

// Memory is asked for kAhead elements before its use, kStep elements at a time: the hardware's own prefetcher stops at
// every page, which cost Lion a tenth of its time. Addresses past the end are harmless. (Not a function: GCC drops calls
// of functions that do nothing but prefetch.)
#define DS_OPTIM_FETCH(x, write) __builtin_prefetch((x) + kAhead, write)
constexpr int64_t kStep = 64;
constexpr int64_t kAhead = 256;
constexpr int64_t kCacheLine = 16;

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

__attribute__((noinline)) inline void load(const void* from, int64_t dtype, int64_t start, int64_t n, float* __restrict to) {
  const uint16_t* __restrict h = static_cast<const uint16_t*>(from) + start;
  if (dtype == kBFloat16) {
    for (int64_t i = 0; i < n; ++i) to[i] = bf16_to_float(h[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = fp16_to_float(h[i]);
  }
}

__attribute__((noinline)) inline void store(void* to, int64_t dtype, int64_t start, int64_t n, const float* __restrict from) {
  uint16_t* __restrict h = static_cast<uint16_t*>(to) + start;
  if (dtype == kBFloat16) {
    for (int64_t i = 0; i < n; ++i) h[i] = float_to_bf16(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) h[i] = float_to_fp16(from[i]);
  }
}

alignas(64) inline const float kZeros[kBuffer] = {};

// One stream is a parameter, gradient or state of every tensor: int64[2 * tensors], addresses, then dtypes.
struct Streams {
  const int64_t* const* tables;
  int64_t tensors;
  const Rounding* rounding = nullptr;  // of parameters; none rounds to nearest

  void* address(int64_t stream, int64_t tensor) const { return reinterpret_cast<void*>(tables[stream][tensor]); }
  int64_t dtype(int64_t stream, int64_t tensor) const { return tables[stream][tensors + tensor]; }

  // Whether parameter elements [start, start + length) can be rounded as they should.
  bool placed(int64_t tensor, int64_t start, int64_t length) const {
    return rounding == nullptr || dtype(kParam, tensor) != kBFloat16 || rounding->covers(tensor, start, length);
  }
};

// A tensor's stream as fp32: fp32 memory as it is, anything else through a buffer. A missing gradient is zeros.
struct View {
  void* base = nullptr;
  int64_t dtype = kFloat32, tensor = 0;
  const Rounding* rounding = nullptr;

  View() = default;
  View(const Streams& streams, int64_t stream, int64_t tensor)
      : base(streams.address(stream, tensor)),
        dtype(streams.dtype(stream, tensor)),
        tensor(tensor),
        rounding(stream == kParam && dtype == kBFloat16 ? streams.rounding : nullptr) {}

  bool direct() const { return base != nullptr && dtype == kFloat32; }
  float* at(int64_t start, int64_t n, float* buffer) const {
    if (base == nullptr) return const_cast<float*>(kZeros);
    if (dtype == kFloat32) return static_cast<float*>(base) + start;
    load(base, dtype, start, n, buffer);
    return buffer;
  }
  void put(int64_t start, int64_t n, const float* buffer) const {
    if (base == nullptr || dtype == kFloat32) return;
    if (rounding != nullptr) {
      rounding->store(tensor, start, n, buffer, static_cast<uint16_t*>(base) + start);
    } else {
      store(base, dtype, start, n, buffer);
    }
  }
};

}  // namespace ds_optim
