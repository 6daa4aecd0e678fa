// post: X'[i] = sum over j of H_res[i, j] X[j] + h_post[i] y, and its gradients but for X's, which pre's
// backward makes of that of X' (projection.cu). All sums in float32.

#include "math/mix.cuh"
#include "math/post.cuh"

constexpr int N = SIZE;
constexpr int kThreads = tuning_post_fwd::threads;
static_assert(kThreads == tuning_mix::threads);
constexpr int V = kThreadChannels<N>;

// Many bfloat16 streams are mixed on tensor cores.
constexpr bool kMixesByWarps = N >= 8 && kStreamParts<Stream> == 1;
constexpr int kWarpChannels = tuning_mix::channels;
static_assert(kWarpChannels == tuning_post_fwd::channels);
using Place = WarpItem<kThreads, kWarpChannels>;

// ---- forward ------------------------------------------------------------------------------------

// A thread has V channels of one token, in all streams.
template <bool ALIGNED>
__device__ inline void post_fwd(const Stream* x, const Stream* y, const float* h_post,
                                const float* h_res, Stream* x_new, int tokens, int slab,
                                int num_streams, int hidden) {
  const int n = EXACT ? N : num_streams;
  if constexpr (kMixesByWarps) {
    const Place item(tokens, slab, hidden);
    if (!item.exists) return;
    const long long token = item.token, row = token * n * hidden;
    const auto weights = [&] {
      return post_weights<N>(h_res + token * n * n, h_post + token * n, n);
    };
    return mix_channels<ALIGNED, N, kWarpChannels>(weights, x + row, y + token * hidden,
                                                   x_new + row, item.first, n, hidden, NoUse{});
  }
  const Item<V, kThreads> item(tokens, slab, hidden);
  if (ALIGNED && !item.exists) return;
  const long long token = item.token, row = token * n * hidden;
  post<ALIGNED, N, V>(x + row, y + token * hidden, h_post + token * n, h_res + token * n * n,
                      x_new + row, n, hidden, item.at, [](int, const Pack<Stream, V>&) {});
}

KERNEL(post_fwd, kThreads, 2)
(const Stream* x, const Stream* y, const float* h_post, const float* h_res, Stream* x_new,
 int tokens, int slab, int n, int hidden) {
  post_fwd<true>(x, y, h_post, h_res, x_new, tokens, slab, n, hidden);
}
#if !EXACT
KERNEL(post_fwd_unaligned, kThreads)
(const Stream* x, const Stream* y, const float* h_post, const float* h_res, Stream* x_new,
 int tokens, int slab, int n, int hidden) {
  post_fwd<false>(x, y, h_post, h_res, x_new, tokens, slab, n, hidden);
}
#endif

// ---- mix ----------------------------------------------------------------------------------------

// d_x[j] = sum over i of H_res[i, j] d_x_new[i], for pre's backward where `project_back` cannot do it. The two
// may lie in one place. Threads as in post_fwd.
template <bool ALIGNED>
__device__ inline void mix(const Stream* d_x_new, const float* h_res, Stream* d_x, int tokens,
                           int slab, int num_streams, int hidden) {
  const int n = EXACT ? N : num_streams;
  if constexpr (kMixesByWarps) {
    const Place item(tokens, slab, hidden);
    if (!item.exists) return;
    const long long row = item.token * n * hidden;
    const float* own_res = h_res + item.token * n * n;
    const auto weights = [&] {
      return MixingWeights<N>(
          [&](int j, int i) { return i < n && j < n ? own_res[i * n + j] : 0.f; },
          [](int) { return 0.f; });
    };
    return mix_channels<ALIGNED, N, kWarpChannels>(weights, d_x_new + row, nullptr, d_x + row,
                                                   item.first, n, hidden, NoUse{});
  }
  const Item<V, kThreads> item(tokens, slab, hidden);
  if (ALIGNED && !item.exists) return;
  const long long token = item.token;
  const int at = item.at;

  Pack<Stream, V> gs[N];
  load_rows<ALIGNED>(gs, d_x_new + token * n * hidden, n, hidden, at);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (j >= n) break;
    float sums[V];
    mix(gs, h_res + token * n * n, n, j, sums);
    Pack<Stream, V> result;
    result.set(sums);
    store_together<ALIGNED>(result, d_x + (token * n + j) * hidden, at, hidden);
  }
}

KERNEL(mix, kThreads, 2)
(const Stream* d_x_new, const float* h_res, Stream* d_x, int tokens, int slab, int n, int hidden) {
  mix<true>(d_x_new, h_res, d_x, tokens, slab, n, hidden);
}
#if !EXACT
KERNEL(mix_unaligned, kThreads)
(const Stream* d_x_new, const float* h_res, Stream* d_x, int tokens, int slab, int n, int hidden) {
  mix<false>(d_x_new, h_res, d_x, tokens, slab, n, hidden);
}
#endif

// ---- backward -----------------------------------------------------------------------------------

// A block has one token, and so many warps as its channels keep busy.
constexpr int kMaxBackwardThreads = tuning_post_bwd::threads;
constexpr int kMaxBackwardWarps = kMaxBackwardThreads / 32;

struct Backward {
  const Stream *x, *y;
  const float* h_post;
  const Stream* d_x_new;
  Stream* d_y;
  float *d_h_post, *d_h_res;
};

// For few streams: one pass, all sums in registers.
template <bool ALIGNED>
__device__ inline void post_bwd_one_pass(const Backward& b, int num_streams, int hidden) {
  constexpr int V = kTokenChannels<N>, kSums = N * N + N;
  __shared__ float shared[kSums][kMaxBackwardWarps];
  const int n = EXACT ? N : num_streams;
  const long long token = blockIdx.x;
  float h[N];
#pragma unroll
  for (int i = 0; i < N; ++i) h[i] = i < n ? b.h_post[token * n + i] : 0.f;

  float sums[kSums] = {};
  for (int at = threadIdx.x * V; at < hidden; at += blockDim.x * V) {
    // Streams that are not there are zero.
    Pack<Stream, V> xs[N], gs[N], ys;
#pragma unroll
    for (int i = 0; i < N; ++i)
      load<ALIGNED>(gs[i], b.d_x_new + (token * n + i) * hidden, at, i < n ? hidden : 0);
#pragma unroll
    for (int j = 0; j < N; ++j)
      load<ALIGNED>(xs[j], b.x + (token * n + j) * hidden, at, j < n ? hidden : 0);
    load<ALIGNED>(ys, b.y + token * hidden, at, hidden);

    float values[V] = {};
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i >= n) break;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        values[v] += h[i] * gs[i][v];
        sums[N * N + i] += gs[i][v] * ys[v];
      }
    }
    Pack<Stream, V> result;
    result.set(values);
    store<ALIGNED>(result, b.d_y + token * hidden, at, hidden);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i >= n) break;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (j >= n) break;
#pragma unroll
        for (int v = 0; v < V; ++v) sums[i * N + j] += gs[i][v] * xs[j][v];
      }
    }
  }
  reduce(sums, shared);
  __syncthreads();
  for (int c = threadIdx.x; c < kSums; c += blockDim.x) {
    const int i = c / N, j = c % N;
    if (i < N && i < n && j < n) b.d_h_res[(token * n + i) * n + j] = total(shared[c]);
    if (i == N && j < n) b.d_h_post[token * n + j] = total(shared[c]);
  }
}

// For many bfloat16 streams: a warp has some channels of all of them, and the sums are those of tensor cores, rounded
// every 64 channels.
template <bool ALIGNED>
__device__ inline void post_bwd_by_warps(const Backward& b, int n, int hidden) {
  constexpr int kUnit = 64, kSteps = kUnit / 32, kHalves = N / 8;
  // Columns are the streams of X and, behind them, y.
  __shared__ float shared[kMaxBackwardWarps][N][N + 2];
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const long long token = blockIdx.x;
  const auto row = [&](const Stream* streams, int i) {
    return streams + (token * n + i) * (long long)hidden;
  };
  float h[kHalves];
#pragma unroll
  for (int r = 0; r < kHalves; ++r) h[r] = g + 8 * r < n ? b.h_post[token * n + g + 8 * r] : 0.f;

  float sums[kHalves + 1][4] = {};
  for (int unit = warp * kUnit; unit < hidden; unit += warps * kUnit) {
    // Of the streams g and g + 8; y is column g = 0 of B.
    Pack<Stream, 8> gs[kSteps][kHalves], xs[kSteps][kHalves + 1];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int at = unit + 32 * s + 8 * q;
#pragma unroll
      for (int r = 0; r < kHalves; ++r) {
        const int i = g + 8 * r, end = i < n ? hidden : 0;
        load<ALIGNED>(gs[s][r], row(b.d_x_new, i), at, end);
        load<ALIGNED>(xs[s][r], row(b.x, i), at, end);
      }
      load<ALIGNED>(xs[s][kHalves], b.y + token * hidden, at, g == 0 ? hidden : 0);
    }
    float products[kHalves + 1][4] = {};
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const u32(&low)[4] = gs[s][0].words, (&high)[4] = gs[s][kHalves - 1].words;
#pragma unroll
      for (int w = 0; w < 4; w += 2) {
#pragma unroll
        for (int c = 0; c <= kHalves; ++c) {
          // With up to 8 streams nobody wants the rows from 8 on.
          mma(products[c], low[w], high[w], low[w + 1], high[w + 1],
              {xs[s][c].words[w], xs[s][c].words[w + 1]});
        }
      }
      // d_y: of 8 channels a lane keeps the one of its g.
      float values[8];
#pragma unroll
      for (int v = 0; v < 8; ++v) {
        values[v] = h[0] * gs[s][0][v];
        if constexpr (kHalves > 1) values[v] += h[1] * gs[s][1][v];
      }
#pragma unroll
      for (int half = 4; half > 0; half /= 2) {
        const bool upper = g & half;
#pragma unroll
        for (int v = 0; v < half; ++v) {
          const float keep = upper ? values[v + half] : values[v];
          const float give = upper ? values[v] : values[v + half];
          values[v] = keep + __shfl_xor_sync(kAllLanes, give, 4 * half);
        }
      }
      const int channel = unit + 32 * s + 8 * q + g;
      if (channel < hidden) {
        b.d_y[token * hidden + channel] = Stream{u16(pair_of((Stream*)nullptr, values[0], 0.f))};
      }
    }
#pragma unroll
    for (int c = 0; c <= kHalves; ++c) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[c][e] += products[c][e];
    }
  }
#pragma unroll
  for (int c = 0; c <= kHalves; ++c) {
#pragma unroll
    for (int e = 0; e < 2 * kHalves; ++e) {
      const int column = 8 * c + 2 * q + e % 2;
      if (column < N + 2) shared[warp][g + e / 2 * 8][column] = sums[c][e];
    }
  }
  __syncthreads();
  for (int at = threadIdx.x; at < n * (n + 1); at += blockDim.x) {
    const int i = at / (n + 1), j = at % (n + 1);
    float sum = 0.f;
    for (int w = 0; w < warps; ++w) sum += shared[w][i][j < n ? j : N];
    if (j < n) {
      b.d_h_res[(token * n + i) * n + j] = sum;
    } else {
      b.d_h_post[token * n + i] = sum;
    }
  }
}

// For many streams: first the sums, some rows of H_res at a time, then d_y.
template <bool ALIGNED>
__device__ inline void post_bwd_by_rows(const Backward& b, int n, int hidden) {
  constexpr int V = kTokenChannels<N>, kRows = 4, kSums = kRows * (N + 1);
  __shared__ float shared[kSums][kMaxBackwardWarps];
  const long long token = blockIdx.x;
  const auto row = [&](const Stream* streams, int i) { return streams + (token * n + i) * hidden; };

  for (int first = 0; first < n; first += kRows) {
    float sums[kSums] = {};
    for (int at = threadIdx.x * V; at < hidden; at += blockDim.x * V) {
      Pack<Stream, V> gs[kRows], other;
#pragma unroll
      for (int i = 0; i < kRows; ++i)
        load<ALIGNED>(gs[i], row(b.d_x_new, first + i), at, first + i < n ? hidden : 0);
#pragma unroll
      for (int j = 0; j <= N; ++j) {
        if (j < N && j >= n) continue;
        load<ALIGNED>(other, j < N ? row(b.x, j) : b.y + token * hidden, at, hidden);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int v = 0; v < V; ++v) sums[i * (N + 1) + j] += gs[i][v] * other[v];
        }
      }
    }
    __syncthreads();
    reduce(sums, shared);
    __syncthreads();
    for (int c = threadIdx.x; c < kSums; c += blockDim.x) {
      const int i = first + c / (N + 1), j = c % (N + 1);
      if (i < n && j < n) b.d_h_res[(token * n + i) * n + j] = total(shared[c]);
      if (i < n && j == N) b.d_h_post[token * n + i] = total(shared[c]);
    }
  }

  for (int at = threadIdx.x * V; at < hidden; at += blockDim.x * V) {
    float d_y[V] = {};
    for (int i = 0; i < n; ++i) {
      Pack<Stream, V> g;
      load<ALIGNED>(g, row(b.d_x_new, i), at, hidden);
      const float h = b.h_post[token * n + i];
#pragma unroll
      for (int v = 0; v < V; ++v) d_y[v] += h * g[v];
    }
    Pack<Stream, V> result;
    result.set(d_y);
    store<ALIGNED>(result, b.d_y + token * hidden, at, hidden);
  }
}

template <bool ALIGNED>
__device__ inline void post_bwd(const Backward& b, int n, int hidden) {
  // With all 8 streams sums in registers are faster: 161 beside 175 us at 8192 tokens of 2048 channels.
  if constexpr (kMixesByWarps && !(EXACT && N == 8)) {
    post_bwd_by_warps<ALIGNED>(b, n, hidden);
  } else if constexpr (N <= 8) {
    post_bwd_one_pass<ALIGNED>(b, n, hidden);
  } else {
    post_bwd_by_rows<ALIGNED>(b, n, hidden);
  }
}

KERNEL(post_bwd, kMaxBackwardThreads)
(const Stream* x, const Stream* y, const float* h_post, const Stream* d_x_new, Stream* d_y,
 float* d_h_post, float* d_h_res, int n, int hidden) {
  post_bwd<true>({x, y, h_post, d_x_new, d_y, d_h_post, d_h_res}, n, hidden);
}
#if !EXACT
KERNEL(post_bwd_unaligned, kMaxBackwardThreads)
(const Stream* x, const Stream* y, const float* h_post, const Stream* d_x_new, Stream* d_y,
 float* d_h_post, float* d_h_res, int n, int hidden) {
  post_bwd<false>({x, y, h_post, d_x_new, d_y, d_h_post, d_h_res}, n, hidden);
}
#endif
