// post: X'[i] = sum over j of H_res[i, j] X[j] + h_post[i] y, and its gradients but for X's, which pre's
// backward makes of that of X' (projection.cu). All sums in float32.

#include "base/common.cuh"

constexpr int N = SIZE;
constexpr int kThreads = tuning_post_fwd::threads;
static_assert(kThreads == tuning_mix::threads);
// Channels that a thread takes at once: 16 bytes, less where there are many streams.
constexpr int V = (N <= 4 ? 16 : 8) / int(sizeof(Stream));

// ---- forward ------------------------------------------------------------------------------------

// A thread has V channels of one token, in all streams. Grid: threads of a slab of tokens, slabs; within
// a slab 32 bits can count.
template <bool ALIGNED>
__device__ inline void post_fwd(const Stream* x, const Stream* y, const float* h_post,
                                const float* h_res, Stream* x_new, int tokens, int slab,
                                int num_streams, int hidden) {
  const int n = EXACT ? N : num_streams;
  const u32 items = (hidden + V - 1) / V;
  const u32 item = blockIdx.x * kThreads + threadIdx.x;
  const int token_of_slab = item / items;
  const long long token = (long long)blockIdx.y * slab + token_of_slab;
  const int at = item % items * V;
  if (token_of_slab >= slab || token >= tokens) return;

  Pack<Stream, V> xs[N], ys;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (j < n) load<ALIGNED>(xs[j], x + (token * n + j) * hidden, at, hidden);
  }
  load<ALIGNED>(ys, y + token * hidden, at, hidden);
  h_post += token * n;
  h_res += token * n * n;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i >= n) break;
    float sums[V];
#pragma unroll
    for (int v = 0; v < V; ++v) sums[v] = h_post[i] * ys[v];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (j >= n) break;
#pragma unroll
      for (int v = 0; v < V; ++v) sums[v] += h_res[i * n + j] * xs[j][v];
    }
    Pack<Stream, V> result;
    result.set(sums);
    store<ALIGNED>(result, x_new + (token * n + i) * hidden, at, hidden);
  }
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
  const u32 items = (hidden + V - 1) / V;
  const u32 item = blockIdx.x * kThreads + threadIdx.x;
  const int token_of_slab = item / items;
  const long long token = (long long)blockIdx.y * slab + token_of_slab;
  const int at = item % items * V;
  if (token_of_slab >= slab || token >= tokens) return;

  Pack<Stream, V> gs[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < n) load<ALIGNED>(gs[i], d_x_new + (token * n + i) * hidden, at, hidden);
  }
  h_res += token * n * n;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (j >= n) break;
    float sums[V] = {};
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i >= n) break;
#pragma unroll
      for (int v = 0; v < V; ++v) sums[v] += h_res[i * n + j] * gs[i][v];
    }
    Pack<Stream, V> result;
    result.set(sums);
    store<ALIGNED>(result, d_x + (token * n + j) * hidden, at, hidden);
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

// A block has one token.
constexpr int kBackwardThreads = tuning_post_bwd::threads;
constexpr int kBackwardWarps = kBackwardThreads / 32;

struct Backward {
  const Stream *x, *y;
  const float* h_post;
  const Stream* d_x_new;
  Stream* d_y;
  float *d_h_post, *d_h_res;
};

// d_h_res[i, j] = <G[i], X[j]> and d_h_post[i] = <G[i], y>: the sums of each warp, in the
// order h_res, h_post.
template <int COUNT>
__device__ inline void reduce(const float (&sums)[COUNT], float (*shared)[kBackwardWarps]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int first = 0; first < COUNT; first += 32) {
    float values[32];
#pragma unroll
    for (int v = 0; v < 32; ++v) values[v] = first + v < COUNT ? sums[first + v] : 0.f;
    const float sum = warp_sums(values, lane);
    if (first + lane < COUNT) shared[first + lane][warp] = sum;
  }
}

__device__ inline float total(const float (&warps)[kBackwardWarps]) {
  float sum = 0.f;
#pragma unroll
  for (int w = 0; w < kBackwardWarps; ++w) sum += warps[w];
  return sum;
}

// For few streams: one pass, all sums in registers.
template <bool ALIGNED>
__device__ inline void post_bwd_one_pass(const Backward& b, int hidden) {
  constexpr int n = N;
  __shared__ float shared[n * n + n][kBackwardWarps];
  const long long token = blockIdx.x;
  float h[n];
#pragma unroll
  for (int i = 0; i < n; ++i) h[i] = b.h_post[token * n + i];

  float sums[n * n + n] = {};
  for (int at = threadIdx.x * V; at < hidden; at += kBackwardThreads * V) {
    Pack<Stream, V> xs[n], gs[n], ys;
#pragma unroll
    for (int i = 0; i < n; ++i)
      load<ALIGNED>(gs[i], b.d_x_new + (token * n + i) * hidden, at, hidden);
#pragma unroll
    for (int j = 0; j < n; ++j) load<ALIGNED>(xs[j], b.x + (token * n + j) * hidden, at, hidden);
    load<ALIGNED>(ys, b.y + token * hidden, at, hidden);

    float values[V] = {};
#pragma unroll
    for (int i = 0; i < n; ++i) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        values[v] += h[i] * gs[i][v];
        sums[n * n + i] += gs[i][v] * ys[v];
      }
    }
    Pack<Stream, V> result;
    result.set(values);
    store<ALIGNED>(result, b.d_y + token * hidden, at, hidden);
#pragma unroll
    for (int i = 0; i < n; ++i) {
#pragma unroll
      for (int j = 0; j < n; ++j) {
#pragma unroll
        for (int v = 0; v < V; ++v) sums[i * n + j] += gs[i][v] * xs[j][v];
      }
    }
  }
  reduce(sums, shared);
  __syncthreads();
  for (int c = threadIdx.x; c < n * n + n; c += kBackwardThreads) {
    float* out = c < n * n ? b.d_h_res + token * n * n + c : b.d_h_post + token * n + c - n * n;
    *out = total(shared[c]);
  }
}

// For any number of streams: first the sums, a row of H_res at a time, then d_y.
template <bool ALIGNED>
__device__ inline void post_bwd_by_rows(const Backward& b, int n, int hidden) {
  constexpr int kChannels = 2;
  __shared__ float shared[N + 1][kBackwardWarps];
  const long long token = blockIdx.x;
  const auto row = [&](const Stream* streams, int i) { return streams + (token * n + i) * hidden; };

  for (int i = 0; i < n; ++i) {
    float sums[N + 1] = {};
    for (int at = threadIdx.x * kChannels; at < hidden; at += kBackwardThreads * kChannels) {
      Pack<Stream, kChannels> g, other;
      load<ALIGNED>(g, row(b.d_x_new, i), at, hidden);
#pragma unroll
      for (int j = 0; j <= N; ++j) {
        if (j < N && j >= n) continue;
        load<ALIGNED>(other, j < N ? row(b.x, j) : b.y + token * hidden, at, hidden);
#pragma unroll
        for (int v = 0; v < kChannels; ++v) sums[j] += g[v] * other[v];
      }
    }
    __syncthreads();
    reduce(sums, shared);
    __syncthreads();
    for (int j = threadIdx.x; j <= N; j += kBackwardThreads) {
      if (j < n) b.d_h_res[(token * n + i) * n + j] = total(shared[j]);
      if (j == N) b.d_h_post[token * n + i] = total(shared[j]);
    }
  }

  for (int at = threadIdx.x * kChannels; at < hidden; at += kBackwardThreads * kChannels) {
    float d_y[kChannels] = {};
    for (int i = 0; i < n; ++i) {
      Pack<Stream, kChannels> g;
      load<ALIGNED>(g, row(b.d_x_new, i), at, hidden);
      const float h = b.h_post[token * n + i];
#pragma unroll
      for (int v = 0; v < kChannels; ++v) d_y[v] += h * g[v];
    }
    Pack<Stream, kChannels> result;
    result.set(d_y);
    store<ALIGNED>(result, b.d_y + token * hidden, at, hidden);
  }
}

template <bool ALIGNED>
__device__ inline void post_bwd(const Backward& b, int n, int hidden) {
  if constexpr (EXACT) {
    post_bwd_one_pass<ALIGNED>(b, hidden);
  } else {
    post_bwd_by_rows<ALIGNED>(b, n, hidden);
  }
}

KERNEL(post_bwd, kBackwardThreads)
(const Stream* x, const Stream* y, const float* h_post, const Stream* d_x_new, Stream* d_y,
 float* d_h_post, float* d_h_res, int n, int hidden) {
  post_bwd<true>({x, y, h_post, d_x_new, d_y, d_h_post, d_h_res}, n, hidden);
}
#if !EXACT
KERNEL(post_bwd_unaligned, kBackwardThreads)
(const Stream* x, const Stream* y, const float* h_post, const Stream* d_x_new, Stream* d_y,
 float* d_h_post, float* d_h_res, int n, int hidden) {
  post_bwd<false>({x, y, h_post, d_x_new, d_y, d_h_post, d_h_res}, n, hidden);
}
#endif
