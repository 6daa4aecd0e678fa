// pre_fwd and post_pre_fwd of one stream, which is read once; with a layer norm where its scale is there. A head is a pre
// with one column, which has no coefficients as results.

#include "math/sinkhorn.cuh"
#include "one_stream/one_stream.cuh"

struct Forward {
  const Stream *x, *y;
  const float *h_post_in, *h_res_in, *phi, *alpha, *bias, *norm_scale;
  Stream *x_new, *u;
  float *h_pre, *h_post, *h_res, *m, *r, *rho;
  float norm_scale_eps;
  int tokens, hidden, columns;
};

// H_res of a logit. normalised: what a finite one gives where all give the same; others must show.
__device__ inline float h_res_of(const Settings& settings, float z, float normalised) {
  if (settings.constraint == Constraint::kIdentity) return 1.f;
  if (is_normalised(settings)) return normalised + (z - z);
  return settings.constraint == Constraint::kBirkhoff ? expf(z) : z;
}

template <class Tuning, bool POST, bool NORM>
__device__ inline void forward(const Forward& f, const Settings& settings) {
  constexpr int kTokens = Tuning::tokens, kStages = Tuning::stages;
  // Of a token: the products with the columns of phi, and the squares.
  constexpr int kSums = kMostColumns + 1;
  extern __shared__ __align__(128) unsigned char memory[];
  const u32 start = shared_address(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  using Sums = Partials<kTokens * kSums>;
  const Sums partials{start + kLineBytes};
  // Behind the barriers: h_pre of each token, with rho.
  const u32 factors = start + kLineBytes / 2;
  static_assert(8 * kStages <= kLineBytes / 2 && 4 * kTokens <= kLineBytes / 2);
  static_assert(Sums::kWarpBytes <= kLineBytes);
  Tiles<1 + POST, kTokens, POST> tiles{{f.x},   f.tokens, f.hidden,
                                       kStages, start,    start + kLineBytes * (1 + Sums::warps())};
  if constexpr (POST) tiles.arrays[1] = f.y;
  const auto number = [&](long long token, int i) -> const float* {
    return i == 0 ? f.h_res_in + token : i == 1 ? f.h_post_in + token : nullptr;
  };

  partials.clear();
  tiles.start();
  if (warp == 0) {
    for (int slot = 0; slot + 1 < kStages; ++slot) {
      tiles.fetch(blockIdx.x + slot * gridDim.x, slot, number);
    }
  }

  const int at = threadIdx.x * V;
  const bool has_channels = at < f.hidden;
  const u32 own = threadIdx.x * 16;
  float phi[kMostColumns][V];
#pragma unroll
  for (int k = 0; k < kMostColumns; ++k) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      phi[k][v] = has_channels && k < f.columns ? f.phi[(at + v) * f.columns + k] : 0.f;
    }
  }
  // The last warp makes the coefficients, a lane those of a column of a token.
  const bool makes = warp == warps - 1;
  const int value = lane / Sums::kLanes, k = value % kSums, token = value / kSums;
  const bool is_column = k < f.columns;
  const float alpha = is_column ? f.alpha[k] : 0.f, bias = is_column ? f.bias[k] : 0.f;
  float normalised = 1.f;
  if (makes && settings.constraint == Constraint::kBirkhoff) {
    const float zero[1][1] = {};
    float result[1][1];
    Sinkhorn<1>{settings, 1, 0}.forward(zero, result, nullptr, 0);
    normalised = result[0][0];
  }

  int slot = 0, parity = 0;
  for (int tile = blockIdx.x; tile < tiles.num(); tile += gridDim.x) {
    const int first = tile * kTokens, here = min(kTokens, f.tokens - first);
    wait(tiles.barrier(slot), parity);
    const auto stream = [&](int t, bool exists) {
      const Pack<Stream, V> x = channels_of(tiles.row(slot, 0, t), own, exists);
      if constexpr (POST) {
        const Pack<Stream, V> y = channels_of(tiles.row(slot, 1, t), own, exists);
        const u32 numbers = tiles.numbers(slot, t);
        return new_stream(x, y, read_float(numbers), read_float(numbers + 4));
      } else {
        return x;
      }
    };

    // What lies in the places of tokens behind the last one ends in their own sums.
#pragma unroll
    for (int pair = 0; pair < kTokens; pair += 2) {
      float sums[2 * kSums] = {};
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const Pack<Stream, V> x = stream(pair + t, has_channels);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float value = x[v];
#pragma unroll
          for (int c = 0; c < kMostColumns; ++c) sums[t * kSums + c] += value * phi[c][v];
          sums[t * kSums + kMostColumns] += value * value;
        }
      }
      partials.add(sums, 0, pair * kSums);
    }
    __syncthreads();
    if (warp == 0) {
      const int free = slot == 0 ? kStages - 1 : slot - 1;
      tiles.fetch(tile + (kStages - 1) * gridDim.x, free, number);
    }

    float m = 0.f, r = 0.f, z = 0.f, s = 0.f, h_pre = 0.f, rho = 0.f;
    if (makes) {
      const float sum = partials.total(0);
      const float squares = __shfl_sync(kAllLanes, sum, lane | kMostColumns * Sums::kLanes);
      r = inverse_norm(settings, squares, f.hidden), m = r * sum;
      z = alpha * m + bias, s = sigmoid(z), h_pre = s + settings.pre_eps;
      if constexpr (NORM) {
        rho = inverse_root(h_pre * h_pre * squares * reciprocal(f.hidden) + f.norm_scale_eps);
      }
      if (k == 0) write_float(factors + token * 4, NORM ? h_pre * rho : h_pre);
    }
    __syncthreads();
    if (makes && lane % Sums::kLanes == 0 && token < here) {
      const long long own_token = first + token;
      if (is_column) f.m[own_token * f.columns + k] = m;
      if (k == 0) {
        if (f.h_pre) f.h_pre[own_token] = h_pre;
        if constexpr (NORM) f.rho[own_token] = rho;
      } else if (k == 1) {
        if (f.h_post) f.h_post[own_token] = settings.post_scale * s + settings.post_eps;
      } else if (k == 2) {
        if (f.h_res) f.h_res[own_token] = h_res_of(settings, z, normalised);
      } else {
        f.r[own_token] = r;
      }
    }

    if (has_channels) {
      const long long own_at = (long long)first * f.hidden + at;
      Stream *x_new = f.x_new + own_at, *u = f.u + own_at;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (t >= here) break;
        const Pack<Stream, V> x = stream(t, true);
        if constexpr (POST) store(x, x_new + t * f.hidden);
        const float factor = read_float(factors + t * 4);
        float values[V];
#pragma unroll
        for (int v = 0; v < V; ++v) {
          values[v] = factor * x[v];
          if constexpr (NORM) values[v] *= f.norm_scale[at + v];
        }
        Pack<Stream, V> result;
        result.set(values);
        store(result, u + t * f.hidden);
      }
    }
    if (++slot == kStages) {
      slot = 0;
      parity ^= 1;
    }
  }
}

template <class Tuning, bool POST>
__device__ inline void forward(const Forward& f, const Settings& settings) {
  if (f.norm_scale) {
    forward<Tuning, POST, true>(f, settings);
  } else {
    forward<Tuning, POST, false>(f, settings);
  }
}

KERNEL(pre_fwd_one_stream, tuning_pre_fwd_one_stream::threads)
(const Stream* x, const float* phi, const float* alpha, const float* bias, const float* norm_scale,
 Stream* u, float* h_pre, float* h_post, float* h_res, float* m, float* r, float* rho,
 float norm_scale_eps, int tokens, int hidden, int columns, Settings settings) {
  const Forward f{x,      nullptr, nullptr, nullptr, phi, alpha, bias, norm_scale,     nullptr,
                  u,      h_pre,   h_post,  h_res,   m,   r,     rho,  norm_scale_eps, tokens,
                  hidden, columns};
  forward<tuning_pre_fwd_one_stream, false>(f, settings);
}

KERNEL(post_pre_fwd_one_stream, tuning_post_pre_fwd_one_stream::threads)
(const Stream* x, const Stream* y, const float* h_post_in, const float* h_res_in, const float* phi,
 const float* alpha, const float* bias, const float* norm_scale, Stream* x_new, Stream* u,
 float* h_pre, float* h_post, float* h_res, float* m, float* r, float* rho, float norm_scale_eps,
 int tokens, int hidden, int columns, Settings settings) {
  const Forward f{x,      y,      h_post_in, h_res_in, phi, alpha, bias, norm_scale,     x_new,
                  u,      h_pre,  h_post,    h_res,    m,   r,     rho,  norm_scale_eps, tokens,
                  hidden, columns};
  forward<tuning_post_pre_fwd_one_stream, true>(f, settings);
}
