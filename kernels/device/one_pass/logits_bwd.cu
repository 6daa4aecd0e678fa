// The gradients of the logits z of h_post, and of H_res where it has any: what a backward pass in one kernel over the
// streams wants to know beforehand. Reads numbers of tokens alone, no streams.

#include "math/coefficients.cuh"
#include "math/permutations.cuh"
#include "math/sinkhorn.cuh"

constexpr int N = SIZE;
// A block is a warp, as there are few tokens, and each of them takes long.
static_assert(tuning_logits_bwd::threads == 32);
constexpr int kTokens = tuning_logits_bwd::tokens;
// Lanes of a matrix: fewer of them make the chain of waits shorter, and more have more warps at it.
constexpr int kLanes = 32 / kTokens;
using Matrices = Sinkhorn<N, kLanes>;

// d_z: [tokens, columns] in the order pre, post, res, of which the columns of pre are left alone. Shared memory:
// 2 * sinkhorn_iters * 32 floats for each of a lane's columns, for what Sinkhorn's forward pass records.
KERNEL(logits_bwd, 32)
(const float* m, const float* alpha, const float* bias, const float* d_h_post, const float* d_h_res,
 float* d_z, int tokens, int columns, Settings settings) {
  extern __shared__ float history[];
  const int lane = threadIdx.x;
  const long long own = (long long)blockIdx.x * kTokens + lane / kLanes;
  // Lanes without a token repeat the last one.
  const long long token = min(own, (long long)tokens - 1);
  const float* m_token = m + token * columns;
  float* d_z_token = d_z + token * columns;
  const Matrices matrices{settings, N, lane % kLanes};

  const auto differentiate_post = [&] {
#pragma unroll
    for (int k = 0; k < Matrices::kOwn; ++k) {
      const int c = matrices.column(k);
      const float z_post = alpha[1] * m_token[N + c] + bias[N + c];
      const float d_post = d_h_post[token * N + c] * settings.post_scale;
      if (own < tokens) d_z_token[N + c] = d_post * sigmoid(z_post) * sigmoid(-z_post);
    }
  };
  if (settings.constraint == Constraint::kIdentity) return differentiate_post();
  if (settings.constraint == Constraint::kPermutations) {
    differentiate_post();
    // For fewer tokens at once, which have more lanes each.
    constexpr int kAtOnce = 32 / kPermutedLanes;
#pragma unroll 1
    for (int first = 0; first < kTokens; first += kAtOnce) {
      const long long at = (long long)blockIdx.x * kTokens + first + lane / kPermutedLanes;
      const long long row = min(at, (long long)tokens - 1);
      const float* m_row = m + row * columns + 2 * N;
      Permutations<N>::backward([&](int p) { return alpha[2] * m_row[p] + bias[2 * N + p]; },
                                d_h_res + row * N * N, d_z + row * columns + 2 * N,
                                lane % kPermutedLanes);
    }
    return;
  }

  Matrices::Matrix z, h, g;
  matrices.for_each([&](int k, int i) {
    const int c = 2 * N + matrices.at(k, i);
    z[k][i] = alpha[2] * m_token[c] + bias[c];
    g[k][i] = d_h_res[token * N * N + matrices.at(k, i)];
  });
  differentiate_post();
  if (settings.constraint == Constraint::kBirkhoff) {
    matrices.forward(z, h, history + lane, 32);
    matrices.backward(z, h, g, history + lane, 32);
  }
  matrices.for_each([&](int k, int i) {
    if (own < tokens) d_z_token[2 * N + matrices.at(k, i)] = g[k][i];
  });
}
