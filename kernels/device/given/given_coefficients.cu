// The coefficients of tokens from the sums that post_given_fwd.cu leaves, one for each slice of the channels:
//
//   r, m, h_pre, h_post, H_res                                                                    [14 to 19]
//
// Nothing is beside it on the GPU but the end of that kernel. So a block has few tokens, that all of them run at once.

#include "math/coefficients.cuh"
#include "math/permutations.cuh"
#include "math/sinkhorn.cuh"

constexpr int N = SIZE;
constexpr int kTokens = tuning_given_coefficients::tokens;
constexpr int kThreads = tuning_given_coefficients::threads;
// Slices that a thread reads at once.
constexpr int kSlicesAtOnce = 8;
// Columns of res: n^2 or, where that is more, n!.
constexpr int kMostColumns = 2 * N + (N == 4 ? kFactorial<4> : N * N);
static_assert(kTokens * kPermutedLanes == 32 && kTokens * N <= 32, "one warp has all matrices");

__device__ inline void add(float4& sum, float4 v) {
  sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
}
__device__ inline void add(float& sum, float v) { sum += v; }

// Adds up numbers of all slices, which lie `stride` apart, in their order. Reads have no conditions, so that all are on
// their way at once.
template <class T>
__device__ inline T sum_of_slices(const T* from, int slices, int stride) {
  T sum = {};
  for (int s = 0; s < slices; s += kSlicesAtOnce) {
    T own[kSlicesAtOnce];
#pragma unroll
    for (int k = 0; k < kSlicesAtOnce; ++k) own[k] = from[size_t(min(s + k, slices - 1)) * stride];
#pragma unroll
    for (int k = 0; k < kSlicesAtOnce; ++k) {
      if (s + k < slices) add(sum, own[k]);
    }
  }
  return sum;
}

// sums: [tokens, slices, columns], a multiple of 8 columns; squares: [tokens, slices].
KERNEL(given_coefficients, kThreads)
(const float4* sums_of_slices, const float* squares, int slices, const float* alpha,
 const float* bias, float* h_pre, float* h_post, float* h_res, float* m, float* r, int tokens,
 int hidden, int columns, Settings settings) {
  static __shared__ float4 sums[kTokens][kMostColumns / 4];
  static __shared__ float square_sums[kTokens];
  const auto sum_at = [&](int t, int c) { return reinterpret_cast<const float*>(sums[t])[c]; };
  const int first = blockIdx.x * kTokens, here = min(kTokens, tokens - first);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // The last warp has the sums of squares.
  constexpr int kSquares = kThreads - 32;
  const int parts = columns / 4;
  for (int item = threadIdx.x; item < here * parts && threadIdx.x < kSquares; item += kSquares) {
    const int t = item / parts, part = item % parts;
    const float4* from = sums_of_slices + size_t(first + t) * slices * parts + part;
    sums[t][part] = sum_of_slices(from, slices, parts);
  }
  if (threadIdx.x >= kSquares && lane < here) {
    square_sums[lane] = sum_of_slices(squares + size_t(first + lane) * slices, slices, 1);
  }
  __syncthreads();

  const auto r_of = [&](int t) { return inverse_norm(settings, square_sums[t], N * hidden); };
  if (warp > 0) {
    for (int item = threadIdx.x - 32; item < here * columns; item += kThreads - 32) {
      const int t = item / columns, c = item % columns;
      const size_t token = first + t;
      const float r_token = r_of(t), m_c = r_token * sum_at(t, c);
      if (c == 0) r[token] = r_token;
      m[token * columns + c] = m_c;
      if (c < N) {
        h_pre[token * N + c] = sigmoid(alpha[0] * m_c + bias[c]) + settings.pre_eps;
      } else if (c < 2 * N) {
        const float s = sigmoid(alpha[1] * m_c + bias[c]);
        h_post[token * N + c - N] = settings.post_scale * s + settings.post_eps;
      }
    }
    return;
  }

  const auto logit = [&](int t, float r_token, int k) {
    const int c = 2 * N + k;
    return alpha[2] * (r_token * sum_at(t, c)) + bias[c];
  };
  if (settings.constraint == Constraint::kPermutations) {
    // Where there are no tokens, lanes repeat the last one, but for what they write.
    const int own = lane / kPermutedLanes, t = min(own, here - 1);
    static __shared__ float z[kTokens][kFactorial<N>];
    const float r_token = r_of(t);
    Permutations<N>::for_own(lane % kPermutedLanes,
                             [&](int, int p, int) { z[own][p] = logit(t, r_token, p); });
    float* out = h_res + size_t(first + t) * N * N;
    return Permutations<N>::forward(z[own], out, lane % kPermutedLanes, own < here);
  }
  const int own = lane / N, t = min(own, here - 1);
  const float r_token = r_of(t);
  const Sinkhorn<N> matrices{settings, N, lane % N};
  typename Sinkhorn<N>::Matrix z, h;
  matrices.for_each([&](int k, int i) {
    const bool has_logits = columns > 2 * N;
    z[k][i] = has_logits ? logit(t, r_token, matrices.at(k, i)) : float(i == matrices.column(k));
    h[k][i] = z[k][i];  // none; identity: I
  });
  if (settings.constraint == Constraint::kBirkhoff) matrices.forward(z, h, nullptr, 0);
  if (own >= here) return;
  float* out = h_res + size_t(first + t) * N * N;
  matrices.for_each([&](int k, int i) { out[matrices.at(k, i)] = h[k][i]; });
}
