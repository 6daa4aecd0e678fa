// post_given_bwd.cu on a CPU against float64.

#include "given/post_given_bwd.cu"

#include "maps.h"

unsigned char memory[1];

static StreamMaps x_maps[2], y_maps, d_u_maps, d_x_in_maps[2], d_x_maps[2], d_y_maps;
static const float *h_post, *h_res, *h_given, *phi, *alpha, *bias, *m, *r, *h_res_new, *d_h_pre,
    *d_z;
static float *d_h_post, *d_h_res, *d_h_given, *d_phi, *d_bias, *d_alpha, *gates, *dots, *sums;
static int tokens, hidden, deferred, slices, ranges;
constexpr int kGates = kColumns == 2 * N ? 2 : 3;

static void body() {
  CONCAT(mhc_post_given_bwd, SUFFIX)
  (x_maps[0].block_maps(), x_maps[1].block_maps(), y_maps.block_maps(), d_u_maps.block_maps(),
   d_x_in_maps[0].block_maps(), d_x_in_maps[1].block_maps(), d_x_maps[0].block_maps(),
   d_x_maps[1].block_maps(), d_y_maps.block_maps(), h_post, h_res, phi, alpha, bias, m, r,
   h_res_new, h_given, d_h_pre, d_z, dots, sums, gates, tokens, hidden, deferred, settings());
}

static int phi_blocks() { return (N * hidden * kColumns / 4 + kSumThreads - 1) / kSumThreads; }
static void sum_body() {
  CONCAT(mhc_sum_given, SUFFIX)
  (reinterpret_cast<float4*>(sums), gates, dots, h_post, h_res, reinterpret_cast<float4*>(d_phi),
   d_bias, d_alpha, d_h_post, d_h_res, d_h_given, phi_blocks(), ranges, N * hidden * kColumns / 4,
   hidden * kColumns / 4, padded(hidden) * kColumns / 4, kGates, tokens, slices);
}

int main(int, char** argv) {
  const Sizes sizes(argv);
  constexpr int K = kColumns;
  tokens = sizes.tokens, hidden = sizes.hidden, deferred = sizes.deferred;
  slices = sizes.ranks(SIZE), ranges = sizes.clusters;
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
  alpha = floats(kGates, [](size_t i) { return .3f + .1f * i; });
  bias = floats(K, any), m = floats(size_t(tokens) * K, any);
  r = floats(tokens, [](size_t) { return 1.f + .3f * std::tanh(normal()); });
  const auto matrix = [&](size_t i) { return .4f * normal() * power(i / (N * N)); };
  h_post = floats(size_t(tokens) * N, any), h_res = floats(size_t(tokens) * N * N, matrix);
  h_given = floats(size_t(tokens) * N, any);
  h_res_new = floats(size_t(tokens) * N * N,
                     [&](size_t i) { return kMixesBack ? matrix(i) : float(i / N % N == i % N); });
  d_h_pre = floats(size_t(tokens) * N, any);
  d_z = floats(size_t(tokens) * K, [](size_t i) { return i % K < N ? NAN : normal(); });
  d_h_post = guarded<float>(size_t(tokens) * N), d_h_res = guarded<float>(size_t(tokens) * N * N);
  d_h_given = guarded<float>(size_t(tokens) * N);
  const int rows = kRepliers * ranges, tile_tokens = (tokens + 7) / 8 * 8;
  gates = guarded<float>(size_t(rows) * (K + 3));
  dots = guarded<float>(size_t(tile_tokens) * slices * kDotsRow);
  sums = guarded<float>(ranges * sum_numbers(hidden));
  d_phi = guarded<float>(num_phi), d_bias = guarded<float>(K), d_alpha = guarded<float>(kGates);
  const auto map = [&](Stream* values, int num_streams, int first, int step) {
    return StreamMaps(values, tokens, num_streams, hidden, kTileTokens, first, step);
  };
  for (int odd = 0; odd < 2; ++odd) {
    x_maps[odd] = map(x, N, odd, 2), d_x_in_maps[odd] = map(d_x_in, N, odd, 2);
    d_x_maps[odd] = map(d_x, N, odd, 2);
  }
  y_maps = map(y, 1, 0, 1), d_u_maps = map(d_u, 1, 0, 1), d_y_maps = map(d_y, 1, 0, 1);
  emulated::num_rows = ranges;
  for (int b = 0; b < slices * ranges; ++b) {
    emulated::row_of_blocks = b / slices;
    emulated::run_cluster(b % slices, slices, 1, kThreads, body, sizes.seed + b);
  }
  emulated::row_of_blocks = 0, emulated::num_rows = 1;
  const int sum_blocks = phi_blocks() + 1 + (tokens + kSumTokens - 1) / kSumTokens;
  for (int b = 0; b < sum_blocks; ++b)
    emulated::run_cluster(b, sum_blocks, 1, kSumThreads, sum_body, sizes.seed + b);
  sizes.spoil(phi);

  std::vector<double> exact_d_phi(num_phi), exact_gates(K + 3), own(size_t(N) * hidden), d(own);
  // Beside float16 streams the rounding of phi counts, too, and that of r dm would.
  constexpr double kStreamError = of_stream(kRoundingError, 3.1e-4, kFloat32Error);
  Error of_d_x{"d_x", kStreamError}, of_d_y{"d_y", kStreamError}, of_h{"d_h", 2 * kStreamError};
  Error of_given{"d_h_given", of_stream(kFloatError, kFloatError, kFloat32Error)};
  Error of_phi{"d_phi", of_stream(kProductsError, kProductsError / 3, kFloat32Error)};
  Error of_gates{"gates", of_stream(kFloatError, kFloatError, kFloat32Error)};
  for (int t = 0; t < tokens; ++t) {
    const auto at = [&](const Stream* values, int j, int c) {
      return double(wide(values[(size_t(t) * N + j) * hidden + c]));
    };
    const auto vector_at = [&](const Stream* values, int c) {
      return double(wide(values[size_t(t) * hidden + c]));
    };
    double r_dm[K], f = 0;
    for (int i = 0; i < N; ++i) {
      double given = 0;
      for (int c = 0; c < hidden; ++c) {
        double value = h_post[t * N + i] * vector_at(y, c);
        for (int j = 0; j < N; ++j) value += double(h_res[(t * N + i) * N + j]) * at(x, j, c);
        given += vector_at(d_u, c) * value;
        // As the forward pass rounds it.
        Stream rounded;
        set(rounded, float(value));
        own[i * hidden + c] = wide(rounded);
      }
      of_given.add(d_h_given[t * N + i], given);
    }
    for (int k = 0; k < K; ++k) {
      const int gate = (k >= N) + (k >= 2 * N);
      double own_d_z = d_z[t * K + k];
      if (k < N) {
        const double h = logistic(double(alpha[0]) * m[t * K + k] + bias[k]);
        own_d_z = d_h_pre[t * N + k] * h * (1 - h);
      }
      const double dm = alpha[gate] * own_d_z;
      f += dm * m[t * K + k];
      r_dm[k] = r[t] * dm;
      exact_gates[k] += own_d_z;
      exact_gates[K + gate] += own_d_z * m[t * K + k];
    }
    f *= double(r[t]) * r[t] / (N * hidden);
    for (int j = 0; j < N; ++j) {
      for (int c = 0; c < hidden; ++c) {
        double value = h_given[t * N + j] * vector_at(d_u, c) - f * own[j * hidden + c];
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
      for (int j = 0; j < N; ++j)
        of_h.add(power(t) * d_h_res[(t * N + i) * N + j], power(t) * of_res[j]);
    }
    for (int c = 0; c < hidden; ++c) {
      double value = 0;
      for (int i = 0; i < N; ++i) value += h_post[t * N + i] * d[i * hidden + c];
      of_d_y.add(vector_at(d_y, c), value);
    }
  }
  for (size_t i = 0; i < num_phi; ++i) of_phi.add(d_phi[i], exact_d_phi[i]);
  for (int k = 0; k < K; ++k) of_gates.add(d_bias[k], exact_gates[k]);
  for (int gate = 0; gate < kGates; ++gate) of_gates.add(d_alpha[gate], exact_gates[K + gate]);
}
