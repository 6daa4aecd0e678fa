// sinkhorn: h_res = project(z) [9], and d_z from d_h_res.

#include "math/sinkhorn.cuh"

constexpr int N = SIZE;
constexpr int kThreads = tuning_sinkhorn_fwd::threads;
static_assert(kThreads == tuning_sinkhorn_bwd::threads);

// The matrix of this lane, and whether it exists: lanes without one take part in exchanges.
struct Place {
  long long matrix;
  int lane;
  bool exists;

  __device__ explicit Place(long long matrices) {
    const long long thread = (long long)blockIdx.x * kThreads + threadIdx.x;
    matrix = thread / N;
    lane = thread % N;
    exists = matrix < matrices;
  }
};

__device__ inline void gather(Sinkhorn<N>::Matrix& values, const float* matrices,
                              const Place& place, const Sinkhorn<N>& sinkhorn) {
  const int n = sinkhorn.n;
  sinkhorn.for_each([&](int k, int i) {
    const bool exists = place.exists && sinkhorn.active(k, i);
    values[k][i] = exists ? matrices[place.matrix * n * n + sinkhorn.at(k, i)] : 0.f;
  });
}

__device__ inline void scatter(const Sinkhorn<N>::Matrix& values, float* matrices,
                               const Place& place, const Sinkhorn<N>& sinkhorn) {
  const int n = sinkhorn.n;
  sinkhorn.for_each([&](int k, int i) {
    if (place.exists && sinkhorn.active(k, i)) {
      matrices[place.matrix * n * n + sinkhorn.at(k, i)] = values[k][i];
    }
  });
}

KERNEL(sinkhorn_fwd, kThreads)
(const float* z_in, float* h_res, long long matrices, int num_streams, Settings settings) {
  const int n = EXACT ? N : num_streams;
  const Place place(matrices);
  const Sinkhorn<N> sinkhorn{settings, n, place.lane};
  Sinkhorn<N>::Matrix z, m;
  gather(z, z_in, place, sinkhorn);
  sinkhorn.forward(z, m, nullptr, 0);
  scatter(m, h_res, place, sinkhorn);
}

// history: 2 * iters floats a thread, in shared memory where `history` is null.
KERNEL(sinkhorn_bwd, kThreads)
(const float* z_in, const float* d_h_res, float* d_z, float* history, long long matrices,
 int num_streams, Settings settings) {
  extern __shared__ float shared[];
  const int n = EXACT ? N : num_streams;
  const Place place(matrices);
  const Sinkhorn<N> sinkhorn{settings, n, place.lane};
  const long long block = (long long)blockIdx.x * 2 * settings.sinkhorn_iters * kThreads;
  float* own = (history ? history + block : shared) + threadIdx.x;
  Sinkhorn<N>::Matrix z, m, g;
  gather(z, z_in, place, sinkhorn);
  gather(g, d_h_res, place, sinkhorn);
  sinkhorn.forward(z, m, own, kThreads);
  sinkhorn.backward(z, m, g, own, kThreads);
  scatter(g, d_z, place, sinkhorn);
}
