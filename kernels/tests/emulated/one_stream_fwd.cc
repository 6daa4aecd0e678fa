// The kernels of one_stream_fwd.cu on a CPU against float64: post_pre where bit 0 of `deferred` is set, with a layer norm
// where bit 1 is, and a head where bit 2 is.

#include "one_stream/one_stream_fwd.cu"

#include "check.h"

unsigned char memory[1];

static const Stream *x, *y;
static const float *phi, *alpha, *bias, *h_post_in, *h_res_in, *norm_scale;
static Stream *x_new, *u;
static float *h_pre, *h_post, *h_res, *m, *r, *rho;
static int tokens, hidden, columns;
static Settings own_settings;
constexpr float kNormScaleEps = 1e-3f;

static void pre() {
  CONCAT(mhc_pre_fwd_one_stream, SUFFIX)
  (x, phi, alpha, bias, norm_scale, u, h_pre, h_post, h_res, m, r, rho, kNormScaleEps, tokens,
   hidden, columns, own_settings);
}
static void post_pre() {
  CONCAT(mhc_post_pre_fwd_one_stream, SUFFIX)
  (x, y, h_post_in, h_res_in, phi, alpha, bias, norm_scale, x_new, u, h_pre, h_post, h_res, m, r,
   rho, kNormScaleEps, tokens, hidden, columns, own_settings);
}

static double h_res_of(double z) {
  if (own_settings.constraint == Constraint::kNone) return z;
  if (own_settings.constraint != Constraint::kBirkhoff) return 1;
  if (own_settings.sinkhorn_iters == 0) return std::exp(z);
  double value = 1 + double(own_settings.sinkhorn_eps);
  for (int half = 1; half < 2 * own_settings.sinkhorn_iters; ++half) {
    value /= value + own_settings.sinkhorn_eps;
  }
  return value;
}

// After what all checks have: the constraint, iterations and threads.
int main(int, char** argv) {
  const Sizes sizes(argv);
  const bool is_post_pre = sizes.deferred & 1, has_norm = sizes.deferred & 2;
  const bool is_head = sizes.deferred & 4;
  tokens = sizes.tokens, hidden = sizes.hidden;
  own_settings = settings();
  own_settings.constraint = Constraint(atoi(argv[7]));
  own_settings.sinkhorn_iters = atoi(argv[8]);
  own_settings.sinkhorn_eps = .125f;
  const int K = columns = is_head ? 1 : own_settings.constraint == Constraint::kIdentity ? 2 : 3;
  const size_t num = sizes.values();
  x = streams<Stream>(num), y = streams<Stream>(num);
  x_new = guarded<Stream>(num), u = guarded<Stream>(num);
  const auto any = [](size_t) { return normal(); };
  phi = floats(size_t(hidden) * K, [](size_t) { return .05f * normal(); });
  alpha = floats(K, [](size_t i) { return .3f + .1f * i; });
  bias = floats(K, any), h_post_in = floats(tokens, any), h_res_in = floats(tokens, any);
  norm_scale = has_norm ? floats(hidden, any) : nullptr;
  rho = has_norm ? guarded<float>(tokens) : nullptr;
  if (!is_head) {
    h_pre = guarded<float>(tokens), h_post = guarded<float>(tokens), h_res = guarded<float>(tokens);
  }
  m = guarded<float>(size_t(tokens) * K), r = guarded<float>(tokens);
  const int threads = atoi(argv[9]), blocks = sizes.clusters;
  for (int b = 0; b < blocks; ++b) {
    emulated::run_cluster(b, blocks, 1, threads, is_post_pre ? post_pre : pre, sizes.seed + b);
  }
  sizes.spoil(phi);

  constexpr double kStreamError = of_stream(kRoundingError, kHalfRoundingError, 1e-6);
  Error of_u{"u", kStreamError}, of_x_new{"x_new", kStreamError}, of_m{"m", 1e-6}, of_r{"r", 1e-6};
  Error of_h{"h", 1e-6}, of_rho{"rho", 1e-6};
  of_x_new.add(1, 1), of_rho.add(1, 1), of_h.add(1, 1);
  std::vector<double> own(hidden);
  for (int t = 0; t < tokens; ++t) {
    double squares = 0, z[3] = {};
    for (int c = 0; c < hidden; ++c) {
      const size_t at = size_t(t) * hidden + c;
      own[c] = wide(x[at]);
      if (is_post_pre) {
        of_x_new.add(wide(x_new[at]), h_res_in[t] * own[c] + double(h_post_in[t]) * wide(y[at]));
        // pre goes on with the stream that is rounded.
        own[c] = wide(x_new[at]);
      }
      squares += own[c] * own[c];
    }
    const double norm = 1 / std::sqrt(squares / hidden + settings().norm_eps);
    of_r.add(r[t], norm);
    for (int k = 0; k < K; ++k) {
      double sum = 0;
      for (int c = 0; c < hidden; ++c) sum += own[c] * phi[size_t(c) * K + k];
      of_m.add(m[t * K + k], norm * sum);
      z[k] = alpha[k] * norm * sum + bias[k];
    }
    const double h = logistic(z[0]) + settings().pre_eps;
    if (!is_head) {
      of_h.add(h_pre[t], h);
      of_h.add(h_post[t], 2 * logistic(z[1]) + settings().post_eps);
      of_h.add(h_res[t], h_res_of(z[2]));
    }
    const double own_rho = has_norm ? 1 / std::sqrt(h * h * squares / hidden + kNormScaleEps) : 1;
    if (has_norm) of_rho.add(rho[t], own_rho);
    for (int c = 0; c < hidden; ++c) {
      const double value = h * own[c] * own_rho * (has_norm ? norm_scale[c] : 1);
      of_u.add(wide(u[size_t(t) * hidden + c]), value);
    }
  }
}
