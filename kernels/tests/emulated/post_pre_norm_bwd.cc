// post_pre_norm_bwd on a CPU against float64.

#include "emulator.h"

// Blocks run one at a time.
#undef __shared__
#define __shared__ static

#include "check.h"
#include "one_pass/post_pre_norm_bwd.cu"

static Stream *x, *y, *u_norm, *d_u, *d_sum;
static const float *h_post, *h_res, *alpha, *bias, *m, *norm_scale, *rho;
static float* d_w;
static int tokens, hidden;
constexpr int kColumns = N * (N + 2);

static void body() {
  CONCAT(mhc_post_pre_norm_bwd, SUFFIX)
  (x, y, h_post, h_res, alpha, bias, m, norm_scale, rho, u_norm, d_u, d_sum, d_w, tokens, hidden,
   kColumns, settings());
}

// C, tokens, blocks; whether every fifth number of w is zero; the seed; whether float64 gets another w.
int main(int, char** argv) {
  const Sizes sizes(argv);
  tokens = sizes.tokens, hidden = sizes.hidden;
  const size_t num = sizes.values();
  const auto any = [](size_t) { return normal(); };
  x = streams<Stream>(num * N), y = streams<Stream>(num), d_u = streams<Stream>(num);
  u_norm = guarded<Stream>(num), d_sum = guarded<Stream>(num);
  h_post = floats(size_t(tokens) * N, any), h_res = floats(size_t(tokens) * N * N, any);
  alpha = floats(3, [](size_t i) { return .3f + .1f * i; });
  bias = floats(kColumns, any), m = floats(size_t(tokens) * kColumns, any);
  norm_scale = floats(
      hidden, [&](size_t c) { return sizes.deferred && c % 5 == 0 ? 0.f : 1 + .2f * normal(); });
  rho = floats(tokens, [](size_t) { return .5f + .1f * normal(); });
  d_w = guarded<float>(size_t(sizes.clusters) * hidden);

  // rho u, of which the kernel knows what is left of it in u_norm.
  std::vector<double> unit(num);
  for (int t = 0; t < tokens; ++t) {
    for (int c = 0; c < hidden; ++c) {
      const size_t at = size_t(t) * hidden + c;
      double u = 0;
      for (int i = 0; i < N; ++i) {
        double x_new = double(h_post[t * N + i]) * wide(y[at]);
        for (int j = 0; j < N; ++j)
          x_new += double(h_res[(t * N + i) * N + j]) * wide(x[(size_t(t) * N + j) * hidden + c]);
        u += (logistic(double(alpha[0]) * m[t * kColumns + i] + bias[i]) + settings().pre_eps) *
             x_new;
      }
      const float w = norm_scale[c];
      set(u_norm[at], float(w * rho[t] * u));
      unit[at] = w == 0 ? rho[t] * u : wide(u_norm[at]) / w;
    }
  }
  const int threads = (hidden / kV + 31) / 32 * 32;
  for (int b = 0; b < sizes.clusters; ++b)
    emulated::run_cluster(b, sizes.clusters, 1, threads, body, sizes.seed + b);
  sizes.spoil(norm_scale);

  Error of_d_sum{"d_sum", of_stream(kRoundingError, kHalfRoundingError, kFloat32Error)};
  Error of_d_w{"d_w", kFloatError};
  std::vector<double> sums(hidden);
  for (int t = 0; t < tokens; ++t) {
    double dot = 0;
    for (int c = 0; c < hidden; ++c)
      dot += double(wide(d_u[size_t(t) * hidden + c])) * wide(u_norm[size_t(t) * hidden + c]);
    for (int c = 0; c < hidden; ++c) {
      const size_t at = size_t(t) * hidden + c;
      const double g = wide(d_u[at]);
      of_d_sum.add(wide(d_sum[at]), rho[t] * (norm_scale[c] * g - dot / hidden * unit[at]));
      sums[c] += g * unit[at];
    }
  }
  for (int c = 0; c < hidden; ++c)
    of_d_w.add(sum_of_arrays(d_w, sizes.clusters, hidden, c), sums[c]);
}
