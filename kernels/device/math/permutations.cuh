// Weighted means of the permutation matrices of few streams, and their gradient:
//
//   H_res = sum over p of w_p P_p      w = softmax(z)      P_p[i, p[i]] = 1
//
// Permutations are in lexicographic order, the identity first. A matrix has kPermutedLanes neighbouring lanes of
// a whole warp, which take the permutations in turn.

#pragma once

#include "math/coefficients.cuh"

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
  // Of a lane, at most.
  static constexpr int kOwn = (kNumber + kPermutedLanes - 1) / kPermutedLanes;

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
  __device__ static int image(int images, int i) { return images >> 4 * i & 15; }

  // Calls `use(p, images)` for every permutation; both are known to the compiler.
  template <int P = 0, class Use>
  __device__ __forceinline__ static void for_each(Use use) {
    if constexpr (P < kNumber) {
      constexpr int kImages = images(P);
      use(P, kImages);
      for_each<P + 1>(use);
    }
  }

  // Calls `use(k, p, images)` for the k-th permutation of the lane; k is known to the compiler.
  template <int K = 0, class Use>
  __device__ __forceinline__ static void for_own(int lane, Use use) {
    if constexpr (K < kOwn) {
      constexpr int kFirst = K * kPermutedLanes;
      constexpr int kImages[] = {images(kFirst), images(kFirst + 1), images(kFirst + 2),
                                 images(kFirst + 3)};
      const int low = lane % 2 ? kImages[1] : kImages[0], high = lane % 2 ? kImages[3] : kImages[2];
      if (kFirst + lane < kNumber) use(K, kFirst + lane, lane < 2 ? low : high);
      for_own<K + 1>(lane, use);
    }
  }

  // Combines what the lanes of a matrix have.
  template <class Combine>
  __device__ static float over_lanes(float v, Combine combine) {
#pragma unroll
    for (int step = 1; step < kPermutedLanes; step *= 2)
      v = combine(v, __shfl_xor_sync(kAllLanes, v, step));
    return v;
  }
  __device__ static float sum_over_lanes(float v) {
    return over_lanes(v, [](float a, float b) { return a + b; });
  }

  // w[k]: the weight of the lane's k-th permutation, from z = logit(p); 0 where it has none.
  template <class Logit>
  __device__ static void softmax(Logit logit, int lane, float (&w)[kOwn]) {
    float largest = __uint_as_float(0xff800000);  // -inf
    for_own(lane, [&](int k, int p, int) {
      w[k] = logit(p);
      largest = fmaxf(largest, w[k]);
    });
    largest = over_lanes(largest, [](float a, float b) { return fmaxf(a, b); });
    float sum = 0.f;
    for_own(lane, [&](int k, int, int) {
      w[k] = expf(w[k] - largest);
      sum += w[k];
    });
    const float scale = reciprocal(sum_over_lanes(sum));
#pragma unroll
    for (int k = 0; k < kOwn; ++k) w[k] *= scale;
  }

  // h_res [N, N], where it `exists`, from z [kNumber], which becomes the weights.
  __device__ static void forward(float* z, float* h_res, int lane, bool exists) {
    float w[kOwn] = {};
    softmax([&](int p) { return z[p]; }, lane, w);
    for_own(lane, [&](int k, int p, int) { z[p] = w[k]; });
    __syncwarp();
    float h[N] = {};  // column `lane`
    for_each([&](int p, int images) {
      const float weight = z[p];
#pragma unroll
      for (int i = 0; i < N; ++i) h[i] += image(images, i) == lane ? weight : 0.f;
    });
    if (!exists || lane >= N) return;
#pragma unroll
    for (int i = 0; i < N; ++i) h_res[i * N + lane] = h[i];
  }

  // d_z [kNumber] = dL/dz from z = logit(p) and d_h_res = dL/dH_res.
  //
  // dL/dw_p is the sum over i of d_h_res[i, p[i]], and dL/dz = w (dL/dw - <w, dL/dw>).
  template <class Logit>
  __device__ static void backward(Logit logit, const float* d_h_res, float* d_z, int lane) {
    float w[kOwn] = {}, d_w[kOwn] = {}, dot = 0.f;
    softmax(logit, lane, w);
    for_own(lane, [&](int k, int, int images) {
#pragma unroll
      for (int i = 0; i < N; ++i) d_w[k] += d_h_res[i * N + image(images, i)];
      dot += w[k] * d_w[k];
    });
    dot = sum_over_lanes(dot);
    for_own(lane, [&](int k, int p, int) { d_z[p] = w[k] * (d_w[k] - dot); });
  }
};

// The same for n streams, up to kPermutedLanes.
__device__ inline void mix_permutations(int n, float* z, float* h_res, int lane, bool exists) {
  switch (n) {
    case 1: return Permutations<1>::forward(z, h_res, lane, exists);
    case 2: return Permutations<2>::forward(z, h_res, lane, exists);
    case 3: return Permutations<3>::forward(z, h_res, lane, exists);
    case 4: return Permutations<4>::forward(z, h_res, lane, exists);
  }
}

template <class Logit>
__device__ inline void mix_permutations_bwd(int n, Logit logit, const float* d_h_res, float* d_z,
                                            int lane) {
  switch (n) {
    case 1: return Permutations<1>::backward(logit, d_h_res, d_z, lane);
    case 2: return Permutations<2>::backward(logit, d_h_res, d_z, lane);
    case 3: return Permutations<3>::backward(logit, d_h_res, d_z, lane);
    case 4: return Permutations<4>::backward(logit, d_h_res, d_z, lane);
  }
}
