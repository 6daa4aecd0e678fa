// The RMSNorm of the layer's input, around the launches of pre and of post_pre:
//
//   norm_fwd        u and rho of the normalised input, from X and h_pre
//   norm_bwd        from the cotangent g of that to du, the cotangent of u before the norm, and sums over a
//                   block's tokens for the gradient of w
//   norm_bwd_once   the same where a block has a thread for each kPart channels of a token: X is read once
//   sum_norm_scale  that gradient, from these sums
//
//   v = w g      du = rho v - (rho^3 <v, u> / C) u      dw = sum over tokens of g rho u
//
// du is rounded on its way to pre's launches. It is nearly at right angles to X, so that its rounding error e would be
// much of <du, X[i]>: norm_bwd adds <e, X[i]> to d_h_pre[i], to which those add <du, X[i]>.
//
// u is summed up again from X and so is never rounded in between. A block has one token at a time; a
// thread the same channels of each.

#include "math/coefficients.cuh"
#include "math/collapse.cuh"

constexpr int N = SIZE;
constexpr int kThreads = tuning_norm_fwd::threads;
static_assert(kThreads == tuning_sum_norm_scale::threads);
constexpr int kWarps = kThreads / 32;
// Channels that a thread takes at once.
constexpr int V = N <= 4 ? 8 : 4;

// The same sum in all threads. `sums` is one of two that are used in turn.
__device__ inline float block_sum(float v, float (&sums)[kWarps]) {
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
  __syncthreads();
  float sum = 0.f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += sums[warp];
  return sum;
}

__device__ inline float at_or_zero(const float* values, int at, int hidden) {
  return at < hidden ? values[at] : 0.f;
}

template <bool ALIGNED>
__device__ inline void forward(const Stream* row, const float (&h)[N], const float* norm_scale,
                               Stream* u, float* rho, float eps, int n, int hidden,
                               float (&sums)[kWarps]) {
  float squares = 0.f;
  for (int at = threadIdx.x * V; at < hidden; at += kThreads * V) {
    float values[V];
    collapse<ALIGNED>(row, h, n, hidden, at, values);
#pragma unroll
    for (int v = 0; v < V; ++v) squares += values[v] * values[v];
  }
  const float mean = block_sum(squares, sums) / hidden;
  const float r = reciprocal(square_root(mean + eps));
  if (threadIdx.x == 0) *rho = r;
  for (int at = threadIdx.x * V; at < hidden; at += kThreads * V) {
    float values[V];
    collapse<ALIGNED>(row, h, n, hidden, at, values);
#pragma unroll
    for (int v = 0; v < V; ++v) values[v] *= r * at_or_zero(norm_scale, at + v, hidden);
    Pack<Stream, V> pack;
    pack.set(values);
    store<ALIGNED>(pack, u, at, hidden);
  }
}

KERNEL(norm_fwd, kThreads)
(const Stream* x, const float* h_pre, const float* norm_scale, Stream* u, float* rho, float eps_in,
 int tokens, int hidden, int streams) {
  __shared__ float sums[2][kWarps];
  const int n = EXACT ? N : streams;
  for (long long token = blockIdx.x, turn = 0; token < tokens; token += gridDim.x, ++turn) {
    float h[N];
#pragma unroll
    for (int i = 0; i < N; ++i) h[i] = i < n ? h_pre[token * n + i] : 0.f;
    const Stream* row = x + token * n * hidden;
    if (EXACT || aligned(hidden)) {
      forward<true>(row, h, norm_scale, u + token * hidden, rho + token, eps_in, n, hidden,
                    sums[turn % 2]);
    } else {
      forward<false>(row, h, norm_scale, u + token * hidden, rho + token, eps_in, n, hidden,
                     sums[turn % 2]);
    }
  }
}

#ifdef HAS_norm_bwd_once
// Channels of a thread: at most 16 registers in all streams.
constexpr int kPart = tuning_norm_bwd_once::bytes / sizeof(Stream);
constexpr int kMaxThreads = tuning_norm_bwd_once::threads;

// d_w: [blocks, hidden]. Every block has a token; hidden is a multiple of kPart.
KERNEL(norm_bwd_once, kMaxThreads)
(const Stream* x, const float* alpha, const float* bias, const float* m, const float* norm_scale,
 const float* rho, const Stream* d_u, const float* d_h_pre_in, Stream* d_sum, float* d_w,
 float* d_h_pre, int tokens, int hidden, int columns, Layout, Settings settings) {
  // Of one token and of the next.
  __shared__ float dots[2][kMaxThreads / 32], errors[2][kMaxThreads / 32][N];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int at = threadIdx.x * kPart;
  const bool has_channels = at < hidden;
  const float over_hidden = reciprocal(hidden);
  float own_d_w[kPart] = {};
  // From the errors of a token whose warps have all come here.
  const auto add_errors = [&](long long token, int turn) {
    if (threadIdx.x >= N) return;
    float sum = d_h_pre_in[token * N + threadIdx.x];
    for (int other = 0; other < warps; ++other) sum += errors[turn][other][threadIdx.x];
    d_h_pre[token * N + threadIdx.x] = sum;
  };

  // Of stream lane % N; its m is on its way a token ahead.
  float own_m = 0.f;
  const auto load_m = [&](long long token) {
    if (columns > 0 && token < tokens) own_m = m[token * columns + lane % N];
  };
  const auto h_pre = [&] {
    const float z = columns > 0 ? alpha[0] * own_m : 0.f;
    return sigmoid(z + bias[lane % N]) + settings.pre_eps;
  };
  load_m(blockIdx.x);

  int turn = 0;
#pragma unroll 1
  for (long long token = blockIdx.x; token < tokens; token += gridDim.x, turn ^= 1) {
    const float own_h = h_pre();
    Pack<Stream, kPart> xs[N], g;
    const Stream* row = x + token * N * hidden;
#pragma unroll
    for (int i = 0; i < N; ++i) load<true>(xs[i], row + i * hidden, at, hidden);
    load<true>(g, d_u + token * hidden, at, hidden);
    load_m(token + gridDim.x);
    const float r = rho[token];
    float u[kPart] = {};
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float h = __shfl_sync(kAllLanes, own_h, i);
#pragma unroll
      for (int v = 0; v < kPart; ++v) u[v] += h * xs[i][v];
    }
    Pack<float, kPart> w;
    load<true>(w, norm_scale, at, hidden);
    float dot = 0.f;
#pragma unroll
    for (int v = 0; v < kPart; ++v) {
      dot += w[v] * g[v] * u[v];
      own_d_w[v] += g[v] * (r * u[v]);
    }
    dot = warp_sum(dot);
    if (lane == 0) dots[turn][warp] = dot;
    __syncthreads();
    if (token >= gridDim.x) add_errors(token - gridDim.x, turn ^ 1);
    float sum = 0.f;
    for (int other = 0; other < warps; ++other) sum += dots[turn][other];
    const float factor = r * r * r * (sum * over_hidden);
    load<true>(w, norm_scale, at, hidden);
#pragma unroll
    for (int v = 0; v < kPart; ++v) u[v] = r * w[v] * g[v] - factor * u[v];
    g.set(u);
    store<true>(g, d_sum + token * hidden, at, hidden);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      // Or else the compiler would keep X in float32, too, for which some chips' code has no registers.
#pragma unroll
      for (u32& word : xs[i].words) keep(word);
      float error = 0.f;
#pragma unroll
      for (int v = 0; v < kPart; ++v) error += (u[v] - g[v]) * xs[i][v];
      error = warp_sum(error);
      if (lane == 0) errors[turn][warp][i] = error;
    }
  }
  __syncthreads();
  const long long last = (tokens - 1 - blockIdx.x) / gridDim.x * (long long)gridDim.x + blockIdx.x;
  add_errors(last, turn ^ 1);
#pragma unroll
  for (int v = 0; v < kPart; ++v) {
    if (has_channels) d_w[(long long)blockIdx.x * hidden + at + v] = own_d_w[v];
  }
}

#else
// d_w: this block's sums, which a thread alone reads and writes; `first`: they hold nothing yet. errors: <e, X[i]>, for
// the threads of this warp.
template <bool ALIGNED>
__device__ inline void backward(const Stream* row, const float (&h)[N], const float* norm_scale,
                                float rho, const Stream* d_u, Stream* d_sum, float* d_w, bool first,
                                int n, int hidden, float (&sums)[kWarps], float (&errors)[N]) {
  float dot = 0.f;
  for (int at = threadIdx.x * V; at < hidden; at += kThreads * V) {
    float u[V];
    collapse<ALIGNED>(row, h, n, hidden, at, u);
    Pack<Stream, V> g;
    load<ALIGNED>(g, d_u, at, hidden);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (at + v >= hidden) break;
      dot += norm_scale[at + v] * g[v] * u[v];
      d_w[at + v] = (first ? 0.f : d_w[at + v]) + g[v] * (rho * u[v]);
    }
  }
  const float factor = rho * rho * rho * (block_sum(dot, sums) / hidden);
#pragma unroll
  for (int i = 0; i < N; ++i) errors[i] = 0.f;
  for (int at = threadIdx.x * V; at < hidden; at += kThreads * V) {
    float u[V];
    Pack<Stream, V> pack[N];
    collapse<ALIGNED>(row, h, n, hidden, at, pack, u);
    Pack<Stream, V> g;
    load<ALIGNED>(g, d_u, at, hidden);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      u[v] = rho * at_or_zero(norm_scale, at + v, hidden) * g[v] - factor * u[v];
    }
    g.set(u);
    store<ALIGNED>(g, d_sum, at, hidden);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i >= n) break;
#pragma unroll
      for (int v = 0; v < V; ++v) errors[i] += (u[v] - g[v]) * pack[i][v];
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < n) errors[i] = warp_sum(errors[i]);
  }
}

// d_w: [blocks, hidden]. Every block has a token.
KERNEL(norm_bwd, kThreads, N <= 4 ? 2 : 1)
(const Stream* x, const float* alpha, const float* bias, const float* m, const float* norm_scale,
 const float* rho, const Stream* d_u, const float* d_h_pre_in, Stream* d_sum, float* d_w,
 float* d_h_pre, int tokens, int hidden, int columns, Layout layout, Settings settings) {
  __shared__ float sums[2][kWarps], errors[2][kWarps][N];
  const int n = layout.n;
  for (long long token = blockIdx.x, turn = 0; token < tokens; token += gridDim.x, ++turn) {
    float h[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float z = i >= n        ? 0.f
                      : columns > 0 ? alpha[0] * m[token * columns + i] + bias[i]
                                    : bias[i];
      h[i] = i < n ? sigmoid(z) + settings.pre_eps : 0.f;
    }
    const Stream* row = x + token * n * hidden;
    const long long at = token * hidden;
    float* own = d_w + (long long)blockIdx.x * hidden;
    float own_errors[N];
    if (aligned(hidden)) {
      backward<true>(row, h, norm_scale, rho[token], d_u + at, d_sum + at, own, turn == 0, n,
                     hidden, sums[turn % 2], own_errors);
    } else {
      backward<false>(row, h, norm_scale, rho[token], d_u + at, d_sum + at, own, turn == 0, n,
                      hidden, sums[turn % 2], own_errors);
    }
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) errors[turn % 2][threadIdx.x / 32][i] = own_errors[i];
    }
    __syncthreads();
    if (threadIdx.x < n) {
      float sum = d_h_pre_in[token * n + threadIdx.x];
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) sum += errors[turn % 2][warp][threadIdx.x];
      d_h_pre[token * n + threadIdx.x] = sum;
    }
  }
}

#endif

// Channels of a block, a lane each; its warps share the rows of d_w, which have `row` numbers each.
constexpr int kSumChannels = tuning_sum_norm_scale::channels;

KERNEL(sum_norm_scale, kThreads)
(const float* d_w, float* d_norm_scale, int blocks, int hidden, int row) {
  __shared__ float sums[kWarps][kSumChannels];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, at = blockIdx.x * kSumChannels + lane;
  float sum = 0.f;
  if (at < hidden) {
#pragma unroll 8
    for (int block = warp; block < blocks; block += kWarps) sum += d_w[(long long)block * row + at];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || at >= hidden) return;
#pragma unroll
  for (int w = 1; w < kWarps; ++w) sum += sums[w][lane];
  d_norm_scale[at] = sum;
}
