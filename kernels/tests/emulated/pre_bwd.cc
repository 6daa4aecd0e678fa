// pre_bwd_one_pass on a CPU against float64, and with the norm of the layer's input where the size has that.

#include "maps.h"
#include "one_pass/pre_bwd_one_pass.cu"

unsigned char shared[1];

static StreamMaps x_maps, d_u_maps, d_x_in_maps, d_x_maps;
static const float *phi, *alpha, *bias, *m, *r, *h_res, *d_h_pre, *d_z, *norm_scale, *rho;
static float *d_phi, *gates, *d_norm_scale;
static int tokens, hidden, deferred;

static void body() {
  CONCAT(mhc_pre_bwd_one_pass, SUFFIX)
  (x_maps.block_maps(), d_u_maps.block_maps(), d_x_in_maps.block_maps(), d_x_maps.block_maps(), phi,
   alpha, bias, m, r, deferred ? h_res : nullptr, d_h_pre, d_z, d_phi, gates, tokens, hidden,
   deferred, settings());
}
#ifdef HAS_pre_norm_bwd_one_pass
static void norm_body() {
  CONCAT(mhc_pre_norm_bwd_one_pass, SUFFIX)
  (x_maps.block_maps(), d_u_maps.block_maps(), d_x_in_maps.block_maps(), d_x_maps.block_maps(), phi,
   alpha, bias, m, r, deferred ? h_res : nullptr, d_h_pre, d_z, d_phi, gates, tokens, hidden,
   deferred, settings(), norm_scale, rho, d_norm_scale);
}
#else
constexpr auto norm_body = body;
#endif

// r dm that the kernel left for d_phi: in fragments of 16 tokens and 8 columns, both parts.
static double left_r_dm(int token, int column) {
  const u16* parts = reinterpret_cast<const u16*>(d_phi);
  const int tile = token / 16, t = token % 16, lane = column % 8 * 4 + t % 8 / 2;
  double sum = 0;
  for (int part = 0; part < 2; ++part) {
    const size_t word = (((tile * (kColumns / 8) + column / 8) * 2 + part) * 32 + lane) * 2 + t / 8;
    sum += of_bf16(parts[word * 2 + t % 2]);
  }
  return sum;
}

int main(int, char** argv) {
  const Sizes sizes(argv);
  constexpr int K = kColumns;
  const int ranks = sizes.ranks(SIZE), clusters = sizes.clusters;
  tokens = sizes.tokens, hidden = sizes.hidden, deferred = sizes.deferred / 2;
  const bool norm = kHasNorm && sizes.deferred % 2;
  const size_t num = sizes.values(), num_phi = size_t(N) * hidden * K;
  Stream *x = streams<Stream>(num * N), *d_u = streams<Stream>(num);
  Stream *d_x_in = streams<Stream>(num * N), *d_x = guarded<Stream>(num * N);
  const auto any = [](size_t) { return normal(); };
  // So large that the rounding of its products shows.
  phi = floats(num_phi, any);
  alpha = floats(kColumns == 2 * N ? 2 : 3, [](size_t i) { return .3f + .1f * i; });
  bias = floats(K, any), m = floats(size_t(tokens) * K, any);
  r = floats(tokens, [](size_t) { return 1.f + .3f * std::tanh(normal()); });
  h_res = floats(size_t(tokens) * N * N,
                 [](size_t i) { return kMixes ? .4f * normal() : float(i / N % N == i % N); });
  d_h_pre = floats(size_t(tokens) * N, any);
  // Gradients of the logits, or without H_res of h_post.
  constexpr int kGiven = kMixes ? K : N;
  d_z = floats(size_t(tokens) * kGiven,
               [](size_t i) { return kMixes && i % K < N ? NAN : normal(); });
  // r dm in whole tiles where d_phi is another kernel's.
  const size_t num_r_dm = size_t(tokens + kTile - 1) / kTile * kTile * K;
  d_phi = guarded<float>(kSumsPhi ? clusters * sum_numbers(hidden) : num_r_dm);
  const int rows = (norm ? Warps<true>::kOwners : Warps<false>::kOwners) * ranks * clusters;
  gates = guarded<float>(size_t(rows) * (K + 3));
  norm_scale = floats(hidden, [](size_t) { return 1.f + .3f * normal(); });
  d_norm_scale = guarded<float>(size_t(clusters) * ranks * SIZE);
  // Of u, with as much of it as h_pre says.
  const auto h_pre_of = [&](int token, int j) {
    return logistic(double(alpha[0]) * m[token * K + j] + bias[j]) + settings().pre_eps;
  };
  const auto u_of = [&](int token, int c) {
    double u = 0;
    for (int j = 0; j < N; ++j)
      u += h_pre_of(token, j) * wide(x[(size_t(token) * N + j) * hidden + c]);
    return u;
  };
  rho = floats(tokens, [&](size_t token) {
    double squares = 0;
    for (int c = 0; c < hidden; ++c) squares += u_of(token, c) * u_of(token, c);
    return 1 / std::sqrt(squares / hidden + 1e-6);
  });
  const auto map = [&](Stream* values, int num_streams) {
    return StreamMaps(values, tokens, num_streams, hidden, kTileTokens);
  };
  x_maps = map(x, N), d_u_maps = map(d_u, 1), d_x_in_maps = map(d_x_in, N), d_x_maps = map(d_x, N);
  for (int c = 0; c < clusters; ++c) {
    const int threads = norm ? Warps<true>::kThreads : Warps<false>::kThreads;
    emulated::run_cluster(c, clusters, ranks, threads, norm ? norm_body : body, sizes.seed + c);
  }
  sizes.spoil(phi);

  std::vector<double> exact_d_phi(num_phi), exact_gates(K + 3);
  // Beside float16 streams the rounding of phi counts, too, and that of r dm would.
  Error error{"d_x", of_stream(kRoundingError, 3.1e-4, kFloat32Error)},
      error_of_phi{"d_phi", of_stream(kProductsError, kFloatError, kFloat32Error)},
      error_of_gates{"gates", kFloatError};
  std::vector<double> exact_d_norm_scale(hidden);
  for (int t = 0; t < tokens; ++t) {
    const auto x_at = [&](int j, int c) {
      return double(wide(x[(size_t(t) * N + j) * hidden + c]));
    };
    // The cotangent of u.
    std::vector<double> own_d_u(hidden);
    for (int c = 0; c < hidden; ++c) own_d_u[c] = wide(d_u[size_t(t) * hidden + c]);
    if (norm) {
      double dot = 0;
      for (int c = 0; c < hidden; ++c) {
        const double u = u_of(t, c);
        exact_d_norm_scale[c] += own_d_u[c] * rho[t] * u;
        dot += norm_scale[c] * own_d_u[c] * u;
      }
      const double of_u = double(rho[t]) * rho[t] * rho[t] * dot / hidden;
      for (int c = 0; c < hidden; ++c)
        own_d_u[c] = rho[t] * (norm_scale[c] * own_d_u[c]) - of_u * u_of(t, c);
    }
    const auto d_u_at = [&](int c) { return own_d_u[c]; };
    double dots[N] = {}, h_pre[N], r_dm[K], f = 0;
    for (int j = 0; j < N; ++j) {
      for (int c = 0; c < hidden; ++c) dots[j] += d_u_at(c) * x_at(j, c);
    }
    for (int k = 0; k < K; ++k) {
      const int gate = (k >= N) + (k >= 2 * N);
      const double own_m = m[t * K + k], h = logistic(double(alpha[gate]) * own_m + bias[k]);
      double own_d_z = kMixes || k < N ? 0 : d_z[t * N + k - N] * 2. * h * (1 - h);
      if (kMixes && k >= N) own_d_z = d_z[t * K + k];
      if (k < N) {
        h_pre[k] = h + settings().pre_eps;
        own_d_z = (d_h_pre[t * N + k] + dots[k]) * h * (1 - h);
      }
      const double dm = alpha[gate] * own_d_z;
      f += dm * own_m;
      r_dm[k] = r[t] * dm;
      if (!kSumsPhi) error_of_phi.add(left_r_dm(t, k), r_dm[k]);
      exact_gates[k] += own_d_z;
      exact_gates[K + gate] += own_d_z * own_m;
    }
    f *= double(r[t]) * r[t] / (N * hidden);
    for (int j = 0; j < N; ++j) {
      for (int c = 0; c < hidden; ++c) {
        double value = h_pre[j] * d_u_at(c) - f * x_at(j, c);
        for (int i = 0; i < N; ++i) {
          const double h = deferred ? h_res[(t * N + i) * N + j] : i == j;
          value += h * wide(d_x_in[(size_t(t) * N + i) * hidden + c]);
        }
        for (int k = 0; k < K; ++k) {
          const size_t at = (size_t(j) * hidden + c) * K + k;
          value += r_dm[k] * phi[at];
          exact_d_phi[at] += x_at(j, c) * r_dm[k];
        }
        error.add(wide(d_x[(size_t(t) * N + j) * hidden + c]), value);
      }
    }
  }
  if (kSumsPhi) {
    for (size_t i = 0; i < num_phi; ++i) {
      error_of_phi.add(sum_of_d_phi(d_phi, clusters, hidden, i), exact_d_phi[i]);
    }
  }
  if (!kSumsPhi) {
    for (int t = tokens; t < int(num_r_dm) / K; ++t) {
      for (int k = 0; k < K; ++k) {
        if (left_r_dm(t, k) != 0) fail("r dm behind the last token");
      }
    }
  }
  for (int k = 0; k < K + 3; ++k)
    error_of_gates.add(sum_of_arrays(gates, rows, K + 3, k), exact_gates[k]);
  Error error_of_scale{"d_norm_scale", kFloatError};
  if (!norm) error_of_scale.add(1, 1);
  for (int c = 0; norm && c < hidden; ++c)
    error_of_scale.add(sum_of_arrays(d_norm_scale, clusters, ranks * SIZE, c),
                       exact_d_norm_scale[c]);
}
