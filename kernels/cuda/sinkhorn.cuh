// Projection onto the doubly stochastic matrices by Sinkhorn-Knopp (equation 9) and its gradient.
//
// A matrix lies in N neighbouring lanes of a warp, N a power of two; n <= N of them are active. The axis
// that is normalised first lies within a lane: lane l holds column l of M (row l where rows come first).
// Sums over the first axis stay in a lane; sums over the second go over the lanes.
//
// docs/architecture.md has the definition that covers all published variants.

#pragma once

#include "common.cuh"

template <int N>
struct Sinkhorn {
  const Settings& settings;
  int n;
  int lane;  // of the matrix

  __device__ bool active(int i) const { return i < n && lane < n; }

  // Where z[i] of this lane lies in the row-major matrix.
  __device__ int at(int i) const { return settings.row_first ? lane * n + i : i * n + lane; }

  __device__ static float sum_in_lane(const float (&m)[N]) {
    float sum = m[0];
#pragma unroll
    for (int i = 1; i < N; ++i) sum += m[i];
    return sum;
  }

  __device__ static void sums_over_lanes(float (&sums)[N]) {
#pragma unroll
    for (int step = 1; step < N; step *= 2) {
#pragma unroll
      for (int i = 0; i < N; ++i) sums[i] += __shfl_xor_sync(kAllLanes, sums[i], step);
    }
  }

  // What a group with this sum is divided by; negative where eps took the place of the sum, through which
  // no gradient goes then.
  __device__ float divisor(float sum) const {
    if (settings.clamp) return sum < settings.sinkhorn_eps ? -settings.sinkhorn_eps : sum;
    return sum + settings.sinkhorn_eps;
  }

  // M after the first half step: softmax over the first axis. `largest` and `scale` are this lane's.
  __device__ void softmax(const float (&z)[N], float (&m)[N], float& largest, float& scale) const {
    largest = z[0];
#pragma unroll
    for (int i = 1; i < N; ++i) largest = i < n ? fmaxf(largest, z[i]) : largest;
#pragma unroll
    for (int i = 0; i < N; ++i) m[i] = active(i) ? expf(z[i] - largest) : 0.f;
    scale = lane < n ? reciprocal(sum_in_lane(m)) : 1.f;
#pragma unroll
    for (int i = 0; i < N; ++i) m[i] *= scale;
  }

  // M <- M / sum over the first axis. Returns the divisor.
  __device__ float normalise_first(float (&m)[N]) const {
    const float d = lane < n ? divisor(sum_in_lane(m)) : 1.f;
    const float scale = reciprocal(fabsf(d));
#pragma unroll
    for (int i = 0; i < N; ++i) m[i] *= scale;
    return d;
  }

  // M <- M / sum over the second axis. Lane l returns the divisor of group l.
  __device__ float normalise_second(float (&m)[N]) const {
    float sums[N];
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i] = m[i];
    sums_over_lanes(sums);
    float own = 1.f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float d = i < n ? divisor(sums[i]) : 1.f;
      m[i] *= reciprocal(fabsf(d));
      own = lane == i ? d : own;
    }
    return own;
  }

  // m <- project(z). Records the divisors of the half steps 1, 2, ... at history[step * stride] for
  // `backward`, unless history is null.
  __device__ void forward(const float (&z)[N], float (&m)[N], float* history, int stride) const {
    if (settings.sinkhorn_iters == 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) m[i] = active(i) ? expf(z[i]) : 0.f;
      return;
    }
    float largest, scale;
    softmax(z, m, largest, scale);
    if (settings.sinkhorn_eps == 0.f) {
      // A whole group of the second axis may have vanished. Start again from the logits: here a group's
      // largest element is scaled to 1 before anything is rounded away.
      float shift[N];
#pragma unroll
      for (int i = 0; i < N; ++i) shift[i] = active(i) ? z[i] - largest : __uint_as_float(0xff800000);
#pragma unroll
      for (int step = 1; step < N; step *= 2) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          shift[i] = fmaxf(shift[i], __shfl_xor_sync(kAllLanes, shift[i], step));
        }
      }
#pragma unroll
      for (int i = 0; i < N; ++i) m[i] = active(i) ? expf(z[i] - largest - shift[i]) * scale : 0.f;
    } else if (!settings.clamp) {
#pragma unroll
      for (int i = 0; i < N; ++i) m[i] = active(i) ? m[i] + settings.sinkhorn_eps : 0.f;
    }
    float d = normalise_second(m);
    if (history) history[stride] = d;
    for (int iter = 1; iter < settings.sinkhorn_iters; ++iter) {
      d = normalise_first(m);
      if (history) history[2 * iter * stride] = d;
      d = normalise_second(m);
      if (history) history[(2 * iter + 1) * stride] = d;
    }
  }

  // g holds dL/dM and becomes dL/dz; m and history are what `forward` left.
  //
  // In log space each half step is G <- G - M * (sum of G over the axis), with M its result. The M of
  // the half step before is M times the divisor.
  __device__ void backward(const float (&z)[N], float (&m)[N], float (&g)[N], const float* history,
                           int stride) const {
#pragma unroll
    for (int i = 0; i < N; ++i) g[i] = active(i) ? g[i] * m[i] : 0.f;
    if (settings.sinkhorn_iters == 0) return;
    for (int step = 2 * settings.sinkhorn_iters - 1; step > 0; --step) {
      const float own = history[step * stride];
      if (step % 2 == 1) {
        float sums[N];
#pragma unroll
        for (int i = 0; i < N; ++i) sums[i] = g[i];
        sums_over_lanes(sums);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float d = __shfl_sync(kAllLanes, own, i, N);
          if (d >= 0.f || !settings.clamp) g[i] -= m[i] * sums[i];
          m[i] *= fabsf(d);
        }
      } else {
        const float sum = sum_in_lane(g);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          if (own >= 0.f || !settings.clamp) g[i] -= m[i] * sum;
          m[i] *= fabsf(own);
        }
      }
    }
    float largest, scale;
    softmax(z, m, largest, scale);
    if (settings.sinkhorn_eps != 0.f && !settings.clamp) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (active(i)) g[i] *= m[i] * reciprocal(m[i] + settings.sinkhorn_eps);
      }
    }
    const float sum = sum_in_lane(g);
#pragma unroll
    for (int i = 0; i < N; ++i) g[i] -= m[i] * sum;
  }
};
