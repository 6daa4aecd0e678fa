// The products of the forward passes on tensor cores: vec(X) phi of 8 tokens, with phi in registers, and the sum of
// squares or the products of the streams with each other. Those of float32 streams are in products_f32.cuh.
//
// Rows of the accumulators are columns of phi, and their columns are tokens. `store<ROW_BYTES>(at, lane)` writes the
// sums of a warp to shared memory, ROW_BYTES from token to token.

#pragma once

#include "one_pass/geometry.cuh"

// Columns of phi in groups of 8.
constexpr int kColumnGroups = kColumns / 8;

// Entries of G on and above its diagonal: the diagonal, then the others row by row.
constexpr int kProducts = N * (N + 1) / 2;
// Which of them is that of two streams.
__device__ constexpr int entry_of_g(int i, int j) {
  const int row = i < j ? i : j, column = i < j ? j : i;
  return row == column ? row : N - 1 + row * N - row * (row + 1) / 2 + column - row;
}

// A fragments of phi transposed, with phi = high + low, for 16 rows of phi: 8 channels of two streams. Groups of 8
// columns come in pairs, a fragment for their high parts and one for their low ones; a group that is left has a
// fragment for both.
template <class S>
struct Slice {
  static constexpr int kStreams = 2, kFragments = kColumnGroups;
  uint4 fragments[kFragments];

  // at: this lane's words, columns g, g + 8 and so on of two rows each.
  __device__ static Slice read(u32 at, u32 row_bytes, u32 stream_bytes) {
    u32 high[kFragments][2], low[kFragments][2];
#pragma unroll
    for (int c = 0; c < kFragments; ++c) {
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
    for (int c = 0; c < kFragments; c += 2) {
      if (c + 1 < kFragments) {
        slice.fragments[c] = {high[c][0], high[c + 1][0], high[c][1], high[c + 1][1]};
        slice.fragments[c + 1] = {low[c][0], low[c + 1][0], low[c][1], low[c + 1][1]};
      } else {
        slice.fragments[c] = {high[c][0], low[c][0], high[c][1], low[c][1]};
      }
    }
    return slice;
  }
  __device__ static void keep_whole(uint4&) {}
};

__device__ inline void mma(float (&d)[4], uint4 a, uint2 b) { mma(d, a.x, a.y, a.z, a.w, b); }

// The products with phi of 8 tokens as the tensor cores leave them: their rows are those of a `Slice`.
template <class S>
struct Sums {
  float sums[(kColumnGroups + 1) / 2][4] = {};

  // Of a slice of phi and of the same streams from `first` on. Products that add to the same sums are apart.
  __device__ void add(const Slice<S>& phi, const u32 (&x)[N], int first) {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
#pragma unroll
      for (int f = part; f < kColumnGroups; f += 2) {
        mma(sums[f / 2], phi.fragments[f], {x[first], x[first + 1]});
      }
    }
  }

  template <int ROW_BYTES>
  __device__ void store(u32 at, int lane) const {
    const int g = lane / 4, q = lane % 4;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const u32 row = at + (2 * q + e) * ROW_BYTES + 4 * g;
#pragma unroll
      for (int c = 0; c < kColumnGroups; c += 2) {
        const float upper = sums[c / 2][e], lower = sums[c / 2][2 + e];
        const bool is_pair = c + 1 < kColumnGroups;
        write_float(row + 32 * c, is_pair ? upper : upper + lower);
        if (is_pair) write_float(row + 32 * (c + 1), lower);
      }
    }
  }
};

// The sums of squares of the same tokens, on the diagonal.
template <class S>
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

// Streams {i, j, k}: a product on tensor cores has the entries [i, k] and [j, k] of G. All entries are once among them,
// or twice.
template <int STREAMS>
struct Triples;
template <>
struct Triples<2> {
  static constexpr int kNum = 2;
  static constexpr int kAll[kNum][3] = {{0, 1, 0}, {0, 1, 1}};
};
template <>
struct Triples<4> {
  static constexpr int kNum = 5;
  static constexpr int kAll[kNum][3] = {{0, 1, 0}, {1, 3, 1}, {3, 0, 3}, {2, 0, 2}, {1, 3, 2}};
};

// G of the same tokens: <X[i], X[j]> are the diagonals of products of 8 tokens each.
template <class S>
struct Products {
  using All = Triples<N>;
  float sums[All::kNum][4] = {};

  // Of two boxes.
  __device__ void add(const u32 (&x)[N], const u32 (&y)[N]) {
#pragma unroll
    for (int n = 0; n < All::kNum; ++n) {
      const int i = All::kAll[n][0], j = All::kAll[n][1], k = All::kAll[n][2];
      mma(sums[n], {x[i], x[j], y[i], y[j]}, {x[k], y[k]});
    }
  }

  // The sum of squares, then G.
  template <int ROW_BYTES>
  __device__ void store(u32 at, int lane) const {
    const int g = lane / 4, q = lane % 4;
    if (g / 2 != q) return;
    const u32 row = at + g * ROW_BYTES;
    float squares = 0.f;
#pragma unroll
    for (int n = 0; n < All::kNum; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int entry = entry_of_g(All::kAll[n][e], All::kAll[n][2]);
        const float value = g % 2 ? sums[n][2 * e + 1] : sums[n][2 * e];
        write_float(row + 4 * (1 + entry), value);
        if (entry < N) squares += value;
      }
    }
    write_float(row, squares);
  }
};
