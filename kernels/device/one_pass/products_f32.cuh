// The products of products.cuh for float32 streams.
//
// A float32 is cut into two parts of tf32, which has 11 bits of its 24. All products of parts count but those of two
// small ones: as small parts of the streams are of either sign, what is left out cancels. Tensor cores drop the last bits of a sum instead of rounding it, which a long sum would show. So they add up
// the large products of a box alone, and these sums are added in float32.

#pragma once

#include "one_pass/products.cuh"

// Parts of a number, the large one first; tensor cores leave out what is beyond 11 bits. `rounded` cuts to the nearest
// for one instruction more.
__device__ inline u32 large_part(u32 v) { return v & 0xffffe000; }
__device__ inline u32 rounded_part(u32 v) { return (v + 0x1000) & 0xffffe000; }
__device__ inline u32 rest_of(u32 v, u32 part) {
  return __float_as_uint(__uint_as_float(v) - __uint_as_float(part));
}
__device__ inline u32 small_part(u32 v) { return rest_of(v, large_part(v)); }

// A fragments of phi transposed for 4 channels of all streams, which are cut when they are used: of each two groups of 8
// columns one a pair of streams, then of a group that is left one for two pairs.
template <>
struct Slice<f32> {
  static constexpr int kStreams = N, kGroupPairs = kColumnGroups / 2;
  static constexpr int kWhole = N / 2 * kGroupPairs;
  static constexpr int kFragments = kWhole + kColumnGroups % 2 * ((N + 2) / 4);
  uint4 fragments[kFragments];

  // at: this lane's word, column g of a row.
  __device__ static Slice read(u32 at, u32, u32 stream_bytes) {
    const auto of = [&](int stream, int group) {
      return stream < N ? read1(at + stream * stream_bytes + 32 * group) : 0;
    };
    Slice slice;
#pragma unroll
    for (int f = 0; f < kWhole; ++f) {
      const int s = f / kGroupPairs * 2, c = f % kGroupPairs * 2;
      slice.fragments[f] = {of(s, c), of(s, c + 1), of(s + 1, c), of(s + 1, c + 1)};
    }
#pragma unroll
    for (int f = kWhole; f < kFragments; ++f) {
      const int s = (f - kWhole) * 4, c = kColumnGroups - 1;
      slice.fragments[f] = {of(s, c), of(s + 1, c), of(s + 2, c), of(s + 3, c)};
    }
    return slice;
  }
  // Makes the compiler cut phi anew for every tile: it would keep the parts, in twice the registers.
  __device__ static void keep_whole(uint4& fragment) {
    keep(fragment.x), keep(fragment.y), keep(fragment.z), keep(fragment.w);
  }
};

template <>
struct Sums<f32> : Sums<bf16> {
  // Of a box. A group of columns that is left has products with the large parts of phi in the upper rows, and with the
  // small ones in the lower.
  __device__ void add(const Slice<f32>& phi, const u32 (&x)[N], int) {
    using Phi = Slice<f32>;
    constexpr int kNum = (kColumnGroups + 1) / 2;
    float box[kNum][4] = {};
    uint2 large[N / 2], small[N / 2];
#pragma unroll
    for (int p = 0; p < N / 2; ++p) {
      large[p] = {rounded_part(x[2 * p]), rounded_part(x[2 * p + 1])};
      small[p] = {rest_of(x[2 * p], large[p].x), rest_of(x[2 * p + 1], large[p].y)};
    }
    // Products with small parts come first: to add them to small sums drops nothing.
#pragma unroll
    for (int with_large = 0; with_large < 2; ++with_large) {
#pragma unroll
      for (int p = 0; p < N / 2; ++p) {
        const uint2 b = with_large ? large[p] : small[p];
#pragma unroll
        for (int c = 0; c < Phi::kGroupPairs; ++c) {
          const uint4 a = phi.fragments[p * Phi::kGroupPairs + c];
          if (!with_large) {
            mma_tf32(box[c], small_part(a.x), small_part(a.y), small_part(a.z), small_part(a.w),
                     large[p]);
          }
          mma_tf32(box[c], large_part(a.x), large_part(a.y), large_part(a.z), large_part(a.w), b);
        }
        if constexpr (kColumnGroups % 2 == 1) {
          const uint4 both = phi.fragments[Phi::kWhole + p / 2];
          const uint2 a = p % 2 == 0 ? uint2{both.x, both.y} : uint2{both.z, both.w};
          mma_tf32(box[kNum - 1], large_part(a.x), small_part(a.x), large_part(a.y),
                   small_part(a.y), b);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kNum; ++c) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[c][e] += box[c][e];
    }
  }
};

// Sums that four neighbouring lanes have of a token.
__device__ inline float token_sum(float v) {
  v += __shfl_xor_sync(kAllLanes, v, 1);
  return v + __shfl_xor_sync(kAllLanes, v, 2);
}

template <>
struct Squares<f32> {
  float sum = 0.f;

  __device__ void add(const u32 (&x)[N]) {
#pragma unroll
    for (int j = 0; j < N; ++j) sum += __uint_as_float(x[j]) * __uint_as_float(x[j]);
  }

  template <int ROW_BYTES>
  __device__ void store(u32 at, int lane) const {
    const float whole = token_sum(sum);
    if (lane % 4 == 0) write_float(at + lane / 4 * ROW_BYTES, whole);
  }
};

template <>
struct Products<f32> {
  float sums[kProducts] = {};

  // Of two boxes.
  __device__ void add(const u32 (&x)[N], const u32 (&y)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll
      for (int j = i; j < N; ++j) {
        float& sum = sums[entry_of_g(i, j)];
        sum += __uint_as_float(x[i]) * __uint_as_float(x[j]);
        sum += __uint_as_float(y[i]) * __uint_as_float(y[j]);
      }
    }
  }

  // The sum of squares, then G.
  template <int ROW_BYTES>
  __device__ void store(u32 at, int lane) const {
    const u32 row = at + lane / 4 * ROW_BYTES;
    float squares = 0.f;
#pragma unroll
    for (int entry = 0; entry < kProducts; ++entry) {
      const float whole = token_sum(sums[entry]);
      if (entry < N) squares += whole;
      if (lane % 4 == 0) write_float(row + 4 * (1 + entry), whole);
    }
    if (lane % 4 == 0) write_float(row, squares);
  }
};
