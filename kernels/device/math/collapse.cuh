// V channels of the sum over the streams of a token, u = sum over i of h[i] X[i], and of its gradient.

#pragma once

#include "base/streams.cuh"

// X, and u of it. row: all streams of the token, which 32 bits can count; with offsets of 32 bits norm_bwd would
// spill registers on sm_120.
template <bool ALIGNED, int N, int V>
__device__ inline void collapse(const Stream* row, const float (&h)[N], int n, int hidden, int at,
                                Pack<Stream, V> (&pack)[N], float (&u)[V]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < n) load<ALIGNED>(pack[i], row + (long long)i * hidden, at, hidden);
  }
#pragma unroll
  for (int v = 0; v < V; ++v) u[v] = 0.f;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i >= n) break;
#pragma unroll
    for (int v = 0; v < V; ++v) u[v] += h[i] * pack[i][v];
  }
}

template <bool ALIGNED, int N, int V>
__device__ inline void collapse(const Stream* row, const float (&h)[N], int n, int hidden, int at,
                                float (&u)[V]) {
  Pack<Stream, V> pack[N];
  collapse<ALIGNED>(row, h, n, hidden, at, pack, u);
}

// dots[i] += <d_u, X[i]>
template <bool ALIGNED, int V, int N>
__device__ inline void add_dots(const Stream* row, const Stream* d_u, int n, int hidden, int at,
                                float (&dots)[N]) {
  Pack<Stream, V> d_u_pack, pack[N];
  load_row<ALIGNED>(d_u_pack, d_u, hidden, at);
  load_rows<ALIGNED>(pack, row, n, hidden, at);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i >= n) break;
#pragma unroll
    for (int v = 0; v < V; ++v) dots[i] += d_u_pack[v] * pack[i][v];
  }
}
