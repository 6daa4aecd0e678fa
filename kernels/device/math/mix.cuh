// New streams of many bfloat16 ones on tensor cores, X'[i] = sum over j of H[i, j] X[j] + h[i] y: a warp has some channels of
// one token, and the weights in two bfloat16 parts. An infinity or NaN of a channel stays there.

#pragma once

#include "base/matrix.cuh"

// The place of a warp: a token and the first of its CHANNELS channels. Within a slab of tokens 32 bits can count.
template <int THREADS, int CHANNELS>
struct WarpItem {
  long long token;
  int first;
  bool exists;

  __device__ WarpItem(int tokens, int slab, int hidden) {
    const u32 warps = (hidden + CHANNELS - 1) / CHANNELS;
    const u32 warp = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    const int token_of_slab = warp / warps;
    token = (long long)blockIdx.y * slab + token_of_slab;
    first = warp % warps * CHANNELS;
    exists = token_of_slab < slab && token < tokens;
  }
};

// A matrix of weights as A fragments, a row a new stream; of a vector that is added the first column of 8 others. With up
// to 8 streams these are columns 8 to 15, the rows from 8 on have the lower parts of the others, and one product does.
template <int N>
struct MixingWeights {
  u32 upper[4], lower[4], added[2][2];

  // `at(i, j)`, zero where there is none; `more(i)`.
  template <class At, class More>
  __device__ MixingWeights(At at, More more) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int i = g + r % 2 * 8, j = 2 * q + r / 2 * 8;
      u32 parts[2] = {};
      if (i < N && j < N) split(at(i, j), at(i, j + 1), parts);
      upper[r] = parts[0], lower[r] = parts[1];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
      split(q == 0 && g + r * 8 < N ? more(g + r * 8) : 0.f, 0.f, added[r]);
    if constexpr (N <= 8) {
      upper[1] = lower[0];
      upper[2] = added[0][0], upper[3] = added[0][1];
    }
  }

  // Channels of the streams g and g + 8 that B has as columns 2 q and 2 q + 1.
  __device__ void multiply(float (&mixed)[4], u32 b, u32 later_b, u32 added_b) const {
    float sums[4] = {};
    if constexpr (N <= 8) {
      mma(sums, upper[0], upper[1], upper[2], upper[3], {b, added_b});
      mixed[0] = sums[0] + sums[2], mixed[1] = sums[1] + sums[3];
    } else {
      mma_k8(sums, added[0][1], added[1][1], added_b);
      mma(sums, lower[0], lower[1], lower[2], lower[3], {b, later_b});
      mma_k8(sums, added[0][0], added[1][0], added_b);
      mma(sums, upper[0], upper[1], upper[2], upper[3], {b, later_b});
#pragma unroll
      for (int v = 0; v < 4; ++v) mixed[v] = sums[v];
    }
  }
};

// Weights of post: H_res and h_post of a token.
template <int N>
__device__ inline MixingWeights<N> post_weights(const float* h_res, const float* h_post, int n) {
  return MixingWeights<N>([&](int i, int j) { return i < n && j < n ? h_res[i * n + j] : 0.f; },
                          [&](int i) { return i < n ? h_post[i] : 0.f; });
}

// 64 channels of all streams, and of what is added.
template <bool ALIGNED, int N>
struct MixedUnit {
  static constexpr int kHalves = N / 8;
  // Channels of the streams 2 q, 2 q + 1, 2 q + 8 and 2 q + 9. Column g of B is channel 8 g + e.
  Pack<Stream, 8> xs[2 * kHalves], ys = {};

  __device__ void read(const Stream* from, const Stream* added, int unit, int n, int hidden) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
#pragma unroll
    for (int k = 0; k < 2 * kHalves; ++k) {
      const int j = 2 * q + k % 2 + k / 2 * 8;
      load<ALIGNED>(xs[k], from + (long long)j * hidden, unit + 8 * g, j < n ? hidden : 0);
    }
    if (added) load<ALIGNED>(ys, added, unit + 8 * g, q == 0 ? hidden : 0);
  }

  // Stores new streams, and calls `use(h, r, result)` with those of stream g + 8 h, from channel 16 q + 8 r on, as they
  // are rounded.
  template <class Use>
  __device__ void mix(const MixingWeights<N>& weights, Stream* to, int unit, int n, int hidden,
                      Use use) const {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    float values[kHalves][2][8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const auto pair_of = [&](u32 low, u32 high) {
        return __byte_perm(low, high, e % 2 ? 0x7632 : 0x5410);
      };
      float mixed[4];
      weights.multiply(mixed, pair_of(xs[0].words[e / 2], xs[1].words[e / 2]),
                       pair_of(xs[2 * kHalves - 2].words[e / 2], xs[2 * kHalves - 1].words[e / 2]),
                       pair_of(ys.words[e / 2], 0));
#pragma unroll
      for (int v = 0; v < 2 * kHalves; ++v) values[v / 2][v % 2][e] = mixed[v];
    }
#pragma unroll
    for (int v = 0; v < 2 * kHalves; ++v) {
      const int i = g + v / 2 * 8;
      Pack<Stream, 8> result;
      result.set(values[v / 2][v % 2]);
      store<ALIGNED>(result, to + (long long)i * hidden, unit + 16 * q + v % 2 * 8,
                     i < n ? hidden : 0);
      use(v / 2, v % 2, result);
    }
  }
};

// New streams of a warp's channels, by weights that a call gives. `from` and `to` are those of the token and may be the
// same; `added` may be null. All that fits into registers is on its way at once, and the weights behind it.
// `use(unit, h, r, result)` as above, units from 0 on.
template <bool ALIGNED, int N, int CHANNELS, class WeightsOf, class Use>
__device__ inline void mix_channels(WeightsOf weights_of, const Stream* from, const Stream* added,
                                    Stream* to, int first, int n, int hidden, Use use) {
  constexpr int kUnits = CHANNELS / 64, kAtOnce = ALIGNED ? kUnits : 1;
  MixedUnit<ALIGNED, N> units[kAtOnce];
  const auto read = [&](int u) { units[u % kAtOnce].read(from, added, first + 64 * u, n, hidden); };
#pragma unroll
  for (int u = 0; u < kAtOnce; ++u) read(u);
  const MixingWeights<N> weights = weights_of();
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    if (first + 64 * u >= hidden) break;
    if (u >= kAtOnce) read(u);
    units[u % kAtOnce].mix(
        weights, to, first + 64 * u, n, hidden,
        [&](int h, int r, const Pack<Stream, 8>& result) { use(u, h, r, result); });
  }
}

// No use of a result but that it is stored.
struct NoUse {
  __device__ void operator()(int, int, int, const Pack<Stream, 8>&) const {}
};
