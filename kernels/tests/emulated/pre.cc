// pre_fwd and pre_bwd of two passes on a CPU against float64, with Sinkhorn's iterations.

#include "two_pass/pre.cu"

#include "check.h"

float shared_history[emulated::kSharedBytes / sizeof(float)];

static const Stream *x, *d_u;
static const float *partial, *alpha, *bias, *d_h_pre, *d_h_post, *d_h_res;
static Stream* u;
static float *h_pre, *h_post, *h_res, *m, *r, *h_pre_again, *gate_sums, *history;
static float2* factors;
static u32 *dm_rows, *dm_columns;
static int tokens, hidden, n, columns, slices;
static Layout layout;
static Settings own_settings;

static void forward() {
  CONCAT(mhc_pre_fwd, SUFFIX)
  (x, partial, slices, alpha, bias, u, h_pre, h_post, h_res, m, r, tokens, hidden, columns, layout,
   own_settings);
}
static void backward() {
  CONCAT(mhc_pre_bwd, SUFFIX)
  (x, alpha, bias, m, r, d_u, d_h_pre, d_h_post, d_h_res, dm_rows, dm_columns, h_pre_again, factors,
   gate_sums, history, tokens, hidden, columns, layout, own_settings, nullptr, 0);
}

using Matrix = std::vector<double>;

// Divides what is at i * of_group + j * of_element for every j by its sum and eps, for every i.
static void normalise(Matrix& matrix, int of_group, int of_element) {
  for (int i = 0; i < n; ++i) {
    double sum = own_settings.sinkhorn_eps;
    for (int j = 0; j < n; ++j) sum += matrix[i * of_group + j * of_element];
    for (int j = 0; j < n; ++j) matrix[i * of_group + j * of_element] /= sum;
  }
}
static Matrix mix(const Matrix& z) {
  Matrix mixed(n * n);
  for (int j = 0; j < n; ++j) {
    double sum = 0;
    for (int i = 0; i < n; ++i) sum += std::exp(z[i * n + j]);
    for (int i = 0; i < n; ++i) {
      mixed[i * n + j] = std::exp(z[i * n + j]) / sum + own_settings.sinkhorn_eps;
    }
  }
  normalise(mixed, n, 1);
  for (int iter = 1; iter < own_settings.sinkhorn_iters; ++iter) {
    normalise(mixed, 1, n);
    normalise(mixed, n, 1);
  }
  return mixed;
}
// The cotangent of a logit: by differences.
static double d_z_of(Matrix z, const float* d_mixed, int element) {
  constexpr double kStep = 1e-4;
  double difference = 0;
  for (double step : {kStep, -kStep}) {
    Matrix moved = z;
    moved[element] += step;
    const Matrix mixed = mix(moved);
    for (int i = 0; i < n * n; ++i) difference += mixed[i] * d_mixed[i] / (2 * step);
  }
  return difference;
}

// C, tokens; whether the workspace has the record of the iterations; the seed; whether float64 gets another bias; then n.
int main(int, char** argv) {
  const Sizes sizes(argv);
  tokens = sizes.tokens, hidden = sizes.hidden, n = atoi(argv[7]);
  layout.n = layout.num_post = n, layout.num_res = n * n;
  own_settings = settings();
  own_settings.constraint = Constraint::kBirkhoff;
  const int K = columns = layout.num(), row = (K + 7) / 8 * 8 + 2, width = n * hidden;
  slices = 3;
  const auto any = [](size_t) { return normal(); };
  x = streams<Stream>(sizes.values() * n), d_u = streams<Stream>(sizes.values());
  u = guarded<Stream>(sizes.values());
  partial = floats(size_t(tokens) * slices * row, [&](size_t i) {
    return int(i % row) == row - 2 ? width / 3.f : std::sqrt(width) * normal();
  });
  alpha = floats(3, [](size_t i) { return .3f + .1f * i; });
  bias = floats(K, any);
  h_pre = guarded<float>(size_t(tokens) * n), h_post = guarded<float>(size_t(tokens) * n);
  h_res = guarded<float>(size_t(tokens) * n * n), m = guarded<float>(size_t(tokens) * K);
  r = guarded<float>(tokens), h_pre_again = guarded<float>(size_t(tokens) * n);
  d_h_pre = floats(size_t(tokens) * n, any), d_h_post = floats(size_t(tokens) * n, any);
  d_h_res = floats(size_t(tokens) * n * n, any);
  factors = reinterpret_cast<float2*>(guarded<float>(2 * tokens));
  // Blocks come in pairs, for a tile of tokens.
  const int blocks = (tokens + 2 * kTokens - 1) / (2 * kTokens) * 2;
  const Fragments dm{nullptr, nullptr, K};
  dm_rows = guarded<u32>(size_t(blocks / 2) * dm.hexets() * 128 * kBackParts<Stream>);
  dm_columns = guarded<u32>(size_t(blocks / 2) * dm.octets() * 64 * kWeightParts<Stream>);
  gate_sums = guarded<float>(size_t(blocks) * (K + 3));
  const int recorded = 2 * own_settings.sinkhorn_iters * 32 * kMatrixWarps;
  if (sizes.deferred) history = guarded<float>(size_t(blocks) * recorded);
  for (int b = 0; b < blocks; ++b) {
    if (b * kTokens < tokens) {
      emulated::run_cluster(b, blocks, 1, kThreads, forward, sizes.seed + b);
    }
  }
  for (int b = 0; b < blocks; ++b) {
    emulated::run_cluster(b, blocks, 1, kThreads, backward, sizes.seed + b);
  }
  sizes.spoil(bias);

  constexpr double kStreamError = of_stream(kRoundingError, kHalfRoundingError, 1e-6);
  Error of_u{"u", kStreamError}, of_m{"m", 1e-6}, of_r{"r", 1e-6}, of_h{"h", 2e-6};
  Error of_f{"f", kFloatError}, of_gates{"gates", kFloatError};
  for (int first = 0; first < tokens; first += kTokens) {
    Matrix gates(K + 3);
    for (int t = first; t < min(first + kTokens, tokens); ++t) {
      const auto sum_at = [&](int c) {
        double sum = 0;
        for (int s = 0; s < slices; ++s) sum += partial[(size_t(t) * slices + s) * row + c];
        return sum;
      };
      const double norm = 1 / std::sqrt(sum_at(row - 2) / width + own_settings.norm_eps);
      of_r.add(r[t], norm);
      Matrix own_m(K), z(K), d_z(K);
      for (int c = 0; c < K; ++c) {
        own_m[c] = norm * sum_at(c);
        z[c] = alpha[layout.gate(c)] * own_m[c] + bias[c];
        of_m.add(m[size_t(t) * K + c], own_m[c]);
      }
      const Matrix res(z.begin() + 2 * n, z.end()), mixed = mix(res);
      const auto x_at = [&](int i, int c) {
        return double(wide(x[(size_t(t) * n + i) * hidden + c]));
      };
      for (int c = 0; c < hidden; ++c) {
        double sum = 0;
        for (int i = 0; i < n; ++i) sum += (logistic(z[i]) + own_settings.pre_eps) * x_at(i, c);
        of_u.add(wide(u[size_t(t) * hidden + c]), sum);
      }
      for (int i = 0; i < n; ++i) {
        const double h = logistic(z[i]), post = logistic(z[n + i]);
        of_h.add(h_pre[t * n + i], h + own_settings.pre_eps);
        of_h.add(h_pre_again[t * n + i], h + own_settings.pre_eps);
        of_h.add(h_post[t * n + i], 2 * post + own_settings.post_eps);
        double dot = d_h_pre[t * n + i];
        for (int c = 0; c < hidden; ++c) dot += wide(d_u[size_t(t) * hidden + c]) * x_at(i, c);
        d_z[i] = dot * h * (1 - h);
        d_z[n + i] = d_h_post[t * n + i] * 2 * post * (1 - post);
      }
      double f = 0;
      for (int i = 0; i < n * n; ++i) {
        of_h.add(h_res[size_t(t) * n * n + i], mixed[i]);
        d_z[2 * n + i] = d_z_of(res, d_h_res + size_t(t) * n * n, i);
      }
      for (int c = 0; c < K; ++c) {
        gates[c] += d_z[c];
        gates[K + layout.gate(c)] += d_z[c] * own_m[c];
        f += alpha[layout.gate(c)] * d_z[c] * own_m[c];
      }
      of_f.add(factors[t].x, f * norm * norm / width);
    }
    for (int c = 0; c < K + 3; ++c) {
      of_gates.add(gate_sums[size_t(first / kTokens) * (K + 3) + c], gates[c]);
    }
  }
}
