// The norm of the layer's input, backward, before post_pre_bwd_one_pass: from the cotangent g of the normalised input
// ut = w rho u to du, that of u, and sums over a block's tokens for the gradient of w (sum_norm_scale).
//
//   du = rho (w g - s rho u)      s = <g, ut> / C      dw = sum over tokens of g rho u
//
// rho u is ut / w. Where w is 0, which is rare, it is summed up again from X and y. A block has one token at a
// time; a thread the same kV channels of each.

#include "base/common.cuh"
#include "math/coefficients.cuh"

constexpr int N = SIZE;
constexpr int kMaxThreads = tuning_post_pre_norm_bwd::threads;
constexpr int kV = tuning_post_pre_norm_bwd::channels;
// A divisor must leave room for the digits of the quotient; beside float16, whose numbers have fewer digits below
// 2^-14, those of the dividend must be there.
template <class S>
constexpr float kSmallest = 1e-30f;
template <>
constexpr float kSmallest<f16> = 0x1p-13f;

// u again.
struct Streams {
  const Stream *x, *y;
  const float *h_post, *h_res, *alpha, *bias, *m;
  float pre_eps;
  int hidden, columns;

  __device__ float sum(long long token, int channel) const {
    const float own_y = wide(y[token * hidden + channel]);
    float sum = 0.f;
#pragma unroll 1
    for (int i = 0; i < N; ++i) {
      const long long row = token * N + i;
      float x_new = h_post[row] * own_y;
#pragma unroll 1
      for (int j = 0; j < N; ++j) {
        x_new += h_res[row * N + j] * wide(x[(token * N + j) * hidden + channel]);
      }
      sum += (sigmoid(alpha[0] * m[token * columns + i] + bias[i]) + pre_eps) * x_new;
    }
    return sum;
  }
};

// What a thread reads of a token, and for how many tokens ahead.
struct Numbers {
  Pack<Stream, kV> g, ut;
  float rho;
};
constexpr int kAhead = 2;

// d_w: [blocks, hidden]. Every block has a token; hidden is a multiple of kV, with a thread for each of these.
KERNEL(post_pre_norm_bwd, kMaxThreads)
(const Stream* x, const Stream* y, const float* h_post, const float* h_res, const float* alpha,
 const float* bias, const float* m, const float* norm_scale, const float* rho, const Stream* u_norm,
 const Stream* d_u, Stream* d_sum, float* d_w, int tokens, int hidden, int columns,
 Settings settings) {
  // Of one token and of the next.
  __shared__ float sums[2][kMaxThreads / 32];
  const Streams streams{x, y, h_post, h_res, alpha, bias, m, settings.pre_eps, hidden, columns};
  const int at = threadIdx.x * kV, warps = blockDim.x / 32;
  const float over_hidden = reciprocal(hidden);
  float over_w[kV], own_d_w[kV];
  bool lost = false;
#pragma unroll
  for (int v = 0; v < kV; ++v) {
    const float w = at < hidden ? norm_scale[at + v] : 1.f;
    over_w[v] = fabsf(w) < kSmallest<Stream> ? 0.f : reciprocal(w);
    lost |= over_w[v] == 0.f;
    own_d_w[v] = 0.f;
  }

  // The numbers of the next tokens are on their way while this one's meet: one token ahead they came too late.
  Numbers ahead[kAhead];
  const auto load_token = [&](Numbers& numbers, long long token) {
    if (token >= tokens) return;
    numbers.rho = rho[token];
    load<true>(numbers.g, d_u + token * hidden, at, hidden);
    load<true>(numbers.ut, u_norm + token * hidden, at, hidden);
  };
#pragma unroll
  for (int k = 0; k < kAhead; ++k) load_token(ahead[k], blockIdx.x + (long long)k * gridDim.x);
  int turn = 0;
#pragma unroll 1
  for (long long token = blockIdx.x; token < tokens; token += gridDim.x, turn ^= 1) {
    Numbers numbers = ahead[0];
#pragma unroll
    for (int k = 0; k + 1 < kAhead; ++k) ahead[k] = ahead[k + 1];
    load_token(ahead[kAhead - 1], token + (long long)kAhead * gridDim.x);
    auto& [g, ut, r] = numbers;

    float unit[kV], dot = 0.f;  // rho u
#pragma unroll
    for (int v = 0; v < kV; ++v) {
      unit[v] = ut[v] * over_w[v];
      dot += g[v] * ut[v];
    }
    if (lost && at < hidden) {
#pragma unroll 1
      for (int v = 0; v < kV; ++v) {
        const float again = r * streams.sum(token, at + v);
#pragma unroll
        for (int k = 0; k < kV; ++k) unit[k] = k == v && over_w[k] == 0.f ? again : unit[k];
      }
    }
#pragma unroll
    for (int v = 0; v < kV; ++v) own_d_w[v] += g[v] * unit[v];
    dot = warp_sum(dot);
    if (threadIdx.x % 32 == 0) sums[turn][threadIdx.x / 32] = dot;
    __syncthreads();
    // The same in all threads: a number of a warp each lane.
    const int lane = threadIdx.x % 32;
    const float s = warp_sum(lane < warps ? sums[turn][lane] : 0.f) * over_hidden;
#pragma unroll
    for (int v = 0; v < kV; ++v) {
      const float w = at < hidden ? norm_scale[at + v] : 0.f;
      unit[v] = r * (w * g[v] - s * unit[v]);
    }
    g.set(unit);
    store<true>(g, d_sum + token * hidden, at, hidden);
  }
#pragma unroll
  for (int v = 0; v < kV; ++v) {
    if (at < hidden) d_w[(long long)blockIdx.x * hidden + at + v] = own_d_w[v];
  }
}
