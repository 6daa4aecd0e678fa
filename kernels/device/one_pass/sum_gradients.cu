// The gradients of the parameters as a kernel.

#include "one_pass/sum_gradients.cuh"

constexpr int kThreads = tuning_sum_gradients::threads;

// Blocks have d_phi, but the last one, which has the others (see sum_gradients.cuh).
KERNEL(sum_gradients, kThreads)
(const float4* d_phi_partial, const float* gate_sums, float4* d_phi, float* d_bias, float* d_alpha,
 int clusters, int blocks, int size, int of_stream, int padded, int columns, int num_gates) {
  if (blockIdx.x + 1 == gridDim.x) {
    sum_gates<kThreads>(gate_sums, d_bias, d_alpha, blocks, columns, num_gates);
  } else {
    const int at = blockIdx.x * kThreads + threadIdx.x;
    sum_phi(d_phi_partial, d_phi, clusters, size, of_stream, padded, at);
  }
}
