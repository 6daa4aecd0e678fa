// Tasks of the owner of a token in the one-pass kernels: sums over the blocks of the cluster, and over its tokens the
// gradients of the gates.

#pragma once

#include "one_pass/geometry.cuh"

// The sum of the values at `from`, one of each of up to MOST blocks: all reads are under way at once, those behind the
// last block's for nothing.
template <u32 MOST>
__device__ inline float sum_of_blocks(u32 from, u32 stride, u32 blocks) {
  float values[MOST];
#pragma unroll
  for (u32 b = 0; b < MOST; ++b) values[b] = read_float(from + min(b, blocks - 1) * stride);
  float sums[2] = {};
#pragma unroll
  for (u32 b = 0; b < MOST; ++b) sums[b % 2] += b < blocks ? values[b] : 0.f;
  return sums[0] + sums[1];
}
__device__ inline float sum_of_blocks(u32 from, u32 stride, u32 blocks) {
  return blocks > 8   ? sum_of_blocks<16>(from, stride, blocks)
         : blocks > 4 ? sum_of_blocks<8>(from, stride, blocks)
         : blocks > 1 ? sum_of_blocks<4>(from, stride, blocks)
                      : read_float(from);
}

// Sums over the tokens of a warp for the gradients of alpha and bias; lane c has column c.
struct GateSums {
  float d_z = 0.f, d_z_m = 0.f;

  __device__ void add(float token_d_z, float m) {
    d_z += token_d_z;
    d_z_m += token_d_z * m;
  }
  // The row [kColumns + 3] of this warp, for sum_gradients. gate_of(lane): the place in alpha of the lane's gate. A
  // kernel brings its own expression of it: in another's words its registers are allotted anew, and on sm_100f spill.
  //
  //   d_bias[c] = sum of d_z[c],  d_alpha[gate] = sum of d_z[c] m[c] over the columns of the gate
  template <class Gate>
  __device__ void store(float* row, int lane, Gate gate_of) const {
    if (lane < kColumns) row[lane] = d_z;
#pragma unroll
    for (int gate = 0; gate < 3; ++gate) {
      const float sum = warp_sum(lane < kColumns && gate == gate_of(lane) ? d_z_m : 0.f);
      if (lane == 0) row[kColumns + gate] = sum;
    }
  }
};
