// Common parts of the kernels of one stream: a persistent block has whole tokens in shared memory, so that it reads them
// once and needs no other block.
//
// A block takes tiles of a few tokens in turn. A tile is a piece of each operand as it lies in memory, which the copy
// engine brings to a slot of a ring, some tiles ahead. A thread has 16 bytes of channels of every token and adds up their
// part of the token's sums. All warps meet when these are there, and go on with their channels. Whoever is behind that
// barrier has done with the tile before, whose slot is free then. What there is to do for a token and not for channels
// the last warp does alone; the first one has the copies to order.

#pragma once

#include "math/coefficients.cuh"
#include "one_pass/one_pass.cuh"

// Channels of 16 bytes, those of a thread.
constexpr int V = kUnitChannels;
// Columns of phi for H_res of one stream, at most; `identity` has two.
constexpr int kMostColumns = 3;

// A block's shared memory: a line of barriers, a line for each warp with sums of two tiles (`Partials`), their number
// rounded up to a multiple of 4, what a kernel wants besides, and the slots.
constexpr u32 kLineBytes = 128;

// ---- tiles ----------------------------------------------------------------------------------------

// The block's tiles of TOKENS tokens, of so many arrays of the streams' dtype, of which some may be null. Behind their
// rows a slot has a line of numbers of its tokens, kLineBytes / TOKENS for each; HAS_NUMBERS: whether there are any.
template <int ARRAYS, int TOKENS, bool HAS_NUMBERS>
struct Tiles {
  // Arrivals at a slot's barrier: of who announces the bytes, and of the lanes that copy numbers.
  static constexpr u32 kArrivals = HAS_NUMBERS ? 33 : 1;
  static constexpr int kLanes = 32 / TOKENS;

  const Stream* arrays[ARRAYS];
  int tokens, hidden, stages;
  u32 barriers, slots;

  __device__ u32 row_bytes() const { return hidden * u32(sizeof(Stream)); }
  __device__ int num() const { return (tokens + TOKENS - 1) / TOKENS; }
  __device__ u32 barrier(int slot) const { return barriers + 8 * slot; }
  // A token's row of an array in a slot, and its numbers.
  __device__ u32 row(int slot, int array, int token) const {
    const u32 bytes = ARRAYS * TOKENS * row_bytes() + kLineBytes;
    return slots + slot * bytes + (array * TOKENS + token) * row_bytes();
  }
  __device__ u32 numbers(int slot, int token) const {
    return row(slot, ARRAYS, 0) + token * kLanes * 4;
  }

  // The ring's barriers, by all threads, before the first tile; a barrier of the block.
  __device__ void start() const {
    if (threadIdx.x == 0) {
      for (int slot = 0; slot < stages; ++slot) init_barrier(barrier(slot), kArrivals);
      publish_barriers();
    }
    __syncthreads();
  }

  // The order to bring a tile to a slot, by one whole warp; none behind the last tile. number(token, i): the i-th number
  // of a token, or null where it has none.
  template <class Number>
  __device__ void fetch(int tile, int slot, Number number) const {
    if (tile >= num()) return;
    const int lane = threadIdx.x % 32, first = tile * TOKENS, here = min(TOKENS, tokens - first);
    if (lane == 0) {
      const u32 bytes = here * row_bytes();
      u32 expected = 0;
#pragma unroll
      for (int array = 0; array < ARRAYS; ++array) expected += arrays[array] ? bytes : 0;
      arrive_and_expect(barrier(slot), expected);
#pragma unroll
      for (int array = 0; array < ARRAYS; ++array) {
        if (!arrays[array]) continue;
        const Stream* from = arrays[array] + (long long)first * hidden;
        copy_in(row(slot, array, 0), from, bytes, barrier(slot));
      }
    }
    if constexpr (HAS_NUMBERS) {
      const int token = lane / kLanes;
      const float* from = token < here ? number(first + token, lane % kLanes) : nullptr;
      if (from) copy_word_async(__cvta_shared_to_generic(numbers(slot, 0) + lane * 4), from);
      arrive_behind_copies(barrier(slot));
    }
  }
};

// The thread's channels of a row, `own` bytes behind its start; zeros where it has none.
__device__ inline Pack<Stream, V> channels_of(u32 row, u32 own, bool exists) {
  const uint4 words = exists ? read4(row + own) : uint4{};
  return {words.x, words.y, words.z, words.w};
}
__device__ inline void store(const Pack<Stream, V>& pack, Stream* to) {
  *reinterpret_cast<uint4*>(to) = {pack.words[0], pack.words[1], pack.words[2], pack.words[3]};
}

// X' = H_res X + h_post y, rounded.
__device__ inline Pack<Stream, V> new_stream(const Pack<Stream, V>& x, const Pack<Stream, V>& y,
                                             float h_res, float h_post) {
  float values[V];
#pragma unroll
  for (int v = 0; v < V; ++v) values[v] = fmaf(h_res, x[v], h_post * y[v]);
  Pack<Stream, V> result;
  result.set(values);
  return result;
}

// ---- sums over a block ----------------------------------------------------------------------------

template <int HALF, int NUM>
__device__ inline void halve_to_one(float (&values)[NUM], int lane) {
  if constexpr (HALF > 0) {
    halve<HALF>(values, lane);
    halve_to_one<HALF / 2>(values, lane);
  }
}

// Sums of NUM values each over the threads of a block, for each of two tiles in turn: of a warp by `add`, then, behind
// a barrier of the block, of all warps by `total`. NUM is a power of two. A value's sums of all warps lie side by side.
template <int NUM>
struct Partials {
  // Lanes that share a value, with four warps each at once.
  static constexpr int kLanes = 32 / NUM;
  // Bytes for each of a block's warps, whose number is rounded up to a multiple of 4.
  static constexpr u32 kWarpBytes = 2 * NUM * 4;

  u32 start;

  __device__ static u32 warps() { return (blockDim.x / 32 + 3) / 4 * 4; }
  __device__ u32 at(int turn, int value) const {
    return start + (turn * NUM + value) * warps() * 4;
  }

  // Zeros for warps that there are not, by all threads, before a barrier and `add`.
  __device__ void clear() const {
    for (u32 i = threadIdx.x; i < 2 * NUM * warps(); i += blockDim.x)
      write_float(start + i * 4, 0.f);
  }

  // The warp's sums of SOME of them, from the `first` on; the values are changed.
  template <int SOME>
  __device__ void add(float (&values)[SOME], int turn, int first = 0) const {
    const int lane = threadIdx.x % 32;
    halve_to_one<SOME / 2>(values, lane);
    float sum = values[0];
#pragma unroll
    for (int step = SOME; step < 32; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    if (lane < SOME) write_float(at(turn, first + lane) + threadIdx.x / 32 * 4, sum);
  }

  // The sum of one value, in every lane.
  __device__ float total(int turn, int value) const {
    float sum = 0.f;
#pragma unroll 1
    for (u32 warp = 0; warp < warps(); warp += 4) {
      const float4 v = read_float4(at(turn, value) + warp * 4);
      sum += (v.x + v.y) + (v.z + v.w);
    }
    return sum;
  }

  // All sums at once: lane l gets that of value l / kLanes.
  __device__ float total(int turn) const {
    const u32 lane = threadIdx.x % 32, from = at(turn, lane / kLanes);
    float sum = 0.f;
#pragma unroll 1
    for (u32 warp = lane % kLanes * 4; warp < warps(); warp += kLanes * 4) {
      const float4 v = read_float4(from + warp * 4);
      sum += (v.x + v.y) + (v.z + v.w);
    }
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    return sum;
  }
};

// ---- H_res of one stream --------------------------------------------------------------------------

// Whether H_res is the same for all logits, as it is where a matrix of one element is normalised.
__device__ inline bool is_normalised(const Settings& settings) {
  return settings.constraint == Constraint::kPermutations ||
         (settings.constraint == Constraint::kBirkhoff && settings.sinkhorn_iters > 0);
}
