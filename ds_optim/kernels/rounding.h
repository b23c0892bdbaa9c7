// Stochastic rounding to bf16; ds_optim/kernels/rounding.py says what the random bits are and where they come from.

#pragma once

#include <algorithm>
#include <cstdint>

#include "bits.h"

namespace ds_optim {

// One row of `Places.table`, ascending by tensor and start.
struct Place {
  int64_t tensor, start, length, identity, first;
};
static_assert(sizeof(Place) == 5 * sizeof(int64_t), "a Place is read straight from the table");

inline uint32_t prospector(uint32_t x) {
  x = (x ^ (x >> 15)) * 0x2c1b3c6du;
  x = (x ^ (x >> 12)) * 0x297a2d39u;
  return x ^ (x >> 15);
}

inline uint16_t float_to_bf16_at_random(float x, uint32_t noise) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu;
  const uint32_t up = magnitude < 0x7f7f0000u ? ((bits & 0xffffu) + noise) >> 16 : 0u;
  return uint16_t(magnitude > 0x7f800000u ? 0x7fc0u : (bits >> 16) + up);
}

// The noise of an element is a function of the low word of its index once these two are known.
struct NoiseKey {
  uint32_t low, high;

  uint16_t round(float value, uint32_t index) const {
    uint32_t x = index ^ low;
    x = ((x ^ (x >> 15)) * 0x2c1b3c6du) ^ high;
    x = (x ^ (x >> 12)) * 0x297a2d39u;
    return float_to_bf16_at_random(value, (x ^ (x >> 15)) >> 16);
  }
};

// No places: round to nearest.
struct Rounding {
  const Place* places;
  int64_t count;
  uint64_t key;

  // Whether elements [start, start + length) of a tensor all have a place.
  bool covers(int64_t tensor, int64_t start, int64_t length) const {
    while (length > 0) {
      const Place* place = find(tensor, start);
      if (place == nullptr) return false;
      const int64_t n = place->start + place->length - start;
      start += n;
      length -= n;
    }
    return true;
  }

  // Elements [start, start + n) of a tensor, which `covers` has seen; `to` is the first of them.
  void store(int64_t tensor, int64_t start, int64_t n, const float* from, uint16_t* to) const {
    while (n > 0) {
      const Place* place = find(tensor, start);
      const uint64_t index = uint64_t(place->first + start - place->start);
      const int64_t before_carry = int64_t((uint64_t(1) << 32) - (index & 0xffffffffu));
      const int64_t count = std::min({n, place->start + place->length - start, before_carry});
      const uint64_t mixed = uint64_t(place->identity) ^ key;
      const NoiseKey noise{prospector(uint32_t(mixed)), prospector(uint32_t(mixed >> 32) ^ uint32_t(index >> 32))};
      store_stretch(noise, uint32_t(index), count, from, to);
      start += count;
      n -= count;
      from += count;
      to += count;
    }
  }

  __attribute__((noinline)) static void store_stretch(const NoiseKey noise, uint32_t index, int64_t n,
                                                      const float* __restrict from, uint16_t* __restrict to) {
    for (int64_t i = 0; i < n; ++i) to[i] = noise.round(from[i], index + uint32_t(i));
  }

 private:
  const Place* find(int64_t tensor, int64_t start) const {
    const Place* place = std::upper_bound(places, places + count, start, [tensor](int64_t wanted, const Place& one) {
      return tensor < one.tensor || (tensor == one.tensor && wanted < one.start);
    });
    if (place == places) return nullptr;
    --place;
    return place->tensor == tensor && start < place->start + place->length ? place : nullptr;
  }
};

}  // namespace ds_optim
