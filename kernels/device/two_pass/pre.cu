// pre and head but for the products with phi (projection.cu): the coefficients of a token, u, and their
// gradients. A head is a pre that has h_pre alone.
//
//   pre_fwd    r, m, h_pre, h_post, H_res from the projection's partial sums, and u      [14 to 19]
//   pre_bwd    from d_u and the cotangents of the coefficients: r dm (for the products), r's factor of
//              -X in d_x and the unit of r dm in float16 (`factors`), h_pre, and sums over a block's tokens for d_alpha and d_bias
//   sum_gates  d_alpha and d_bias, from these sums
//
// A block has kTokens tokens, a warp each; one more warp has the H_res of all of them (Sinkhorn's iterations,
// or the mean of permutations), beside the streaming of X by the others. Where a warp has few matrices at once, there are
// more of these warps.

#include "base/matrix.cuh"
#include "math/coefficients.cuh"
#include "math/collapse.cuh"
#include "math/permutations.cuh"
#include "math/sinkhorn.cuh"

constexpr int N = SIZE;
constexpr int kTokens = tuning_pre_fwd::tokens;
constexpr int kThreads = tuning_pre_fwd::threads;
static_assert(kThreads == tuning_pre_bwd::threads);
// Warps for H_res. With permutations the first one has all of them.
constexpr int kMatrixWarps = kThreads / 32 - kTokens;
static_assert(kThreads % 32 == 0 && kMatrixWarps >= 1);
// Warps that the matrices of a block keep busy.
constexpr int kBusyWarps = (kTokens * N + 31) / 32;
static_assert(kTokens == tuning_pre_bwd::tokens);
static_assert(kTokens * kPermutedLanes == 32);
// Columns of res: n^2 or, where that is more, n!, which is for up to 4 streams.
constexpr int kMaxRes = N == 4 ? kFactorial<4> : N * N;
constexpr int kMaxColumns = 2 * N + kMaxRes;
// Channels that a lane takes at once.
constexpr int V = N <= 4 ? 8 : 4;

// Calls `run` with the Sinkhorn iterations of each token of a block that is this warp's, of `num` warps for them, by the
// whole warp.
template <class Run>
__device__ inline void for_matrices(const Settings& settings, int n, int matrix_warp, int num,
                                    Run run) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int first = matrix_warp * (32 / N); first < kTokens; first += num * (32 / N)) {
    const int token = first + lane / N;
    // Lanes without a matrix repeat the last one.
    run(Sinkhorn<N>{settings, n, lane % N}, min(token, kTokens - 1), token < kTokens);
  }
}

// ---- forward ------------------------------------------------------------------------------------

// u = sum over i of h[i] X[i]; none where u is null, which has weights that are given then.
template <bool ALIGNED>
__device__ inline void collapse(const Stream* row, const float (&h)[N], Stream* u, int n,
                                int hidden) {
  const int lane = threadIdx.x % 32;
  // Lanes without channels stay with those that have some where rows are not aligned.
  const int behind = ALIGNED ? hidden : hidden + lane * V;
#pragma unroll(ALIGNED ? 2 : 1)
  for (int at = lane * V; at < behind; at += 32 * V) {
    Pack<Stream, V> pack[N];
    load_rows<ALIGNED>(pack, row, n, hidden, at);
    float sums[V] = {};
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i >= n) break;
#pragma unroll
      for (int v = 0; v < V; ++v) sums[v] += h[i] * pack[i][v];
    }
    Pack<Stream, V> result;
    result.set(sums);
    store_together<ALIGNED>(result, u, at, hidden);
  }
}

// Blocks at once on a multiprocessor: not so many where the compiler would spill registers.
constexpr bool kForwardSpills = N > 4 && (sizeof(Stream) == 4 || __CUDA_ARCH__ >= 1200);
constexpr int kForwardBlocks = N > 8            ? (sizeof(Stream) == 4 ? 1 : 2)
                               : !EXACT         ? 8 / N + 1
                               : kForwardSpills ? 2
                                                : 4;

// Slices that a lane reads at once.
constexpr int kSlicesAtOnce = 8;

KERNEL(pre_fwd, kThreads, kForwardBlocks)
(const Stream* x, const float* partial, int slices, const float* alpha, const float* bias,
 Stream* u, float* h_pre, float* h_post, float* h_res, float* m, float* r, int tokens, int hidden,
 int columns, Layout layout, Settings settings) {
  static __shared__ float h_pres[kTokens][N];
  static __shared__ float z_res[kTokens][kMaxRes];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int matrix_warp = kMatrixWarps > 1 ? warp - kTokens : 0;
  const int n = EXACT ? N : layout.n;
  const int width = n * hidden;
  const long long block = (long long)blockIdx.x * kTokens;
  const long long token = block + warp;
  const bool exists = warp < kTokens && token < tokens;

  if (exists) {
    const int row_length = (columns + 7) / 8 * 8 + 2;
    const float* row = partial + token * slices * row_length;
    float r_token = 0.f;
    if (columns > 0) {
      float squares = 0.f;
      for (int s = lane; s < slices; s += 32) squares += row[s * row_length + row_length - 2];
      r_token = inverse_norm(settings, warp_sum(squares), width);
    }
    if (lane == 0) r[token] = r_token;
    for (int c = lane; c < layout.num(); c += 32) {
      float z = bias[c];
      if (columns > 0) {
        float sum = 0.f;
        for (int first = 0; first < slices; first += kSlicesAtOnce) {
          float own[kSlicesAtOnce];
#pragma unroll
          for (int s = 0; s < kSlicesAtOnce; ++s) {
            own[s] = first + s < slices ? row[(first + s) * row_length + c] : 0.f;
          }
#pragma unroll
          for (int s = 0; s < kSlicesAtOnce; ++s) sum += own[s];
        }
        m[token * columns + c] = r_token * sum;
        z += alpha[layout.gate(c)] * (r_token * sum);
      }
      if (c < n) {
        const float h = sigmoid(z) + settings.pre_eps;
        h_pres[warp][c] = h;
        if (h_pre) h_pre[token * n + c] = h;
      } else if (c < n + layout.num_post) {
        h_post[token * n + c - n] = settings.post_scale * sigmoid(z) + settings.post_eps;
      } else {
        z_res[warp][c - 2 * n] = z;
      }
    }
  }
  __syncthreads();

  if (warp >= kTokens) {
    if (!h_res) return;
    if (settings.constraint == Constraint::kPermutations) {
      if (warp > kTokens) return;
      const int t = lane / kPermutedLanes;
      float* out = h_res + (block + t) * n * n;
      return mix_permutations(n, z_res[t], out, lane % kPermutedLanes, block + t < tokens);
    }
    const auto mix = [&](const Sinkhorn<N>& sinkhorn, int t, bool own) {
      typename Sinkhorn<N>::Matrix z, h;
      sinkhorn.for_each([&](int k, int i) {
        z[k][i] = layout.num_res && sinkhorn.active(k, i) ? z_res[t][sinkhorn.at(k, i)] : 0.f;
        h[k][i] =
            layout.num_res ? z[k][i] : float(i == sinkhorn.column(k));  // none: z; identity: I
      });
      if (settings.constraint == Constraint::kBirkhoff) sinkhorn.forward(z, h, nullptr, 0);
      sinkhorn.for_each([&](int k, int i) {
        if (own && block + t < tokens && sinkhorn.active(k, i)) {
          h_res[(block + t) * n * n + sinkhorn.at(k, i)] = h[k][i];
        }
      });
    };
    for_matrices(settings, n, matrix_warp, kMatrixWarps, mix);
    return;
  }

  if (!exists || !u) return;
  float h[N];
#pragma unroll
  for (int i = 0; i < N; ++i) h[i] = i < n ? h_pres[warp][i] : 0.f;
  const Stream* row = x + token * width;
  if (EXACT || aligned(hidden)) {
    collapse<true>(row, h, u + token * hidden, n, hidden);
  } else {
    collapse<false>(row, h, u + token * hidden, n, hidden);
  }
}

// ---- backward -----------------------------------------------------------------------------------

// Groups of channels that a lane reads at once.
constexpr int kDotsAtOnce = N == 8 && sizeof(Stream) == 2 ? 2 : 1;

// dots[i] = <d_u, X[i]>, over this lane's channels
template <bool ALIGNED>
__device__ inline void collapse_bwd(const Stream* row, const Stream* d_u, float (&dots)[N], int n,
                                    int hidden) {
  const int lane = threadIdx.x % 32;
#pragma unroll kDotsAtOnce
  for (int at = lane * V; at < hidden; at += 32 * V) {
    add_dots<ALIGNED, V>(row, d_u, n, hidden, at, dots);
  }
}

// Blocks at once on a multiprocessor: the compiler would take more registers than so many have. sm_120 needs
// more for four streams.
constexpr int kFewBlocks = sizeof(Stream) == 4 || (N == 4 && __CUDA_ARCH__ >= 1200) ? 3
                           : N == 2                                                 ? 5
                                                                                    : 4;
constexpr int kBackwardBlocks = N > 8 ? 1 : kMatrixWarps > 1 ? 2 : N > 4 || !EXACT ? 3 : kFewBlocks;

// Where many bfloat16 streams may come with their dots: as sums over some channels each, [tokens, num_dots, n]. Nothing
// streams then, and a block is kBusyWarps, which share tokens and matrices out.
constexpr bool kTakesDots = N >= 8 && kStreamParts<Stream> == 1;

// Cotangents of coefficients that a head does not have are null, and so is d_u where it adds nothing to d_h_pre. gate_sums: [blocks, num + 3]. history:
// 2 * iters * 32 floats a block and warp for H_res, in shared memory where it is null. `dots` may be null.
KERNEL(pre_bwd, kThreads, kBackwardBlocks)
(const Stream* x, const float* alpha, const float* bias, const float* m, const float* r,
 const Stream* d_u, const float* d_h_pre, const float* d_h_post, const float* d_h_res, u32* dm_rows,
 u32* dm_columns, float* h_pre, float2* factors, float* gate_sums, float* history, int tokens,
 int hidden, int columns, Layout layout, Settings settings, const float* dots, int num_dots) {
  extern __shared__ float shared_history[];
  static __shared__ float d_z[kTokens][kMaxColumns];
  static __shared__ float d_alphas[kTokens][3];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int matrix_warp = kMatrixWarps > 1 ? warp - kTokens : 0;
  const int n = EXACT ? N : layout.n;
  const int width = n * hidden;
  const Fragments dm_fragments{dm_rows, dm_columns, columns};
  const long long block = (long long)blockIdx.x * kTokens;

  const auto logit = [&](long long t, int c) {
    const float z = bias[c];
    return columns > 0 ? alpha[layout.gate(c)] * m[t * columns + c] + z : z;
  };

  const bool has_dots = kTakesDots && dots;
  const int warps = has_dots ? kBusyWarps : kTokens;
#pragma unroll 1
  for (int t = warp; t < kTokens && block + t < tokens; t += warps) {
    const long long token = block + t;
    // That of the stream of this lane.
    float dot = 0.f;
    if (has_dots) {
#pragma unroll 8
      for (int p = 0; lane < n && p < num_dots; ++p) dot += dots[(token * num_dots + p) * n + lane];
    } else if (d_u) {
      float own_dots[N] = {};
      const Stream* row = x + token * width;
      if (EXACT || aligned(hidden)) {
        collapse_bwd<true>(row, d_u + token * hidden, own_dots, n, hidden);
      } else {
        collapse_bwd<false>(row, d_u + token * hidden, own_dots, n, hidden);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (i >= n) break;
        const float sum = warp_sum(own_dots[i]);
        dot = lane == i ? sum : dot;
      }
    }
    if (lane < n) {
      const float z = logit(token, lane), s = sigmoid(z);
      const float d_h = dot + (d_h_pre ? d_h_pre[token * n + lane] : 0.f);
      d_z[t][lane] = d_h * s * sigmoid(-z);
      h_pre[token * n + lane] = s + settings.pre_eps;
    }
    for (int i = lane; i < layout.num_post; i += 32) {
      const float z = logit(token, n + i);
      const float d_h = d_h_post[token * n + i];
      d_z[t][n + i] = d_h * settings.post_scale * sigmoid(z) * sigmoid(-z);
    }
  }
  const bool has_matrices = has_dots || warp >= kTokens;
  // For up to 4 streams alone.
  const bool is_permuted = N <= 4 && settings.constraint == Constraint::kPermutations;
  if (warp == kTokens && layout.num_res && is_permuted) {
    const int t = lane / kPermutedLanes;
    const long long at = min(block + t, (long long)tokens - 1);
    mix_permutations_bwd(
        n, [&](int p) { return logit(at, 2 * n + p); }, d_h_res + at * n * n, d_z[t] + 2 * n,
        lane % kPermutedLanes);
  } else if (has_matrices && layout.num_res && settings.constraint != Constraint::kPermutations) {
    const int recorded = 2 * settings.sinkhorn_iters * 32;
    const int index = has_dots ? warp : matrix_warp;
    const int num = has_dots ? kBusyWarps : kMatrixWarps;
    float* own = history ? history + (long long)blockIdx.x * num * recorded : shared_history;
    own += index * recorded + lane;
    for_matrices(settings, n, index, num, [&](const Sinkhorn<N>& sinkhorn, int t, bool) {
      const long long at = min(block + t, (long long)tokens - 1);
      typename Sinkhorn<N>::Matrix z, h, g;
      sinkhorn.for_each([&](int k, int i) {
        z[k][i] = sinkhorn.active(k, i) ? logit(at, 2 * n + sinkhorn.at(k, i)) : 0.f;
        g[k][i] = sinkhorn.active(k, i) ? d_h_res[at * n * n + sinkhorn.at(k, i)] : 0.f;
      });
      if (settings.constraint == Constraint::kBirkhoff) {
        sinkhorn.forward(z, h, own, 32);
        sinkhorn.backward(z, h, g, own, 32);
      }
      sinkhorn.for_each([&](int k, int i) {
        if (sinkhorn.active(k, i)) d_z[t][2 * n + sinkhorn.at(k, i)] = g[k][i];
      });
    });
  }
  __syncthreads();

#pragma unroll 1
  for (int t = warp; t < kTokens; t += warps) {
    // Tokens behind the last one have no gradient, and their fragments must say so.
    const long long token = block + t;
    const bool exists = token < tokens;
    const float r_token = exists ? r[token] : 0.f;
    const auto dm_of = [&](int c) {
      return exists && c < columns ? alpha[layout.gate(c)] * d_z[t][c] : 0.f;
    };
    u32 largest = 0;
    for (int c = lane; kBackParts<Stream> == 1 && c < columns; c += 32) {
      largest = max(largest, magnitude(r_token * dm_of(c)));
    }
    const float unit = half_unit(__reduce_max_sync(kAllLanes, largest));
    float d_alpha[3] = {};
    float dm_dot_m = 0.f;
    for (int c = lane; c < dm_fragments.hexets() * 16; c += 32) {
      const float dm = dm_of(c);
      if (exists && c < columns) {
        const int gate = layout.gate(c);
        const float m_c = m[token * columns + c], dz = d_z[t][c];
        dm_dot_m += dm * m_c;
#pragma unroll
        for (int k = 0; k < 3; ++k) d_alpha[k] += gate == k ? dz * m_c : 0.f;
      }
      dm_fragments.set<Stream>(token, c, r_token * dm, inverse_of_unit(unit));
    }
    dm_dot_m = warp_sum(dm_dot_m);
    if (exists && lane == 0) factors[token] = {r_slope(settings, r_token, width) * dm_dot_m, unit};
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      const float sum = warp_sum(d_alpha[k]);
      if (lane == 0) d_alphas[t][k] = sum;
    }
  }
  __syncthreads();

  const int num = layout.num(), here = min((long long)kTokens, tokens - block);
  for (int c = threadIdx.x; c < num + 3; c += blockDim.x) {
    float sum = 0.f;
    for (int t = 0; t < here; ++t) sum += c < num ? d_z[t][c] : d_alphas[t][c - num];
    gate_sums[(long long)blockIdx.x * (num + 3) + c] = sum;
  }
}

// A warp a column: d_bias, then d_alpha.
KERNEL(sum_gates, 32)
(const float* gate_sums, float* d_bias, float* d_alpha, int blocks, int num, int num_alpha) {
  const int c = blockIdx.x, lane = threadIdx.x;
  float sum = 0.f;
  for (int block = lane; block < blocks; block += 32) {
    sum += gate_sums[(long long)block * (num + 3) + c];
  }
  sum = warp_sum(sum);
  if (lane != 0) return;
  if (c < num) {
    d_bias[c] = sum;
  } else if (c - num < num_alpha) {
    d_alpha[c - num] = sum;
  }
}
