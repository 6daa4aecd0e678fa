// The gradients of the parameters of one stream from the sums that blocks leave. There are more blocks than columns are
// worth, so that many warps share a column's.

#include "base/common.cuh"

constexpr int kThreads = tuning_sum_one_stream::threads;
constexpr int kWarps = kThreads / 32;

// d_phi from d_phi_partial [rows, size], and in the last block d_bias and d_alpha from gates [rows, columns + 3], of
// whose last 3 d_alpha has `num_gates`. A lane has a number, a warp every kWarps-th row.
KERNEL(sum_one_stream, kThreads)
(const float* d_phi_partial, const float* gates, float* d_phi, float* d_bias, float* d_alpha,
 int rows, int size, int columns, int num_gates) {
  __shared__ float sums[kWarps][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool has_gates = blockIdx.x + 1 == gridDim.x;
  const float* from = has_gates ? gates : d_phi_partial;
  const int width = has_gates ? columns + 3 : size, at = has_gates ? lane : blockIdx.x * 32 + lane;
  float sum = 0.f;
  if (at < width) {
#pragma unroll 8
    for (int row = warp; row < rows; row += kWarps) sum += from[(long long)row * width + at];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || at >= width) return;
#pragma unroll
  for (int w = 1; w < kWarps; ++w) sum += sums[w][lane];
  if (!has_gates) {
    d_phi[at] = sum;
  } else if (at < columns) {
    d_bias[at] = sum;
  } else if (at < columns + num_gates) {
    d_alpha[at - columns] = sum;
  }
}
