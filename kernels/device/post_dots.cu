// post where it is done again for a backward pass, of many bfloat16 streams: X' as post_fwd makes it, and what pre's backward
// pass would read it again for, <d_u, X'[i]>, the gradient of h_pre.

#include "math/mix.cuh"

constexpr int N = SIZE;
constexpr int kThreads = tuning_post_dots_fwd::threads, kChannels = tuning_post_dots_fwd::channels;

// A warp has some channels of a token. dots: [tokens, warps of a token, n], of each warp's channels. A lane has two octets
// of channels of a result.
KERNEL(post_dots_fwd, kThreads, N <= 8 ? 5 : 4)
(const Stream* x, const Stream* y, const float* h_post, const float* h_res, const Stream* d_u,
 Stream* x_new, float* dots, int tokens, int slab, int n, int hidden) {
  const WarpItem<kThreads, kChannels> item(tokens, slab, hidden);
  if (!item.exists) return;
  const long long token = item.token, row = token * n * hidden;
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  Pack<Stream, 8> d_us[kChannels / 64][2];
#pragma unroll
  for (int u = 0; u < kChannels / 64; ++u) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      load<true>(d_us[u][r], d_u + token * hidden, item.first + 64 * u + 16 * q + 8 * r, hidden);
    }
  }
  float sums[N / 8] = {};
  mix_channels<true, N, kChannels>(
      [&] { return post_weights<N>(h_res + token * n * n, h_post + token * n, n); }, x + row,
      y + token * hidden, x_new + row, item.first, n, hidden,
      [&](int u, int h, int r, const Pack<Stream, 8>& result) {
#pragma unroll
        for (int v = 0; v < 8; ++v) sums[h] += result[v] * d_us[u][r][v];
      });
  const int warps = (hidden + kChannels - 1) / kChannels;
#pragma unroll
  for (int h = 0; h < N / 8; ++h) {
    float sum = sums[h];
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    const int i = g + 8 * h;
    if (q == 0 && i < n) dots[(token * warps + item.first / kChannels) * n + i] = sum;
  }
}
