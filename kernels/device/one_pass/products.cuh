// The products of the forward passes on tensor cores: vec(X) phi of 8 tokens, with phi in registers, and the sum of
// squares or the products of the streams with each other.
//
// Rows of the accumulators are columns of phi, and their columns are tokens. `store<ROW_BYTES>(at, lane)` writes the
// sums of a warp to shared memory, ROW_BYTES from token to token.

#pragma once

#include "one_pass/geometry.cuh"

// Columns of phi in groups of 8, and the fragments of a slice.
constexpr int kSliceFragments = kColumns / 8;

// A fragments of phi transposed, with phi = high + low, for 16 rows of phi: 8 channels of two streams. Groups of 8
// columns come in pairs, a fragment for their high parts and one for their low ones; a group that is left has a
// fragment for both.
struct Slice {
  uint4 fragments[kSliceFragments];
};

// at: this lane's words, columns g, g + 8 and so on of two rows each.
__device__ inline Slice read_phi(u32 at, u32 row_bytes, u32 stream_bytes) {
  u32 high[kSliceFragments][2], low[kSliceFragments][2];
#pragma unroll
  for (int c = 0; c < kSliceFragments; ++c) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const u32 word = at + s * stream_bytes + 8 * c * 4;
      u32 parts[2];
      split(read_float(word), read_float(word + row_bytes), parts);
      high[c][s] = parts[0];
      low[c][s] = parts[1];
    }
  }
  Slice slice;
#pragma unroll
  for (int c = 0; c < kSliceFragments; c += 2) {
    if (c + 1 < kSliceFragments) {
      slice.fragments[c] = {high[c][0], high[c + 1][0], high[c][1], high[c + 1][1]};
      slice.fragments[c + 1] = {low[c][0], low[c + 1][0], low[c][1], low[c + 1][1]};
    } else {
      slice.fragments[c] = {high[c][0], low[c][0], high[c][1], low[c][1]};
    }
  }
  return slice;
}

__device__ inline void mma(float (&d)[4], uint4 a, uint2 b) { mma(d, a.x, a.y, a.z, a.w, b); }

// The products with phi of 8 tokens as the tensor cores leave them: their rows are those of a `Slice`.
struct Sums {
  float sums[(kSliceFragments + 1) / 2][4] = {};

  // Those that add to the same sums are apart.
  __device__ void add(const Slice& phi, uint2 x) {
#pragma unroll
    for (int first = 0; first < 2; ++first) {
#pragma unroll
      for (int f = first; f < kSliceFragments; f += 2) mma(sums[f / 2], phi.fragments[f], x);
    }
  }

  template <int ROW_BYTES>
  __device__ void store(u32 at, int lane) const {
    const int g = lane / 4, q = lane % 4;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const u32 row = at + (2 * q + e) * ROW_BYTES + 4 * g;
#pragma unroll
      for (int c = 0; c < kSliceFragments; c += 2) {
        const float upper = sums[c / 2][e], lower = sums[c / 2][2 + e];
        const bool is_pair = c + 1 < kSliceFragments;
        write_float(row + 32 * c, is_pair ? upper : upper + lower);
        if (is_pair) write_float(row + 32 * (c + 1), lower);
      }
    }
  }
};

// The sums of squares of the same tokens, on the diagonal.
struct Squares {
  float sums[4] = {};

  __device__ void add(const u32 (&x)[N]) {
#pragma unroll
    for (int j = 0; j < N; j += 2) mma(sums, {x[j], 0, x[j + 1], 0}, {x[j], x[j + 1]});
  }

  template <int ROW_BYTES>
  __device__ void store(u32 at, int lane) const {
    const int g = lane / 4, q = lane % 4;
    if (g / 2 == q) write_float(at + g * ROW_BYTES, g % 2 ? sums[1] : sums[0]);
  }
};

// G of the same tokens: <X[i], X[j]> are the diagonals of products of 8 tokens each.
struct Products {
  // Two such products at a time, those of the streams {i, j} with stream k.
  float sums[5][4] = {};

  // Of two boxes.
  __device__ void add(const u32 (&x)[N], const u32 (&y)[N]) {
    const auto add = [&](float (&d)[4], int i, int j, int k) {
      mma(d, {x[i], x[j], y[i], y[j]}, {x[k], y[k]});
    };
    add(sums[0], 0, 1, 0);
    add(sums[1], 1, 3, 1);
    add(sums[2], 3, 0, 3);
    add(sums[3], 2, 0, 2);
    add(sums[4], 1, 3, 2);
  }

  // The sum of squares, then G.
  template <int ROW_BYTES>
  __device__ void store(u32 at, int lane) const {
    constexpr int kEntries[5][2] = {{0, 4}, {1, 8}, {3, 6}, {2, 5}, {7, 9}};
    const int g = lane / 4, q = lane % 4;
    if (g / 2 != q) return;
    const u32 row = at + g * ROW_BYTES;
    float squares = 0.f;
#pragma unroll
    for (int k = 0; k < 5; ++k) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float entry = g % 2 ? sums[k][2 * e + 1] : sums[k][2 * e];
        write_float(row + 4 * (1 + kEntries[k][e]), entry);
        if (kEntries[k][e] < N) squares += entry;
      }
    }
    write_float(row, squares);
  }
};
template <bool NORM>
struct TokenProducts {
  using type = Squares;
};
template <>
struct TokenProducts<true> {
  using type = Products;
};
