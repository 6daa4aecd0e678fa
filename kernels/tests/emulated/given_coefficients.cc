// given_coefficients on a CPU against float64.

#include "given/given_coefficients.cu"

#include "check.h"
#include "h_res.h"

static const float *sums, *squares, *alpha, *bias;
static float *h_pre, *h_post, *h_res, *m, *r;
static int tokens, hidden, slices, columns;
static Settings own_settings;

static void body() {
  CONCAT(mhc_given_coefficients, SUFFIX)
  (reinterpret_cast<const float4*>(sums), squares, slices, alpha, bias, h_pre, h_post, h_res, m, r,
   tokens, hidden, columns, own_settings);
}

// C, tokens, slices, the number of the constraint; the seed; whether float64 gets another bias; then the columns.
int main(int, char** argv) {
  const Sizes sizes(argv);
  tokens = sizes.tokens, hidden = sizes.hidden, slices = sizes.clusters, columns = atoi(argv[7]);
  own_settings = settings();
  own_settings.constraint = Constraint(sizes.deferred);
  const int K = columns, width = N * hidden;
  sums = floats(size_t(tokens) * slices * K, [&](size_t) { return std::sqrt(width) * normal(); });
  squares = floats(size_t(tokens) * slices, [&](size_t) { return width * std::abs(normal()); });
  alpha = floats(K > 2 * N ? 3 : 2, [](size_t i) { return .3f + .1f * i; });
  bias = floats(K, [](size_t) { return normal(); });
  h_pre = guarded<float>(size_t(tokens) * N), h_post = guarded<float>(size_t(tokens) * N);
  h_res = guarded<float>(size_t(tokens) * N * N), m = guarded<float>(size_t(tokens) * K);
  r = guarded<float>(tokens);
  const int blocks = (tokens + kTokens - 1) / kTokens;
  for (int b = 0; b < blocks; ++b) {
    emulated::run_cluster(b, blocks, 1, kThreads, body, sizes.seed + b);
  }
  sizes.spoil(bias);

  Error of_m{"m", 1e-6}, of_r{"r", 1e-6}, of_h{"h", 2e-6};
  for (int t = 0; t < tokens; ++t) {
    const auto sum_at = [&](int c) {
      return sum_of_arrays(sums + size_t(t) * slices * K, slices, K, c);
    };
    const double square = sum_of_arrays(squares + size_t(t) * slices, slices, 1, 0);
    const double norm = 1 / std::sqrt(square / width + own_settings.norm_eps);
    of_r.add(r[t], norm);
    std::vector<double> z(K);
    for (int c = 0; c < K; ++c) {
      of_m.add(m[size_t(t) * K + c], norm * sum_at(c));
      z[c] = double(alpha[(c >= N) + (c >= 2 * N)]) * norm * sum_at(c) + bias[c];
    }
    double mixed[N][N];
    h_res_of(mixed, z.data() + 2 * N, K - 2 * N, own_settings);
    for (int i = 0; i < N; ++i) {
      of_h.add(h_pre[t * N + i], logistic(z[i]) + own_settings.pre_eps);
      of_h.add(h_post[t * N + i], 2 * logistic(z[N + i]) + own_settings.post_eps);
      for (int j = 0; j < N; ++j) of_h.add(h_res[(size_t(t) * N + i) * N + j], mixed[i][j]);
    }
  }
}
