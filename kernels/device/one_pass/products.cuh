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

// In what units the columns g, g + 8 and so on of a lane are, where all of phi has to be known before it is cut: each
// column of a warp has its own, from its slices that have been added. Beside bfloat16 and float32 streams units are 1.
template <class S>
struct Units {
  static constexpr bool kAreOne = true;

  template <class Phi>
  __device__ void add(const Phi&) {}
  __device__ void find() {}
  template <class Phi>
  __device__ void cut(const Phi&) const {}
};

// A fragments of phi transposed, with phi = high + low, for 16 rows of phi: 8 channels of two streams. Groups of 8
// columns come in pairs, a fragment for their high parts and one for their low ones; a group that is left has a
// fragment for both. Before phi is cut its numbers lie there, in place of the parts of two the first and the second.
template <class S>
struct Slice {
  static constexpr int kStreams = 2, kFragments = kColumnGroups;
  uint4 fragments[kFragments];

  // at: this lane's words, columns g, g + 8 and so on of two rows each.
  __device__ static Slice read(u32 at, u32 row_bytes, u32 stream_bytes) {
    u32 words[kFragments][4];
#pragma unroll
    for (int c = 0; c < kFragments; ++c) {
      const bool is_left = c % 2 == 0 && c + 1 == kFragments;
#pragma unroll
      for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          u32& word = words[is_left ? c : c / 2 * 2 + row][2 * s + (is_left ? row : c % 2)];
          word = read1(at + s * stream_bytes + 8 * c * 4 + row * row_bytes);
        }
      }
    }
    Slice slice;
#pragma unroll
    for (int f = 0; f < kFragments; ++f)
      slice.fragments[f] = {words[f][0], words[f][1], words[f][2], words[f][3]};
    if constexpr (Units<S>::kAreOne) {
      slice.for_pairs([](u32& a, u32& b, int) {
        u32 parts[2];
        split(__uint_as_float(a), __uint_as_float(b), parts);
        a = parts[0], b = parts[1];
      });
    }
    return slice;
  }
  // Calls `use(a, b, c)` for two numbers of a column of group c, which its parts take the place of.
  template <class Use>
  __device__ void for_pairs(Use use) {
#pragma unroll
    for (int c = 0; c < kFragments; c += 2) {
      uint4& first = fragments[c];
      if (c + 1 < kFragments) {
        uint4& second = fragments[c + 1 < kFragments ? c + 1 : c];
        use(first.x, second.x, c), use(first.y, second.y, c + 1);
        use(first.z, second.z, c), use(first.w, second.w, c + 1);
      } else {
        use(first.x, first.y, c), use(first.z, first.w, c);
      }
    }
  }
  __device__ static void keep_whole(uint4&) {}
};

// float16 has too little range for the parts of phi: the unit of a column is a power of two, by its largest number
// (`half_unit`). The streams themselves are one part.
template <>
struct Units<f16> {
  static constexpr bool kAreOne = false;
  u32 largest[kColumnGroups] = {};  // magnitudes of this lane's numbers, until units are found
  u32 exponents = 0;                // a byte each
  static_assert(kColumnGroups <= 4, "bytes of a word");

  __device__ void add(Slice<f16>& phi) {
    phi.for_pairs([&](u32& a, u32& b, int c) {
      largest[c] = max(largest[c], max(a & 0x7fffffff, b & 0x7fffffff));
    });
  }
  __device__ void find() {
#pragma unroll
    for (int c = 0; c < kColumnGroups; ++c) {
      u32 most = largest[c];
      most = max(most, __shfl_xor_sync(kAllLanes, most, 1));
      most = max(most, __shfl_xor_sync(kAllLanes, most, 2));
      exponents |= __float_as_uint(half_unit(most)) >> 23 << 8 * c;
    }
  }
  __device__ float operator[](int c) const {
    return __uint_as_float((exponents >> 8 * c & 255) << 23);
  }
  __device__ void cut(Slice<f16>& phi) const {
    phi.for_pairs([&](u32& a, u32& b, int c) {
      const float scale = inverse_of_unit((*this)[c]);
      u32 parts[2];
      split_halves(__uint_as_float(a) * scale, __uint_as_float(b) * scale, parts);
      a = parts[0], b = parts[1];
    });
  }
};

// A sum of products with a column of group c in these units.
template <class S>
__device__ inline float times_unit(float sum, const Units<S>& units, int c) {
  if constexpr (Units<S>::kAreOne) {
    return sum;
  } else {
    return sum * units[c];
  }
}

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
        mma_of<S>(sums[f / 2], phi.fragments[f], {x[first], x[first + 1]});
      }
    }
  }

  template <int ROW_BYTES, class T>
  __device__ void store(u32 at, int lane, const Units<T>& units) const {
    const int g = lane / 4, q = lane % 4;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const u32 row = at + (2 * q + e) * ROW_BYTES + 4 * g;
#pragma unroll
      for (int c = 0; c < kColumnGroups; c += 2) {
        const bool is_pair = c + 1 < kColumnGroups;
        const float upper = sums[c / 2][e], lower = sums[c / 2][2 + e];
        write_float(row + 32 * c, times_unit(is_pair ? upper : upper + lower, units, c));
        if (is_pair) write_float(row + 32 * (c + 1), times_unit(lower, units, c + 1));
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
    for (int j = 0; j < N; j += 2) {
      mma_of<S>(sums, {x[j], 0, x[j + 1], 0}, {x[j], x[j + 1]});
    }
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
      mma_of<S>(sums[n], {x[i], x[j], y[i], y[j]}, {x[k], y[k]});
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
