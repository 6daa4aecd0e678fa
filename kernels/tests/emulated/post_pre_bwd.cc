// post_pre_bwd_one_pass on a CPU against float64.

#include "maps.h"
#include "one_pass/post_pre_bwd_one_pass.cu"

unsigned char memory[1];

static StreamMaps x_maps[2], y_maps, d_u_maps, d_x_in_maps[2], d_x_maps[2], d_y_maps;
static const float *h_post, *h_res, *phi, *alpha, *bias, *m, *r, *h_res_new, *d_h_pre, *d_z;
static float *d_h_post, *d_h_res, *gates;
static void* for_phi;
static int tokens, hidden, deferred;

static void body() {
  CONCAT(mhc_post_pre_bwd_one_pass, SUFFIX)
  (x_maps[0].block_maps(), x_maps[1].block_maps(), y_maps.block_maps(), d_u_maps.block_maps(),
   d_x_in_maps[0].block_maps(), d_x_in_maps[1].block_maps(), d_x_maps[0].block_maps(),
   d_x_maps[1].block_maps(), d_y_maps.block_maps(), h_post, h_res, phi, alpha, bias, m, r,
   h_res_new, d_h_pre, d_z, d_h_post, d_h_res, for_phi, gates, tokens, hidden, deferred,
   settings());
}

int main(int, char** argv) {
  const Sizes sizes(argv);
  constexpr int K = kColumns;
  const int ranks = sizes.ranks(SIZE), clusters = sizes.clusters;
  tokens = sizes.tokens, hidden = sizes.hidden, deferred = sizes.deferred;
  const size_t num = sizes.values(), num_phi = size_t(N) * hidden * K;
  Stream *x = streams<Stream>(num * N), *y = streams<Stream>(num);
  Stream *d_u = streams<Stream>(num), *d_x_in = streams<Stream>(num * N);
  Stream *d_x = guarded<Stream>(num * N), *d_y = guarded<Stream>(num);
  // Numbers that mix streams may be larger and smaller than float16 has room for, as long as what is mixed fits.
  const auto power = [](size_t token) {
    return std::ldexp(1.f, token % 4 == 1 ? 17 : token % 4 == 3 ? -13 : 0);
  };
  constexpr bool kMixesBack = kColumns > 2 * N;
  const bool is_mixed_back = kMixesBack && deferred;
  for (size_t i = 0; i < num * N; ++i) {
    const float own = power(i / N / hidden);
    set(x[i], wide(x[i]) / own);
    if (is_mixed_back) set(d_x_in[i], wide(d_x_in[i]) / own);
  }
  const auto any = [](size_t) { return normal(); };
  // So large that the rounding of its products shows.
  phi = floats(num_phi, any);
  alpha = floats(kColumns == 2 * N ? 2 : 3, [](size_t i) { return .3f + .1f * i; });
  bias = floats(K, any), m = floats(size_t(tokens) * K, any);
  r = floats(tokens, [](size_t) { return 1.f + .3f * std::tanh(normal()); });
  const auto matrix = [&](size_t i) { return .4f * normal() * power(i / (N * N)); };
  h_post = floats(size_t(tokens) * N, any), h_res = floats(size_t(tokens) * N * N, matrix);
  h_res_new = floats(size_t(tokens) * N * N,
                     [&](size_t i) { return kMixesBack ? matrix(i) : float(i / N % N == i % N); });
  d_h_pre = floats(size_t(tokens) * N, any);
  d_z = floats(size_t(tokens) * K, [](size_t i) { return i % K < N ? NAN : normal(); });
  d_h_post = guarded<float>(size_t(tokens) * N), d_h_res = guarded<float>(size_t(tokens) * N * N);
  const int rows = kOwnerWarps * ranks * clusters;
  gates = guarded<float>(size_t(rows) * (K + 3));
  // Sums for d_phi, or r dm in two parts.
  float* sums = kSumsPhi ? guarded<float>(clusters * sum_numbers(hidden)) : nullptr;
  u16* parts = kSumsPhi ? nullptr : guarded<u16>(size_t(tokens) * 2 * K);
  for_phi = kSumsPhi ? static_cast<void*>(sums) : parts;
  const auto map = [&](Stream* values, int num_streams, int first, int step) {
    return StreamMaps(values, tokens, num_streams, hidden, kTileTokens, first, step);
  };
  for (int odd = 0; odd < 2; ++odd) {
    x_maps[odd] = map(x, N, odd, 2), d_x_in_maps[odd] = map(d_x_in, N, odd, 2);
    d_x_maps[odd] = map(d_x, N, odd, 2);
  }
  y_maps = map(y, 1, 0, 1), d_u_maps = map(d_u, 1, 0, 1), d_y_maps = map(d_y, 1, 0, 1);
  for (int c = 0; c < clusters; ++c) {
    emulated::run_cluster(c, clusters, ranks, kThreads, body, sizes.seed + c);
  }
  sizes.spoil(phi);

  std::vector<double> exact_d_phi(num_phi), exact_gates(K + 3), own(size_t(N) * hidden), d(own);
  // Beside float16 streams the rounding of phi counts, too, and that of r dm would.
  constexpr double kStreamError = of_stream(kRoundingError, 3.1e-4, kFloat32Error);
  Error of_d_x{"d_x", kStreamError}, of_d_y{"d_y", kStreamError}, of_h{"d_h", 2 * kStreamError};
  Error of_phi{"d_phi or r_dm", of_stream(kProductsError, kProductsError / 3, kFloat32Error)};
  Error of_gates{"gates", kFloatError};
  for (int t = 0; t < tokens; ++t) {
    const auto at = [&](const Stream* values, int j, int c) {
      return double(wide(values[(size_t(t) * N + j) * hidden + c]));
    };
    const auto vector_at = [&](const Stream* values, int c) {
      return double(wide(values[size_t(t) * hidden + c]));
    };
    double dots[N] = {}, h_pre[N], r_dm[K], f = 0;
    for (int i = 0; i < N; ++i) {
      for (int c = 0; c < hidden; ++c) {
        double value = h_post[t * N + i] * vector_at(y, c);
        for (int j = 0; j < N; ++j) value += double(h_res[(t * N + i) * N + j]) * at(x, j, c);
        dots[i] += vector_at(d_u, c) * value;
        // As the forward pass rounds it.
        Stream rounded;
        set(rounded, float(value));
        own[i * hidden + c] = wide(rounded);
      }
    }
    for (int k = 0; k < K; ++k) {
      const int gate = (k >= N) + (k >= 2 * N);
      double own_d_z = d_z[t * K + k];
      if (k < N) {
        const double h = logistic(double(alpha[0]) * m[t * K + k] + bias[k]);
        h_pre[k] = h + settings().pre_eps;
        own_d_z = (d_h_pre[t * N + k] + dots[k]) * h * (1 - h);
      }
      const double dm = alpha[gate] * own_d_z;
      f += dm * m[t * K + k];
      r_dm[k] = r[t] * dm;
      exact_gates[k] += own_d_z;
      exact_gates[K + gate] += own_d_z * m[t * K + k];
      if (!kSumsPhi) {
        const u16* row = parts + size_t(t) * 2 * K;
        of_phi.add(double(of_bf16(row[k])) + of_bf16(row[K + k]), r_dm[k]);
      }
    }
    f *= double(r[t]) * r[t] / (N * hidden);
    for (int j = 0; j < N; ++j) {
      for (int c = 0; c < hidden; ++c) {
        double value = h_pre[j] * vector_at(d_u, c) - f * own[j * hidden + c];
        for (int i = 0; i < N; ++i) {
          const double h = deferred ? h_res_new[(t * N + i) * N + j] : i == j;
          value += h * at(d_x_in, i, c);
        }
        for (int k = 0; k < K; ++k) {
          const size_t place = (size_t(j) * hidden + c) * K + k;
          value += r_dm[k] * phi[place];
          exact_d_phi[place] += own[j * hidden + c] * r_dm[k];
        }
        of_d_x.add(at(d_x, j, c), value);
        d[j * hidden + c] = value;
      }
    }
    for (int i = 0; i < N; ++i) {
      double of_post = 0, of_res[N] = {};
      for (int c = 0; c < hidden; ++c) {
        of_post += d[i * hidden + c] * vector_at(y, c);
        for (int j = 0; j < N; ++j) of_res[j] += d[i * hidden + c] * at(x, j, c);
      }
      of_h.add(d_h_post[t * N + i], of_post);
      for (int j = 0; j < N; ++j) {
        const float own = power(t);
        of_h.add(own * d_h_res[(t * N + i) * N + j], own * of_res[j]);
      }
    }
    for (int c = 0; c < hidden; ++c) {
      double value = 0;
      for (int i = 0; i < N; ++i) value += h_post[t * N + i] * d[i * hidden + c];
      of_d_y.add(vector_at(d_y, c), value);
    }
  }
  for (size_t i = 0; kSumsPhi && i < num_phi; ++i) {
    of_phi.add(sum_of_d_phi(sums, clusters, hidden, i), exact_d_phi[i]);
  }
  for (int k = 0; k < K + 3; ++k)
    of_gates.add(sum_of_arrays(gates, rows, K + 3, k), exact_gates[k]);
}
