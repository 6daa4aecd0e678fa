// Projection onto the doubly stochastic matrices by Sinkhorn-Knopp (equation 9) and its gradient.
//
// A matrix lies in LANES neighbouring lanes of a warp, LANES a power of two that divides N; n <= N of its
// groups are active. The axis that is normalised first lies within a lane: lane l of N holds column l of M (row
// l where rows come first), and with fewer lanes each holds N / LANES columns. Sums over the first axis stay in
// a lane; sums over the second go over the lanes. The iterations are one chain of waits: LANES = N has more
// matrices in flight a warp, LANES = 1 no exchanges between lanes.
//
// docs/mathematics.md has the definition that covers all published variants.

#pragma once

#include "base/common.cuh"

// What rounding takes from a - b, exactly (Knuth), up to 64: where it is more, numbers of the size of a - b
// differ by more than 64. Where a - b is infinite, it is a number too.
__device__ inline float rounded_off(float a, float b) {
  const float difference = a - b, less = difference - a;
  const float lost = (a - (difference - less)) - (b + less);
  return fminf(fmaxf(lost, -64.f), 64.f);
}

template <int N, int LANES = N>
struct Sinkhorn {
  // Columns of a lane.
  static constexpr int kOwn = N / LANES;
  using Matrix = float[kOwn][N];

  const Settings& settings;
  int n;
  int lane;  // of the matrix

  __device__ int column(int k) const { return lane * kOwn + k; }
  __device__ bool active(int k, int i) const { return i < n && column(k) < n; }

  // Where z[k][i] of this lane lies in the row-major matrix.
  __device__ int at(int k, int i) const {
    return settings.row_first ? column(k) * n + i : i * n + column(k);
  }

  // Calls `use(k, i)` for every element of this lane.
  template <class Use>
  __device__ static void for_each(Use use) {
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
#pragma unroll
      for (int i = 0; i < N; ++i) use(k, i);
    }
  }

  // In pairs of pairs: half as long a chain as one after the other.
  template <class Combine>
  __device__ static float combined(const float (&v)[N], Combine combine) {
    float rest[N];
#pragma unroll
    for (int i = 0; i < N; ++i) rest[i] = v[i];
#pragma unroll
    for (int step = 1; step < N; step *= 2) {
#pragma unroll
      for (int i = 0; i + step < N; i += 2 * step) rest[i] = combine(rest[i], rest[i + step]);
    }
    return rest[0];
  }
  __device__ static float sum(const float (&v)[N]) {
    return combined(v, [](float a, float b) { return a + b; });
  }

  // result[i] = all m[k][i] of the matrix, combined.
  template <class Combine>
  __device__ static void over_lanes(const Matrix& m, float (&result)[N], Combine combine) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float own[N];
#pragma unroll
      for (int k = 0; k < kOwn; ++k) own[k] = m[k][i];
#pragma unroll
      for (int step = 1; step < kOwn; step *= 2) {
#pragma unroll
        for (int k = 0; k + step < kOwn; k += 2 * step) own[k] = combine(own[k], own[k + step]);
      }
      result[i] = own[0];
    }
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        result[i] = combine(result[i], __shfl_xor_sync(kAllLanes, result[i], step));
      }
    }
  }
  __device__ static void sums_over_lanes(const Matrix& m, float (&sums)[N]) {
    over_lanes(m, sums, [](float a, float b) { return a + b; });
  }

  // What a group with this sum is divided by; negative where eps took the place of the sum, through which
  // no gradient goes then.
  __device__ float divisor(float sum) const {
    // No branch: the iterations are a chain of waits, and a branch would be one more.
    const float least = settings.clamp ? settings.sinkhorn_eps : 0.f;
    const float d = sum + (settings.clamp ? 0.f : settings.sinkhorn_eps);
    return d < least ? -least : d;
  }

  // 1 / |divisor(sum)|, a link of that chain: without the cases of `reciprocal`, as no sum is large, and one so
  // small that it has lost its digits counts as the smallest that has them all.
  __device__ float scale_of(float sum) const {
    constexpr float kSmallest = 1.17549435e-38f;
    const float clamp = settings.clamp, eps = settings.sinkhorn_eps;
    return approximate_reciprocal_of_normal(
        fmaxf(sum + (1.f - clamp) * eps, fmaxf(clamp * eps, kSmallest)));
  }

  // M after the first half step: softmax over the first axis.
  __device__ void softmax(const Matrix& z, Matrix& m, float (&largest)[kOwn],
                          float (&scale)[kOwn]) const {
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      largest[k] = z[k][0];
#pragma unroll
      for (int i = 1; i < N; ++i) largest[k] = i < n ? fmaxf(largest[k], z[k][i]) : largest[k];
#pragma unroll
      for (int i = 0; i < N; ++i) m[k][i] = active(k, i) ? expf(z[k][i] - largest[k]) : 0.f;
      scale[k] = column(k) < n ? reciprocal(sum(m[k])) : 1.f;
#pragma unroll
      for (int i = 0; i < N; ++i) m[k][i] *= scale[k];
    }
  }

  // M <- M / sum over the first axis. d: the divisors.
  __device__ void normalise_first(Matrix& m, float (&d)[kOwn]) const {
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      const float total = sum(m[k]), scale = scale_of(total);
      d[k] = column(k) < n ? divisor(total) : 1.f;
#pragma unroll
      for (int i = 0; i < N; ++i) m[k][i] *= scale;
    }
  }

  // M <- M / sum over the second axis. d: the divisors of the groups of this lane's numbers.
  __device__ void normalise_second(Matrix& m, float (&d)[kOwn]) const {
    float sums[N];
    sums_over_lanes(m, sums);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float d_i = i < n ? divisor(sums[i]) : 1.f, scale = scale_of(sums[i]);
#pragma unroll
      for (int k = 0; k < kOwn; ++k) {
        m[k][i] *= scale;
        if (column(k) == i) d[k] = d_i;
      }
    }
  }

  // m <- project(z). Records the divisors of the half steps 1, 2, ... for `backward`, kOwn a step, at every
  // stride-th place of history, unless that is null.
  __device__ void forward(const Matrix& z, Matrix& m, float* history, int stride) const {
    if (settings.sinkhorn_iters == 0) {
      for_each([&](int k, int i) { m[k][i] = active(k, i) ? expf(z[k][i]) : 0.f; });
      return;
    }
    const auto record = [&](int step, const float (&d)[kOwn]) {
      if (!history) return;
#pragma unroll
      for (int k = 0; k < kOwn; ++k) history[(step * kOwn + k) * stride] = d[k];
    };
    float largest[kOwn], scale[kOwn];
    softmax(z, m, largest, scale);
    if (settings.sinkhorn_eps == 0.f) {
      // A whole group of the second axis may have vanished. Start again from the logits: here a group's
      // largest element is scaled to about 1 before anything is rounded away.
      Matrix shifted;
      for_each([&](int k, int i) {
        shifted[k][i] = active(k, i) ? z[k][i] - largest[k] : __uint_as_float(0xff800000);
      });
      float shift[N];
      over_lanes(shifted, shift, [](float a, float b) { return fmaxf(a, b); });
      for_each([&](int k, int i) {
        const float log = z[k][i] - largest[k] - shift[i] + rounded_off(z[k][i], largest[k]);
        m[k][i] = active(k, i) ? expf(log) * scale[k] : 0.f;
      });
    } else if (!settings.clamp) {
      for_each(
          [&](int k, int i) { m[k][i] = active(k, i) ? m[k][i] + settings.sinkhorn_eps : 0.f; });
    }
    float d[kOwn];
    normalise_second(m, d);
    record(1, d);
    for (int iter = 1; iter < settings.sinkhorn_iters; ++iter) {
      normalise_first(m, d);
      record(2 * iter, d);
      normalise_second(m, d);
      record(2 * iter + 1, d);
    }
  }

  // g holds dL/dM and becomes dL/dz; m and history are what `forward` left.
  //
  // In log space each half step is G <- G - M * (sum of G over the axis), with M its result. The M of
  // the half step before is M times the divisor.
  __device__ void backward(const Matrix& z, Matrix& m, Matrix& g, const float* history,
                           int stride) const {
    for_each([&](int k, int i) { g[k][i] = active(k, i) ? g[k][i] * m[k][i] : 0.f; });
    if (settings.sinkhorn_iters == 0) return;
    for (int step = 2 * settings.sinkhorn_iters - 1; step > 0; --step) {
      float own[kOwn];
#pragma unroll
      for (int k = 0; k < kOwn; ++k) own[k] = history[(step * kOwn + k) * stride];
      if (step % 2 == 1) {
        float sums[N];
        sums_over_lanes(g, sums);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float d =
              LANES == 1 ? own[i % kOwn] : __shfl_sync(kAllLanes, own[i % kOwn], i / kOwn, LANES);
          const float taken = d >= 0.f || !settings.clamp ? sums[i] : 0.f;
#pragma unroll
          for (int k = 0; k < kOwn; ++k) {
            g[k][i] -= m[k][i] * taken;
            m[k][i] *= fabsf(d);
          }
        }
      } else {
#pragma unroll
        for (int k = 0; k < kOwn; ++k) {
          const float taken = own[k] >= 0.f || !settings.clamp ? sum(g[k]) : 0.f;
#pragma unroll
          for (int i = 0; i < N; ++i) {
            g[k][i] -= m[k][i] * taken;
            m[k][i] *= fabsf(own[k]);
          }
        }
      }
    }
    float largest[kOwn], scale[kOwn];
    softmax(z, m, largest, scale);
    if (settings.sinkhorn_eps != 0.f && !settings.clamp) {
      for_each([&](int k, int i) {
        if (active(k, i)) g[k][i] *= m[k][i] * reciprocal(m[k][i] + settings.sinkhorn_eps);
      });
    }
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      const float taken = sum(g[k]);
#pragma unroll
      for (int i = 0; i < N; ++i) g[k][i] -= m[k][i] * taken;
    }
  }
};
