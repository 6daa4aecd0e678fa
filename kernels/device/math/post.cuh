// V channels of post, X'[i] = sum over j of H_res[i, j] X[j] + h_post[i] y, and of its gradients; where a thread finds
// its channels; sums over a block.

#pragma once

#include "base/streams.cuh"

// Channels that a thread takes at once: 16 bytes, less where there are many streams. Where a block adds up sums over
// a token's channels, there are registers for less.
template <int N>
constexpr int kThreadChannels = (N <= 8 ? 16 : 8) / int(sizeof(Stream));
template <int N>
constexpr int kTokenChannels = (N <= 4 ? 16 : 8) / int(sizeof(Stream));

// V channels of a token from `at` on, for each thread of a grid: threads of a slab of tokens, slabs. Within a slab 32
// bits can count. A thread without a token has none of the channels of the first one.
template <int V, int THREADS>
struct Item {
  long long token;
  int at;
  bool exists;

  __device__ Item(int tokens, int slab, int hidden) {
    const u32 items = (hidden + V - 1) / V;
    const u32 item = blockIdx.x * THREADS + threadIdx.x;
    const int token_of_slab = item / items;
    token = (long long)blockIdx.y * slab + token_of_slab;
    at = item % items * V;
    exists = token_of_slab < slab && token < tokens;
    if (exists) return;
    token = 0;
    at = hidden;
  }
};

// Stores X', and calls `use(i, X'[i])` with it as it is rounded. Pointers are those of the token. Where rows are not
// aligned all lanes of a warp have to be here.
template <bool ALIGNED, int N, int V, class Use>
__device__ inline void post(const Stream* x, const Stream* y, const float* h_post,
                            const float* h_res, Stream* x_new, int n, int hidden, int at, Use use) {
  Pack<Stream, V> xs[N], ys;
  load_rows<ALIGNED>(xs, x, n, hidden, at);
  load_row<ALIGNED>(ys, y, hidden, at);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i >= n) break;
    float sums[V];
#pragma unroll
    for (int v = 0; v < V; ++v) sums[v] = h_post[i] * ys[v];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (j >= n) break;
#pragma unroll
      for (int v = 0; v < V; ++v) sums[v] += h_res[i * n + j] * xs[j][v];
    }
    Pack<Stream, V> result;
    result.set(sums);
    store_together<ALIGNED>(result, x_new + (long long)i * hidden, at, hidden);
    use(i, result);
  }
}

// Stream j of H_res^T G.
template <int N, int V>
__device__ inline void mix(const Pack<Stream, V> (&gs)[N], const float* h_res, int n, int j,
                           float (&mixed)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) mixed[v] = 0.f;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i >= n) break;
#pragma unroll
    for (int v = 0; v < V; ++v) mixed[v] += h_res[i * n + j] * gs[i][v];
  }
}

// ---- sums over a block --------------------------------------------------------------------------

// Writes the sums of each warp to its column of `shared`.
template <int COUNT, int WARPS>
__device__ inline void reduce(const float (&sums)[COUNT], float (*shared)[WARPS]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int first = 0; first < COUNT; first += 32) {
    float values[32];
#pragma unroll
    for (int v = 0; v < 32; ++v) values[v] = first + v < COUNT ? sums[first + v] : 0.f;
    const float sum = warp_sums(values, lane);
    if (first + lane < COUNT) shared[first + lane][warp] = sum;
  }
}

// A row of that over the warps, of which a block may have fewer.
template <int WARPS>
__device__ inline float total(const float (&warps)[WARPS]) {
  float sum = 0.f;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) sum += w < blockDim.x / 32 ? warps[w] : 0.f;
  return sum;
}
