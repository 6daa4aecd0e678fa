// The gradients of the parameters from the sums that the backward passes in one kernel over the streams leave.

#pragma once

#include "base/common.cuh"

// d_phi from d_phi_partial, whose numbers come in fours: those of a thread. A cluster has the streams of d_phi, of which each
// has `padded` fours there and `of_stream` in d_phi.
__device__ inline void sum_phi(const float4* d_phi_partial, float4* d_phi, int clusters, int size,
                               int of_stream, int padded, int at) {
  if (at >= size) return;
  const float4* from = d_phi_partial + at / of_stream * padded + at % of_stream;
  const int of_cluster = size / of_stream * padded;
  float4 sum = {};
#pragma unroll 8
  for (int cluster = 0; cluster < clusters; ++cluster) {
    const float4 v = from[(long long)cluster * of_cluster];
    sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
  }
  d_phi[at] = sum;
}

// d_bias and d_alpha from gate_sums [rows, columns + 3], by a block, a warp a column; d_alpha has `num_gates` of the last 3.
template <int THREADS>
__device__ inline void sum_gates(const float* gate_sums, float* d_bias, float* d_alpha, int rows,
                                 int columns, int num_gates) {
  for (int c = threadIdx.x / 32; c < columns + num_gates; c += THREADS / 32) {
    float sum = 0.f;
    for (int row = threadIdx.x % 32; row < rows; row += 32) {
      sum += gate_sums[row * (columns + 3) + c];
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) (c < columns ? d_bias : d_alpha - columns)[c] = sum;
  }
}
