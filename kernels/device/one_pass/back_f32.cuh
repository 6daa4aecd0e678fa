// Products of float32 numbers in the main warps of the backward kernels beside float32 streams.
//
// A float32 is cut into two parts of tf32, which has 11 bits of its 24: the nearest one and the rest, of which tensor
// cores drop at most the last bit. The product of two low parts does not count. Tensor cores drop the last bits of a sum
// instead of rounding it, which a long sum would show: so they add up 8 products of float32 alone.

#pragma once

#include "one_pass/phi.cuh"

// The parts of a number.
struct Parts {
  u32 high, low;

  Parts() = default;
  __device__ explicit Parts(float v) {
    high = (__float_as_uint(v) + 0x1000) & 0xffffe000;
    low = __float_as_uint(v - __uint_as_float(high));
  }
};

// B of a product of 8 k: those of a lane, 2 q and 2 q + 1 in place of q and q + 4.
struct Factor {
  Parts first, second;
};

// sums += a b, with A as rows g and g + 8 by the k of `Factor`: {(g, 2 q), (g, 2 q + 1), (g + 8, 2 q), (g + 8, 2 q + 1)}.
__device__ inline void add_product(float (&sums)[4], const float (&a)[4], const Factor& b) {
  const Parts a0(a[0]), a1(a[2]), a2(a[1]), a3(a[3]);
  float d[4] = {};
  mma_tf32(d, a0.low, a1.low, a2.low, a3.low, {b.first.high, b.second.high});
  mma_tf32(d, a0.high, a1.high, a2.high, a3.high, {b.first.low, b.second.low});
  mma_tf32(d, a0.high, a1.high, a2.high, a3.high, {b.first.high, b.second.high});
#pragma unroll
  for (int e = 0; e < 4; ++e) sums[e] += d[e];
}

// A lane's part of 16 channels of a stream in phi: the columns 2 q and 2 q + 1 of every octet, of its first channel and
// of its second.
struct PhiFragment {
  float octets[kOctets][4];

  // From its first number on, if they are there; else zeros.
  __device__ void load(const float* first, bool exist) {
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float* at = first + c * kColumns + octet * 8;
        const float2 v = exist ? *reinterpret_cast<const float2*>(at) : float2{};
        octets[octet][2 * c] = v.x, octets[octet][2 * c + 1] = v.y;
      }
    }
  }
  __device__ void write(u32 at) const {
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
      const float (&v)[4] = octets[octet];
      write_float4(at + octet * 512, {v[0], v[1], v[2], v[3]});
    }
  }
};

// The first of this thread's two channels in a turn, which may lie behind the last. Asks for its place, so that it need
// not be kept in registers meanwhile.
__device__ inline int channel_at(int turn) {
  const u32 thread = thread_id();
  const int unit = turn * kMainWarps + thread / 32;
  return cluster_rank() * SIZE + unit * 16 + thread % 32 / 4 * 2;
}

// Where this thread's numbers of fragment f of phi or d_phi begin, if they are there, in streams of so many channels; asks
// for its place, too.
__device__ inline int fragment_at(int f, int hidden) {
  return (f % N * hidden + channel_at(f / N)) * kColumns + thread_id() % 4 * 2;
}

// Numbers of a stream in a swizzled box: those of this thread's first channel and of its second, of two tokens each, the
// first of which is even. Their rows are neighbours.
__device__ inline u32 other_row(u32 at) { return (at ^ 16) + kRowBytes; }
__device__ inline void sort_own(float (&v)[4], uint2 even, uint2 odd) {
  v[0] = __uint_as_float(even.x), v[1] = __uint_as_float(odd.x);
  v[2] = __uint_as_float(even.y), v[3] = __uint_as_float(odd.y);
}
__device__ inline void read_own(float (&v)[4], u32 at) {
  const uint2 even = read2(at), odd = read2(other_row(at));
  sort_own(v, even, odd);
}
__device__ inline void write_own(u32 at, const float (&v)[4]) {
  write2(at, {__float_as_uint(v[0]), __float_as_uint(v[2])});
  write2(other_row(at), {__float_as_uint(v[1]), __float_as_uint(v[3])});
}
