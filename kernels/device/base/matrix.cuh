// Products of the projection on tensor cores, to (near) float32 precision.
//
// A float32 is the sum of bfloat16 parts: two parts have 16 bits of its mantissa, three have all 24.
// The product of two values is the sum of the products of their parts, without those that are too
// small to count. A bfloat16 stream is one part as it is; weights (phi, the gradient of m) are
// cut into two parts beside 16-bit streams and three beside float32.
//
// Fragments are those of mma.m16n8k16: lane = 4 g + q, where
//   A (16 x 16): a[0] (g, 2q) a[1] (g + 8, 2q) a[2] (g, 2q + 8) a[3] (g + 8, 2q + 8), each with its
//                right neighbour
//   B (16 x 8):  b[0] (2q, g) b[1] (2q + 8, g), each with the one below
//   D (16 x 8):  d[0] (g, 2q) d[1] (g, 2q + 1) d[2] (g + 8, 2q) d[3] (g + 8, 2q + 1)

#pragma once

#include "base/common.cuh"

// Parts of a value of the streams, and of a weight beside it.
template <class S>
constexpr int kStreamParts = 3;
template <>
constexpr int kStreamParts<bf16> = 1;
template <>
constexpr int kStreamParts<f16> = 2;
template <class S>
constexpr int kWeightParts = sizeof(S) == 4 ? 3 : 2;

// Parts of r dm and of phi in the products that make d_x. Beside bfloat16 streams one part in float16 is as near as the
// cotangents of the streams want it (see `half_unit`).
template <class S>
constexpr int kBackParts = kWeightParts<S>;
template <>
constexpr int kBackParts<bf16> = 1;

// Whether the product of these parts counts.
template <class S>
__device__ constexpr bool counts(int part, int weight_part) {
  return part + weight_part < (sizeof(S) == 4 ? 3 : 4);
}

// Parts of two neighbours: parts[p] holds part p of both.
template <int P>
__device__ inline void split(float a, float b, u32 (&parts)[P]) {
#pragma unroll
  for (int p = 0; p < P; ++p) {
    parts[p] = pair_of((bf16*)nullptr, a, b);
    a -= __uint_as_float(parts[p] << 16);
    b -= __uint_as_float(parts[p] & 0xffff0000);
  }
}

// The first number of both parts, in one word.
__device__ inline u32 first_of(const u32 (&parts)[2]) {
  return (parts[0] & 0xffff) | parts[1] << 16;
}
// A number in a word, as two bfloat16 parts.
__device__ inline u32 word_of(float v) {
  u32 parts[2];
  split(v, 0.f, parts);
  return first_of(parts);
}

// Eight values of a stream in parts: parts[p][w] holds values 2w and 2w + 1.
template <class S>
__device__ inline void split(const Pack<S, 8>& pack, u32 (&parts)[kStreamParts<S>][4]) {
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (kStreamParts<S> == 1) {
      parts[0][w] = pack.words[w];
    } else {
      u32 pair[kStreamParts<S>];
      split(pack[2 * w], pack[2 * w + 1], pair);
#pragma unroll
      for (int p = 0; p < kStreamParts<S>; ++p) parts[p][w] = pair[p];
    }
  }
}

__device__ inline u32 pair(float a, float b) { return pair_of((bf16*)nullptr, a, b); }
__device__ inline float low_half(u32 pair) { return __uint_as_float(pair << 16); }
__device__ inline float high_half(u32 pair) { return __uint_as_float(pair & 0xffff0000); }

// ---- products in float16 ---------------------------------------------------------------------------

// float16 has 11 bits of a number where bfloat16 has 8, and little range: a power of two brings the largest of
// some numbers to its upper end, and the others keep their bits down to 2^-29 of that.

// The inverse of this power for numbers up to `largest`, given as the bits of its magnitude; inverses are of
// normal numbers, whatever the largest is.
__device__ inline float half_unit(u32 largest) {
  return __uint_as_float(max(int(largest >> 23) - 14, 1) << 23);
}
__device__ inline float inverse_of_unit(float unit) {
  return __uint_as_float((254u << 23) - __float_as_uint(unit));
}
__device__ inline u32 magnitude(float v) { return __float_as_uint(v) & 0x7fffffff; }

// The unit for some numbers, that of a warp.
__device__ inline float unit_of(const float* numbers, int count) {
  u32 largest = 0;
#pragma unroll 8
  for (int at = threadIdx.x % 32; at < count; at += 32) {
    largest = max(largest, magnitude(numbers[at]));
  }
  return half_unit(__reduce_max_sync(kAllLanes, largest));
}

__device__ inline u32 half_pair(float a, float b) { return pair_of((f16*)nullptr, a, b); }
// A number in parts of float16, as `split` cuts it in bfloat16: two have 22 bits of it.
template <int P>
__device__ inline void split_halves(float a, float b, u32 (&parts)[P]) {
#pragma unroll
  for (int p = 0; p < P; ++p) {
    parts[p] = half_pair(a, b);
    a -= wide(f16{u16(parts[p])});
    b -= wide(f16{u16(parts[p] >> 16)});
  }
}
// Both parts of a number in float16 in one word, as `word_of` has them in bfloat16.
__device__ inline u32 half_word_of(float v) {
  u32 parts[2];
  split_halves(v, 0.f, parts);
  return first_of(parts);
}

// Parts in float16 of pairs of numbers that come in two bfloat16 parts, times `scale`.
template <int P>
__device__ inline void split_halves(u32 high, u32 low, float scale, u32 (&parts)[P]) {
  const float a = __uint_as_float(high << 16) + __uint_as_float(low << 16);
  const float b = __uint_as_float(high & 0xffff0000) + __uint_as_float(low & 0xffff0000);
  split_halves(a * scale, b * scale, parts);
}
__device__ inline u32 half_pair(u32 high, u32 low, float scale) {
  u32 parts[1];
  split_halves(high, low, scale, parts);
  return parts[0];
}

__device__ inline void mma_half(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  mma_half(d, a[0], a[1], a[2], a[3], {b[0], b[1]});
}
// The fragments of `mma` in turn, with as many columns of A as the words say: two a word pair and octet.
template <int WORDS, int OCTETS>
__device__ inline void mma_half(float (&d)[4], const u32 (&a)[WORDS], const u32 (&b)[OCTETS]) {
  static_assert(WORDS == 2 * OCTETS, "");
#pragma unroll
  for (int octet = 0; octet + 1 < OCTETS; octet += 2) {
    const u32 own_a[4] = {a[2 * octet], a[2 * octet + 1], a[2 * octet + 2], a[2 * octet + 3]};
    const u32 own_b[2] = {b[octet], b[octet + 1]};
    mma_half(d, own_a, own_b);
  }
  if constexpr (OCTETS % 2 == 1) {
    const u32 own_a[2] = {a[WORDS - 2], a[WORDS - 1]}, own_b[1] = {b[OCTETS - 1]};
    mma_half(d, own_a, own_b);
  }
}

// ---- 16-bit streams as they are ------------------------------------------------------------------------

// The values of a word.
template <class S>
__device__ inline float low_of(u32 pair) {
  return Pack<S, 2>{{pair}}[0];
}
template <class S>
__device__ inline float high_of(u32 pair) {
  return Pack<S, 2>{{pair}}[1];
}

// In these words, or the compiler takes more registers.
template <>
__device__ inline float low_of<bf16>(u32 pair) {
  return low_half(pair);
}
template <>
__device__ inline float high_of<bf16>(u32 pair) {
  return high_half(pair);
}

template <class S>
__device__ inline void mma_of(float (&d)[4], uint4 a, uint2 b) {
  mma(d, a.x, a.y, a.z, a.w, b);
}
template <>
__device__ inline void mma_of<f16>(float (&d)[4], uint4 a, uint2 b) {
  mma_half(d, a.x, a.y, a.z, a.w, b);
}

// ---- the gradient of m, handed from pre's backward to the two products ----------------------------

constexpr int kTile = 16;  // tokens

// r * dm in parts, in the order in which the products' lanes want it, a tile of 16 tokens after the
// other: `rows` for d_x (16 columns; as B, the registers 0 and 2 are the first 8 tokens, 1 and 3 the
// others), `columns` for d_phi (B fragments of 8 columns).
struct Fragments {
  u32* rows;
  u32* columns;
  int num_columns;

  __device__ int hexets() const { return (num_columns + 15) / 16; }
  __device__ int octets() const { return (num_columns + 7) / 8; }

  // The uint4 of a tile, [hexet][part][lane].
  template <int P>
  __device__ const uint4* row_fragments(long long tile) const {
    return reinterpret_cast<const uint4*>(rows) + tile * hexets() * P * 32;
  }
  // The uint2 of a tile, [octet][part][lane].
  template <int P>
  __device__ const uint2* column_fragments(long long tile) const {
    return reinterpret_cast<const uint2*>(columns) + tile * octets() * P * 32;
  }

  // Column c, which may lie behind the last one: the padding must be zero. In float16 `rows` has the value times
  // `scale`, which brings the token's largest to the upper end of its range.
  template <class S>
  __device__ void set(long long token, int c, float value, float scale) const {
    constexpr int kRowParts = kBackParts<S>, kColumnParts = kWeightParts<S>;
    u32 parts[kColumnParts];
    split(value, 0.f, parts);
    const long long tile = token / kTile;
    const int t = token % kTile;
    const int row_lane = t % 8 * 4 + c % 8 / 2;
    const int row_register = t / 8 + c % 16 / 8 * 2;
#pragma unroll
    for (int p = 0; p < kRowParts; ++p) {
      const long long row = ((tile * hexets() + c / 16) * kRowParts + p) * 32 + row_lane;
      reinterpret_cast<u16*>(rows)[(row * 4 + row_register) * 2 + c % 2] =
          u16(kRowParts == 1 ? half_pair(value * scale, 0.f) : parts[p]);
    }
    if (c < octets() * 8) set_column(token, c, parts);
  }
  // A value of `columns` alone, for d_phi: its parts, in the lower halves.
  template <int P>
  __device__ void set_column(long long token, int c, const u32 (&parts)[P]) const {
    const long long tile = token / kTile;
    const int t = token % kTile;
    const int lane = c % 8 * 4 + t % 8 / 2;
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const long long column = ((tile * octets() + c / 8) * P + p) * 32 + lane;
      reinterpret_cast<u16*>(columns)[(column * 2 + t / 8) * 2 + t % 2] = u16(parts[p]);
    }
  }
};
