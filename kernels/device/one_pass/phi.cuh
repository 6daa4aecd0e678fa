// phi and the sums for its gradient in the main warps of the backward kernels: fragments of 16 channels of a stream and
// all columns of phi, as tensor cores want them. Lane 4 g + q has the channels g and g + 8.

#pragma once

#include "one_pass/geometry.cuh"

constexpr int kOctets = kColumns / 8;

// phi as A of the products with r dm, both in float16. One part of each is as near as the cotangents of the streams in
// bfloat16 want them, and bfloat16 would take two. Beside float16 streams r dm has two parts, which leave phi's rounding
// alone: that is no larger than the cotangents' own.
constexpr int kPhiWords = 2 * kOctets;
constexpr u32 kPhiFragmentBytes = 32 * kPhiWords * 4;

// This lane's elements, two neighbouring columns each, in units of which all fit into float16 (`half_unit`).
__device__ inline void round_phi(u32 (&words)[kPhiWords], const float2 (&values)[kPhiWords],
                                 float scale) {
#pragma unroll
  for (int w = 0; w < kPhiWords; ++w)
    words[w] = half_pair(values[w].x * scale, values[w].y * scale);
}

// r dm as B of these products: pairs of columns of this lane's token, in the token's unit.
constexpr int kDmParts = kStreamParts<Stream>;
using HalfDm = u32[kDmParts][kOctets];
// An octet's columns, from two parts of bfloat16.
__device__ inline void set_octet(HalfDm& half_dm, int octet, u32 high, u32 low, float scale) {
  u32 parts[kDmParts];
  split_halves(high, low, scale, parts);
#pragma unroll
  for (int p = 0; p < kDmParts; ++p) half_dm[p][octet] = parts[p];
}
// Adds (r dm) phi^T of a fragment of phi.
__device__ inline void add_product(float (&sums)[4], const u32 (&phi)[kPhiWords],
                                   const HalfDm& half_dm) {
#pragma unroll
  for (int p = kDmParts - 1; p >= 0; --p) mma_half(sums, phi, half_dm[p]);
}

// Adds x^T (r dm) of 8 tokens, with r dm in two bfloat16 parts of each octet of columns, to sums for d_phi of the channels
// g and g + 8. octet_of(part): which octet a part is of. Units of r dm would have to be the same for all tokens: so float16
// has no range for it, but tf32 has, with all bits of float16 and of a part.
template <class OctetOf>
__device__ inline void add_columns(float (&sums)[kOctets][4], const u32 (&x)[2],
                                   const u32 (&dm)[2 * kOctets], OctetOf octet_of) {
  const auto first = [](u32 pair) { return __float_as_uint(low_of<Stream>(pair)); };
  const auto second = [](u32 pair) { return __float_as_uint(high_of<Stream>(pair)); };
#pragma unroll
  for (int part = 0; part < 2 * kOctets; ++part) {
    float (&own)[4] = sums[octet_of(part)];
    if constexpr (kStreamParts<Stream> == 1) {
      mma_k8(own, x[0], x[1], dm[part]);
    } else {
      mma_tf32(own, first(x[0]), first(x[1]), second(x[0]), second(x[1]),
               {__float_as_uint(low_half(dm[part])), __float_as_uint(high_half(dm[part]))});
    }
  }
}

// d_phi = sum over tokens of vec(X)^T (r dm): the sums of a fragment that a lane has, to its places,
// of which the first is the pair q of columns at `out`; the second channel is APART channels from the first.
template <int APART = 8>
__device__ inline void store_d_phi(float* out, const float (&sums)[kOctets][4], int q = 0) {
#pragma unroll
  for (int octet = 0; octet < kOctets; ++octet) {
    const float (&d)[4] = sums[octet];
    reinterpret_cast<float2*>(out + octet * 8)[q] = {d[0], d[1]};
    reinterpret_cast<float2*>(out + APART * kColumns + octet * 8)[q] = {d[2], d[3]};
  }
}
