// Means of the owners of tokens in the backward one-pass kernels: how a warp takes several tokens of a tile at once,
// and the sums over its tokens for the gradients of the gates.
//
// A token has eight lanes. Lane e of them has column e of each octet of phi's columns, and the stream e % N, of which the
// lanes of h_pre's columns make use. Where a block owns fewer tokens of a tile than a warp has groups of lanes, two or
// four groups have the same token (copies), and share what is read and sent.

#pragma once

#include "one_pass/phi.cuh"

// Copies of a token are 2^shift. The sum over them.
__device__ inline float sum_copies(float v, u32 copies_shift) {
#pragma unroll
  for (u32 shift = 0; shift < 2; ++shift) {
    const float other = __shfl_xor_sync(kAllLanes, v, 8 << shift);
    v += shift < copies_shift ? other : 0.f;
  }
  return v;
}

// The turns in which a token's copies read or send, from this lane's first one on. A turn is computed anew: there are
// too few registers to keep it.
struct Turn {
  u32 at, from, step;
  __device__ Turn(u32 at, u32 copy, u32 copies_shift)
      : at(at), from(copy), step(1 << copies_shift) {
    keep(step);
  }
  __device__ void next(u32 bytes) {
    at += step * bytes;
    from += step;
  }
};

// The place in alpha of column c's gate.
__device__ inline int gate_of(int c) { return c < N ? 0 : kColumns == 2 * N || c < 2 * N ? 1 : 2; }

// Sums over the tokens of a warp for the gradients of alpha and bias; lane c has column c.
struct GateSums {
  float d_z = 0.f, d_z_m = 0.f;

  __device__ void add(float token_d_z, float m) {
    d_z += token_d_z;
    d_z_m += token_d_z * m;
  }
  // Over the tokens that the warp has at once.
  __device__ void sum_tokens() {
#pragma unroll
    for (u32 step = 8; step < 32; step *= 2) {
      d_z += __shfl_xor_sync(kAllLanes, d_z, step);
      d_z_m += __shfl_xor_sync(kAllLanes, d_z_m, step);
    }
  }
  // The row [kColumns + 3] of this warp, for sum_gradients.
  //
  //   d_bias[c] = sum of d_z[c],  d_alpha[gate] = sum of d_z[c] m[c] over the columns of the gate
  __device__ void store(float* row, int lane) const {
    if (lane < kColumns) row[lane] = d_z;
#pragma unroll
    for (int gate = 0; gate < 3; ++gate) {
      const float sum = warp_sum(lane < kColumns && gate == gate_of(lane) ? d_z_m : 0.f);
      if (lane == 0) row[kColumns + gate] = sum;
    }
  }
};
