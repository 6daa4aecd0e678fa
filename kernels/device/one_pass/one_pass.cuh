// What the one-pass kernels share: persistent clusters of thread blocks, with the streams in shared memory.
//
// A cluster takes tiles of kTileTokens tokens in turn. Its block of rank b owns the channels
// [b * SIZE, (b + 1) * SIZE) of all N streams, so that it can project its slice of X and use it again while it
// is on the chip; the projections' partial sums meet through distributed shared memory. X is read from memory
// once.
//
// Blocks are pipelines of warps with different tasks. Whatever goes from one to another goes through a
// ring of buffers with a barrier for `full` and one for `empty`:
//
//   copies in      from memory to shared memory by the copy engine (TMA), a whole tile at once
//   exchange       partial sums to the block that owns the token (`send`), its reply to all blocks
//   copies out     results, by the copy engine or by plain stores
//
// base/ptx.cuh has the instructions for this. Wants sm_90a or a later architecture with the same suffix (setmaxnreg).

#pragma once

#include "base/matrix.cuh"

constexpr u32 kTileTokens = 8;
// One row of a copied box, what the copy engine swizzles, and its channels.
constexpr u32 kRowBytes = 128;
constexpr int kBoxChannels = kRowBytes / sizeof(Stream);

// ---- shared memory ----------------------------------------------------------------------------------

// Addresses of shared memory are 32 bits wide, as the instructions want them.
__device__ inline u32 shared_address(const void* pointer) {
  return u32(__cvta_generic_to_shared(pointer));
}

__device__ inline float4 read_float4(u32 at) {
  const uint4 v = read4(at);
  return {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
}
__device__ inline float read_float(u32 at) { return __uint_as_float(read1(at)); }
__device__ inline void read_floats(float (&values)[4], u32 at) {
  const float4 v = read_float4(at);
  values[0] = v.x, values[1] = v.y, values[2] = v.z, values[3] = v.w;
}
__device__ inline void read_floats(float (&values)[2], u32 at) {
  const uint2 v = read2(at);
  values[0] = __uint_as_float(v.x), values[1] = __uint_as_float(v.y);
}
__device__ inline void write_float4(u32 at, float4 v) {
  write4(at,
         {__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w)});
}
__device__ inline void write_float(u32 at, float v) { write1(at, __float_as_uint(v)); }

// Where the 16 bytes `unit` (of 8) of row `row` lie, both within a swizzled box whose start is a multiple of
// 1024 bytes.
__device__ inline u32 swizzled(u32 row, u32 unit) {
  return row * kRowBytes + ((unit ^ (row & 7)) << 4);
}

// ---- rings of buffers ---------------------------------------------------------------------------------

// Slot and parity of a ring of SLOTS buffers; the parity is that of the `full` barrier of this use, and
// its opposite the one of `empty`.
template <int SLOTS>
struct Ring {
  u32 slot = 0, parity = 0;
  __device__ void next() {
    if (++slot == SLOTS) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// ---- clusters ----------------------------------------------------------------------------------------

// The start of a block, by all threads: its barriers are there. Each waits with `cluster_wait` for those of the others
// before it sends anything.
__device__ inline void start_cluster() {
  __syncthreads();
  cluster_arrive();
}
// The end of a block that others may still send to: its shared memory stays until all of them are here.
__device__ inline void end_cluster() {
  __syncwarp();
  cluster_arrive();
  cluster_wait();
}
