// collapse: u = sum over i of h_pre[i] X[i], and d_h_pre[i] = <d_u, X[i]>. All sums in float32.

#include "math/collapse.cuh"
#include "math/post.cuh"

constexpr int N = SIZE;
constexpr int kThreads = tuning_collapse_fwd::threads;

// ---- forward ------------------------------------------------------------------------------------

// Threads as in post_fwd (post.cu): V channels of one token, in all streams.
template <bool ALIGNED>
__device__ inline void collapse_fwd(const Stream* x, const float* h_pre, Stream* u, int tokens,
                                    int slab, int num_streams, int hidden) {
  const int n = EXACT ? N : num_streams;
  constexpr int V = kThreadChannels<N>;
  const Item<V, kThreads> item(tokens, slab, hidden);
  if (!item.exists) return;
  const long long token = item.token;
  const int at = item.at;

  float h[N], sums[V];
#pragma unroll
  for (int i = 0; i < N; ++i) h[i] = i < n ? h_pre[token * n + i] : 0.f;
  collapse<ALIGNED>(x + token * n * hidden, h, n, hidden, at, sums);
  Pack<Stream, V> result;
  result.set(sums);
  store<ALIGNED>(result, u + token * hidden, at, hidden);
}

KERNEL(collapse_fwd, kThreads, 2)
(const Stream* x, const float* h_pre, Stream* u, int tokens, int slab, int n, int hidden) {
  collapse_fwd<true>(x, h_pre, u, tokens, slab, n, hidden);
}
#if !EXACT
KERNEL(collapse_fwd_unaligned, kThreads)
(const Stream* x, const float* h_pre, Stream* u, int tokens, int slab, int n, int hidden) {
  collapse_fwd<false>(x, h_pre, u, tokens, slab, n, hidden);
}
#endif

// ---- backward -----------------------------------------------------------------------------------

// A block has one token, and so many warps as its channels keep busy: their number, and with it the
// order of the sums, depends on n, C and the dtype alone.
constexpr int kMaxBackwardThreads = tuning_collapse_bwd::threads;
constexpr int kMaxBackwardWarps = kMaxBackwardThreads / 32;

template <bool ALIGNED>
__device__ inline void collapse_bwd(const Stream* x, const Stream* d_u, float* d_h_pre,
                                    int num_streams, int hidden) {
  __shared__ float shared[N][kMaxBackwardWarps];
  const int n = EXACT ? N : num_streams;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_threads = blockDim.x;
  const long long token = blockIdx.x;
  float dots[N] = {};
  constexpr int V = kTokenChannels<N>;
  for (int at = threadIdx.x * V; at < hidden; at += num_threads * V) {
    add_dots<ALIGNED, V>(x + token * n * hidden, d_u + token * hidden, n, hidden, at, dots);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i >= n) break;
    const float dot = warp_sum(dots[i]);
    if (lane == 0) shared[i][warp] = dot;
  }
  __syncthreads();
  const int i = threadIdx.x;
  if (i >= n) return;
  float sum = 0.f;
  for (int w = 0; w < num_threads / 32; ++w) sum += shared[i][w];
  d_h_pre[token * n + i] = sum;
}

KERNEL(collapse_bwd, kMaxBackwardThreads)
(const Stream* x, const Stream* d_u, float* d_h_pre, int n, int hidden) {
  collapse_bwd<true>(x, d_u, d_h_pre, n, hidden);
}
#if !EXACT
KERNEL(collapse_bwd_unaligned, kMaxBackwardThreads)
(const Stream* x, const Stream* d_u, float* d_h_pre, int n, int hidden) {
  collapse_bwd<false>(x, d_u, d_h_pre, n, hidden);
}
#endif
