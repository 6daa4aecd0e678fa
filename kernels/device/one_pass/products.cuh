// The products of the forward passes on tensor cores: vec(X) phi of 8 tokens, with phi in registers, and the sum of
// squares or the products of the streams with each other.
//
// Rows of the accumulators are columns of phi, and their columns are tokens. `store<ROW_BYTES>(at, lane)` writes the
// sums of a warp to shared memory, ROW_BYTES from token to token.

#pragma once

#include "one_pass/geometry.cuh"

// A fragments of phi transposed, with phi = high + low, for 16 rows of phi: 8 channels of two streams. Of the
// 48 rows that columns of phi make in two parts, the first has the columns 0 to 15 of high, the second those of
// low, the third the columns 16 to 23 of high and of low.
struct Slice {
  uint4 fragments[3];
};

// at: this lane's words, columns g, g + 8 and g + 16 of two rows each.
__device__ inline Slice read_phi(u32 at, u32 row_bytes, u32 stream_bytes) {
  u32 high[3][2], low[3][2];
#pragma unroll
  for (int c = 0; c < 3; ++c) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const u32 word = at + s * stream_bytes + 8 * c * 4;
      u32 parts[2];
      split(read_float(word), read_float(word + row_bytes), parts);
      high[c][s] = parts[0];
      low[c][s] = parts[1];
    }
  }
  return {{{high[0][0], high[1][0], high[0][1], high[1][1]},
           {low[0][0], low[1][0], low[0][1], low[1][1]},
           {high[2][0], low[2][0], high[2][1], low[2][1]}}};
}

__device__ inline void mma(float (&d)[4], uint4 a, uint2 b) { mma(d, a.x, a.y, a.z, a.w, b); }

// The products with phi of 8 tokens as the tensor cores leave them: their rows are those of a `Slice`.
struct Sums {
  float sums[2][4] = {};

  __device__ void add(const Slice& phi, uint2 x) {
    mma(sums[0], phi.fragments[0], x);
    mma(sums[1], phi.fragments[2], x);
    mma(sums[0], phi.fragments[1], x);
  }

  template <int ROW_BYTES>
  __device__ void store(u32 at, int lane) const {
    const int g = lane / 4, q = lane % 4;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const u32 row = at + (2 * q + e) * ROW_BYTES + 4 * g;
      write_float(row, sums[0][e]);
      write_float(row + 32, sums[0][2 + e]);
      write_float(row + 64, sums[1][e] + sums[1][2 + e]);
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
