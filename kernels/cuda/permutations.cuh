// Weighted means of the permutation matrices of few streams, and their gradient:
//
//   H_res = sum over p of w_p P_p      w = softmax(z)      P_p[i, p[i]] = 1
//
// Permutations are in lexicographic order, the identity first. A matrix has four neighbouring lanes: each has
// all weights, and writes a part of the results.

#pragma once

#include "coefficients.cuh"

// n!
template <int N>
constexpr int kFactorial = N * kFactorial<N - 1>;
template <>
constexpr int kFactorial<1> = 1;

// Lanes of a matrix, and the most streams.
constexpr int kPermutedLanes = 4;

template <int N>
struct Permutations {
  static constexpr int kNumber = kFactorial<N>;

  // All p[i] of a permutation, four bits each, the first the lowest.
  __device__ static constexpr int images(int p) {
    int result = 0;
    int left = 0x3210;  // the streams that are left, in ascending order
    int number = kNumber;
    for (int i = 0; i < N; ++i) {
      number /= N - i;
      const int at = p / number % (N - i) * 4;
      result |= (left >> at & 15) << 4 * i;
      left = (left & ((1 << at) - 1)) | left >> (at + 4) << at;
    }
    return result;
  }

  // Calls `use(p, images)` for every permutation; both are known to the compiler.
  template <int P = 0, class Use>
  __device__ __forceinline__ static void for_each(Use use) {
    if constexpr (P < kNumber) {
      constexpr int kImages = images(P);
      use(P, kImages);
      for_each<P + 1>(use);
    }
  }

  // w[p] = e^(z[p] - max); returns 1 / (sum of w).
  __device__ static float softmax(const float* z, float (&w)[kNumber]) {
    float largest = z[0];
#pragma unroll
    for (int p = 1; p < kNumber; ++p) largest = fmaxf(largest, z[p]);
    float sum = 0.f;
#pragma unroll
    for (int p = 0; p < kNumber; ++p) {
      w[p] = expf(z[p] - largest);
      sum += w[p];
    }
    return reciprocal(sum);
  }

  // h_res [N, N] from z [kNumber]; the lane has its column.
  __device__ static void forward(const float* z, float* h_res, int lane) {
    float w[kNumber], h[N] = {};
    const float scale = softmax(z, w);
    for_each([&](int p, int images) {
#pragma unroll
      for (int i = 0; i < N; ++i) h[i] += (images >> 4 * i & 15) == lane ? w[p] : 0.f;
    });
    if (lane >= N) return;
#pragma unroll
    for (int i = 0; i < N; ++i) h_res[i * N + lane] = scale * h[i];
  }

  // dL/dz takes the place of z [kNumber], which all lanes of the matrix have written before; d_h is dL/dH_res.
  // By a whole warp.
  //
  // dL/dw_p is the sum over i of d_h[i, p[i]], and dL/dz = w (dL/dw - <w, dL/dw>).
  __device__ static void backward(float* z, const float* d_h_res, int lane) {
    float w[kNumber], d_h[N][N];
    const float scale = softmax(z, w);
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll
      for (int j = 0; j < N; ++j) d_h[i][j] = d_h_res[i * N + j];
    }
    const auto d_w = [&](int images) {
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < N; ++i) sum += d_h[i][images >> 4 * i & 15];
      return sum;
    };
    float dot = 0.f;
    for_each([&](int p, int images) { dot += w[p] * d_w(images); });
    dot *= scale;
    __syncwarp();  // no lane needs z any more
    for_each([&](int p, int images) {
      if (p % kPermutedLanes == lane) z[p] = scale * w[p] * (d_w(images) - dot);
    });
  }
};

// H_res and dL/dz of n streams, up to 4; see `Permutations`.
__device__ inline void mix_permutations(int n, const float* z, float* h_res, int lane) {
  switch (n) {
    case 1: return Permutations<1>::forward(z, h_res, lane);
    case 2: return Permutations<2>::forward(z, h_res, lane);
    case 3: return Permutations<3>::forward(z, h_res, lane);
    case 4: return Permutations<4>::forward(z, h_res, lane);
  }
}

__device__ inline void mix_permutations_bwd(int n, float* z, const float* d_h_res, int lane) {
  switch (n) {
    case 1: return Permutations<1>::backward(z, d_h_res, lane);
    case 2: return Permutations<2>::backward(z, d_h_res, lane);
    case 3: return Permutations<3>::backward(z, d_h_res, lane);
    case 4: return Permutations<4>::backward(z, d_h_res, lane);
  }
}
