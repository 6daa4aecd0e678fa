// The gradients of the parameters from the sums that the backward passes in one kernel over the streams leave.

#include "base/common.cuh"

constexpr int kThreads = tuning_sum_gradients::threads;

// d_phi from d_phi_partial [clusters, size], whose numbers come in fours. The last block has d_bias and d_alpha, from
// gate_sums [blocks, columns + 3], a warp a column; d_alpha has `num_gates` of the last 3.
KERNEL(sum_gradients, kThreads)
(const float4* d_phi_partial, const float* gate_sums, float4* d_phi, float* d_bias, float* d_alpha,
 int clusters, int blocks, int size, int columns, int num_gates) {
  if (blockIdx.x + 1 == gridDim.x) {
    for (int c = threadIdx.x / 32; c < columns + num_gates; c += kThreads / 32) {
      float sum = 0.f;
      for (int block = threadIdx.x % 32; block < blocks; block += 32) {
        sum += gate_sums[block * (columns + 3) + c];
      }
      sum = warp_sum(sum);
      if (threadIdx.x % 32 == 0) (c < columns ? d_bias : d_alpha - columns)[c] = sum;
    }
    return;
  }
  const int at = blockIdx.x * kThreads + threadIdx.x;
  if (at >= size) return;
  float4 sum = {};
#pragma unroll 8
  for (int cluster = 0; cluster < clusters; ++cluster) {
    const float4 v = d_phi_partial[(long long)cluster * size + at];
    sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
  }
  d_phi[at] = sum;
}
