// pre and post_pre with static coefficients, those that the bias makes alone, the same for all tokens. No sum over
// the channels has to be known before the streams are combined, so that a block can read them once and write what it
// makes of them. two_pass/pre.cu makes coefficients of the bias, and its gradient of sums over tokens.
//
//   post_pre_static_fwd  X' and u, and the coefficients again for each token
//   pre_static_bwd       d_X, and <d_u, X[i]>, the part of d_h_pre[i] that comes from u
//   post_pre_static_bwd  d_X', d_y, d_h_post and d_H_res, and <d_u, X'[i]>
//   sum_static           the cotangents of the coefficients, summed over a block's tokens
//
// Where the weights of the streams in u are given they are in h_given, which is null otherwise, and not those of the
// bias.
//
// All sums in float32.

#include "math/coefficients.cuh"
#include "math/post.cuh"

constexpr int N = SIZE;

// ---- forward ------------------------------------------------------------------------------------

constexpr int kForwardThreads = tuning_post_pre_static_fwd::threads;

struct Forward {
  const Stream *x, *y;
  // Of post.
  const float *h_post, *h_res;
  // Of pre, as every token has them.
  const float *same_h_pre, *same_h_post, *same_h_res;
  Stream *x_new, *u;
  float *new_h_pre, *new_h_post, *new_h_res, *r;
  const float* h_given;
};

// A thread has V channels of one token, in all streams.
template <bool ALIGNED>
__device__ inline void post_pre_static_fwd(const Forward& f, int tokens, int slab, int num_streams,
                                           int hidden) {
  const int n = EXACT ? N : num_streams;
  constexpr int V = kThreadChannels<N>;
  const Item<V, kForwardThreads> item(tokens, slab, hidden);
  if (ALIGNED && !item.exists) return;
  const long long token = item.token, row = token * n * hidden;
  const float* weights = f.h_given ? f.h_given + token * n : f.same_h_pre;
  float sums[V] = {};
  post<ALIGNED, N, V>(f.x + row, f.y + token * hidden, f.h_post + token * n,
                      f.h_res + token * n * n, f.x_new + row, n, hidden, item.at,
                      [&](int i, const Pack<Stream, V>& x_new) {
                        const float h = weights[i];
#pragma unroll
                        for (int v = 0; v < V; ++v) sums[v] += h * x_new[v];
                      });
  Pack<Stream, V> u;
  u.set(sums);
  store_together<ALIGNED>(u, f.u + token * hidden, item.at, hidden);
  if (!item.exists) return;

  // The threads of a token share its coefficients.
  for (int c = item.at / V; c < n * n; c += (hidden + V - 1) / V) {
    f.new_h_res[token * n * n + c] = f.same_h_res[c];
    if (c >= n) continue;
    f.new_h_pre[token * n + c] = f.same_h_pre[c];
    f.new_h_post[token * n + c] = f.same_h_post[c];
    if (c == 0) f.r[token] = 0.f;
  }
}

KERNEL(post_pre_static_fwd, kForwardThreads, N > 8 ? 1 : N > 4 ? 3 : 5)
(const Stream* x, const Stream* y, const float* h_post, const float* h_res, const float* same_h_pre,
 const float* same_h_post, const float* same_h_res, Stream* x_new, Stream* u, float* new_h_pre,
 float* new_h_post, float* new_h_res, float* r, const float* h_given, int tokens, int slab, int n,
 int hidden) {
  const Forward forward{x,     y, h_post,    h_res,      same_h_pre, same_h_post, same_h_res,
                        x_new, u, new_h_pre, new_h_post, new_h_res,  r,           h_given};
  if (EXACT || aligned(hidden)) {
    post_pre_static_fwd<true>(forward, tokens, slab, n, hidden);
  } else {
    post_pre_static_fwd<false>(forward, tokens, slab, n, hidden);
  }
}

// ---- backward -----------------------------------------------------------------------------------

// A block has one token, and so many warps as its channels keep busy.
constexpr int kMaxBackwardThreads = tuning_pre_static_bwd::threads;
constexpr int kMaxBackwardWarps = kMaxBackwardThreads / 32;

// Weight of stream i in u: the same for every token, unless it is given for each.
__device__ inline float weight_of(const float* bias, const Settings& settings, const float* h_given,
                                  int i) {
  return h_given ? h_given[i] : sigmoid(bias[i]) + settings.pre_eps;
}

// d_X[j] = (H_res^T d_x_in)[j] + h_pre[j] d_u, or d_x_in[j] + h_pre[j] d_u where h_res is null. d_x may lie where d_x_in
// lies. dots: [tokens, n].
template <bool ALIGNED>
__device__ inline void pre_static_bwd(const Stream* x, const float* bias, const Stream* d_u,
                                      const Stream* d_x_in, const float* h_res, Stream* d_x,
                                      float* dots, const float* h_given, int num_streams,
                                      int hidden, const Settings& settings) {
  constexpr int V = kTokenChannels<N>;
  __shared__ float shared[N][kMaxBackwardWarps];
  const int n = EXACT ? N : num_streams;
  const long long token = blockIdx.x, row = token * n * hidden;
  if (h_given) h_given += token * n;
  float h_pre[N], sums[N] = {};
#pragma unroll
  for (int i = 0; i < N; ++i) h_pre[i] = i < n ? weight_of(bias, settings, h_given, i) : 0.f;
  if (h_res) h_res += token * n * n;

  for (int at = threadIdx.x * V; at < hidden; at += blockDim.x * V) {
    Pack<Stream, V> gs[N], xs[N], us;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (j < n) load<ALIGNED>(gs[j], d_x_in + row + (long long)j * hidden, at, hidden);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (j < n) load<ALIGNED>(xs[j], x + row + (long long)j * hidden, at, hidden);
    }
    load<ALIGNED>(us, d_u + token * hidden, at, hidden);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (j >= n) break;
      float values[V];
      if (h_res) {
        mix(gs, h_res, n, j, values);
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v) values[v] = gs[j][v];
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        values[v] += h_pre[j] * us[v];
        sums[j] += us[v] * xs[j][v];
      }
      Pack<Stream, V> result;
      result.set(values);
      store<ALIGNED>(result, d_x + row + (long long)j * hidden, at, hidden);
    }
  }
  reduce(sums, shared);
  __syncthreads();
  if (threadIdx.x < n) dots[token * n + threadIdx.x] = total(shared[threadIdx.x]);
}

KERNEL(pre_static_bwd, kMaxBackwardThreads)
(const Stream* x, const float* bias, const Stream* d_u, const Stream* d_x_in, const float* h_res,
 Stream* d_x, float* dots, const float* h_given, int n, int hidden, Settings settings) {
  if (EXACT || aligned(hidden)) {
    pre_static_bwd<true>(x, bias, d_u, d_x_in, h_res, d_x, dots, h_given, n, hidden, settings);
  } else {
    pre_static_bwd<false>(x, bias, d_u, d_x_in, h_res, d_x, dots, h_given, n, hidden, settings);
  }
}

#if EXACT
static_assert(kMaxBackwardThreads == tuning_post_pre_static_bwd::threads);

// Sums over the channels of a token, of which everything else follows.
struct Dots {
  static constexpr int kX = 0;               // <G[i], X[j]>, with G = d_x_new_in
  static constexpr int kY = N * N;           // <G[i], y>
  static constexpr int kUX = N * N + N;      // <d_u, X[j]>
  static constexpr int kUY = N * N + 2 * N;  // <d_u, y>
  static constexpr int kNum = kUY + 1;
};

// What a block has of the operands and results.
struct Backward {
  const Stream *x, *y, *d_u, *d_x_new_in;
  const float *h_pre, *h_post, *h_res_new;
  Stream *d_x_new, *d_y;
};

// The one word of a pack.
template <int P>
__device__ inline u32 word_of(const float (&values)[P]) {
  Pack<Stream, P> pack;
  pack.set(values);
  return pack.words[0];
}

// d_X' = H_res_new^T G + h_pre d_u, or G + h_pre d_u where that is not deferred, in place of G;
// d_y = sum over i of h_post[i] d_X'[i]. Channels that share a word are taken at once, so that few are in registers as
// float32.
template <bool DEFERRED>
__device__ inline void streams_bwd(const Backward& b, int hidden, float (&sums)[Dots::kNum]) {
  constexpr int V = kTokenChannels<N>, kWords = Pack<Stream, V>::kWords, P = V / kWords;
  for (int at = threadIdx.x * V; at < hidden; at += blockDim.x * V) {
    Pack<Stream, V> gs[N], xs[N], ys, us;
#pragma unroll
    for (int i = 0; i < N; ++i) load<true>(gs[i], b.d_x_new_in + (long long)i * hidden, at, hidden);
    load<true>(us, b.d_u, at, hidden);
#pragma unroll
    for (int j = 0; j < N; ++j) load<true>(xs[j], b.x + (long long)j * hidden, at, hidden);
    load<true>(ys, b.y, at, hidden);
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      float d_x[N][P], d_y[P] = {};
#pragma unroll
      for (int i = 0; i < N; ++i) {
#pragma unroll
        for (int v = 0; v < P; ++v) d_x[i][v] = b.h_pre[i] * us[w * P + v];
      }
#pragma unroll
      for (int i = 0; i < N; ++i) {
        Pack<f32, N> h_res;
        if (DEFERRED) load<true>(h_res, b.h_res_new + i * N, 0, N);
#pragma unroll
        for (int v = 0; v < P; ++v) {
          const float g = gs[i][w * P + v];
          if (!DEFERRED) d_x[i][v] += g;
#pragma unroll
          for (int j = 0; j < N; ++j) {
            if (DEFERRED) d_x[j][v] += h_res[j] * g;
            sums[Dots::kX + i * N + j] += g * xs[j][w * P + v];
          }
          sums[Dots::kY + i] += g * ys[w * P + v];
          sums[Dots::kUX + i] += us[w * P + v] * xs[i][w * P + v];
        }
      }
#pragma unroll
      for (int v = 0; v < P; ++v) sums[Dots::kUY] += us[w * P + v] * ys[w * P + v];
#pragma unroll
      for (int i = 0; i < N; ++i) {
#pragma unroll
        for (int v = 0; v < P; ++v) d_y[v] += b.h_post[i] * d_x[i][v];
        gs[i].words[w] = word_of(d_x[i]);
      }
      ys.words[w] = word_of(d_y);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) store<true>(gs[i], b.d_x_new + (long long)i * hidden, at, hidden);
    store<true>(ys, b.d_y, at, hidden);
  }
}

// Blocks at once on a multiprocessor.
constexpr int kBackwardBlocks = N <= 4 ? 4 : 2;

// h_post and h_res are those of post, h_res_new, null where d_x_new_in is not deferred, that of pre. dots: [tokens, n].
KERNEL(post_pre_static_bwd, kMaxBackwardThreads, kBackwardBlocks)
(const Stream* x, const Stream* y, const float* h_post, const float* h_res, const float* bias,
 const Stream* d_u, const Stream* d_x_new_in, const float* h_res_new, Stream* d_x_new, Stream* d_y,
 float* d_h_post, float* d_h_res, float* dots, const float* h_given, int hidden,
 Settings settings) {
  constexpr int n = N;
  __shared__ float shared[Dots::kNum][kMaxBackwardWarps], totals[Dots::kNum], h_pre[n];
  const long long token = blockIdx.x, row = token * n * hidden;
  h_post += token * n;
  h_res += token * n * n;
  if (h_res_new) h_res_new += token * n * n;
  if (h_given) h_given += token * n;
  if (threadIdx.x < n) h_pre[threadIdx.x] = weight_of(bias, settings, h_given, threadIdx.x);
  __syncthreads();
  const Backward backward{
      x + row, y + token * hidden, d_u + token * hidden, d_x_new_in + row,    h_pre,
      h_post,  h_res_new,          d_x_new + row,        d_y + token * hidden};
  float sums[Dots::kNum] = {};
  if (h_res_new) {
    streams_bwd<true>(backward, hidden, sums);
  } else {
    streams_bwd<false>(backward, hidden, sums);
  }
  reduce(sums, shared);
  __syncthreads();
  for (int c = threadIdx.x; c < Dots::kNum; c += blockDim.x) totals[c] = total(shared[c]);
  __syncthreads();

  // <d_X'[i], A>, from the sums <G[k], A> at every step-th place and <d_u, A>.
  const auto of_d_x = [&](int i, const float* of_g, int step, float of_u) {
    float sum = h_pre[i] * of_u;
    if (!h_res_new) return sum + of_g[i * step];
#pragma unroll
    for (int k = 0; k < n; ++k) sum += h_res_new[k * n + i] * of_g[k * step];
    return sum;
  };
  for (int c = threadIdx.x; c < n * n + 2 * n; c += blockDim.x) {
    const int i = c % n, j = c / n;
    if (j < n) {
      d_h_res[token * n * n + i * n + j] =
          of_d_x(i, totals + Dots::kX + j, n, totals[Dots::kUX + j]);
    } else if (j == n) {
      d_h_post[token * n + i] = of_d_x(i, totals + Dots::kY, 1, totals[Dots::kUY]);
    } else {
      // X' = H_res X + h_post y
      float dot = h_post[i] * totals[Dots::kUY];
#pragma unroll
      for (int k = 0; k < n; ++k) dot += h_res[i * n + k] * totals[Dots::kUX + k];
      dots[token * n + i] = dot;
    }
  }
}
#endif

// ---- sums over tokens ---------------------------------------------------------------------------

constexpr int kSumThreads = tuning_sum_static::threads;
constexpr int kSumWarps = kSumThreads / 32;
constexpr int kMaxColumns = 3 * N + N * N;

// A warp has every kSumWarps-th of the block's tokens, a lane every 32nd column of the four arrays. The results have
// the shape that the cotangents of gridDim.x tokens have; that of h_pre has the dots, too, where they are not null.
KERNEL(sum_static, kSumThreads)
(const float* dots, const float* d_h_pre, const float* d_h_post, const float* d_h_res,
 float* sum_h_pre, float* sum_h_post, float* sum_h_res, int tokens, int num_streams) {
  __shared__ float shared[kMaxColumns][kSumWarps];
  const int n = EXACT ? N : num_streams, num = 3 * n + n * n;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const long long block = blockIdx.x;
  const int first = tokens * block / gridDim.x, last = tokens * (block + 1) / gridDim.x;
#pragma unroll 1
  for (int c = lane; c < num; c += 32) {
    const float* array = c < n ? dots : c < 2 * n ? d_h_pre : c < 3 * n ? d_h_post : d_h_res;
    const int width = c < 3 * n ? n : n * n, column = c < 3 * n ? c % n : c - 3 * n;
    float sum = 0.f;
#pragma unroll 8
    for (int token = first + warp; array && token < last; token += kSumWarps) {
      sum += array[(long long)token * width + column];
    }
    shared[c][warp] = sum;
  }
  __syncthreads();
  for (int c = threadIdx.x; c < n; c += kSumThreads) {
    sum_h_pre[block * n + c] = total(shared[c]) + total(shared[n + c]);
    sum_h_post[block * n + c] = total(shared[2 * n + c]);
  }
  for (int c = threadIdx.x; c < n * n; c += kSumThreads) {
    sum_h_res[block * n * n + c] = total(shared[3 * n + c]);
  }
}
