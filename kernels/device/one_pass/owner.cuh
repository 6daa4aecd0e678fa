// A task of the owner of a token in the backward one-pass kernels: the sums over its tokens for the gradients of the
// gates.

#pragma once

#include "one_pass/geometry.cuh"

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
