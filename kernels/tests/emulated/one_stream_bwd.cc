// The kernels of one_stream_bwd.cu on a CPU against float64: with deferred cotangents where bit 0 of `deferred` is set,
// post_pre where bit 1 is, and a head where bit 2 is.

#include "one_stream/one_stream_bwd.cu"

#include "check.h"

unsigned char memory[1];

static const Stream *x, *d_u, *y;
static Stream *d_x, *d_y;
static const float *phi, *alpha, *bias, *m, *r, *h_res, *d_h_pre, *d_h_post, *d_h_res;
static const float *h_post_old, *h_res_old;
static float *d_h_post_old, *d_h_res_old, *d_phi, *gates;
static int tokens, hidden, columns;
static bool is_head;
static Settings own_settings;

static void pre() {
  CONCAT(mhc_pre_bwd_one_stream, SUFFIX)
  (x, d_u, is_head ? nullptr : d_x, phi, alpha, bias, m, r, h_res, d_h_pre, d_h_post, d_h_res, d_x,
   d_phi, gates, tokens, hidden, columns, own_settings);
}
static void post_pre() {
  CONCAT(mhc_post_pre_bwd_one_stream, SUFFIX)
  (x, d_u, d_x, y, phi, alpha, bias, m, r, h_res, d_h_pre, d_h_post, d_h_res, h_post_old, h_res_old,
   d_x, d_y, d_h_post_old, d_h_res_old, d_phi, gates, tokens, hidden, columns, own_settings);
}

// After what all checks have: the constraint, iterations and threads.
int main(int, char** argv) {
  const Sizes sizes(argv);
  const bool is_deferred = sizes.deferred & 1, is_post_pre = sizes.deferred & 2;
  is_head = sizes.deferred & 4;
  tokens = sizes.tokens, hidden = sizes.hidden;
  own_settings = settings();
  own_settings.constraint = Constraint(atoi(argv[7]));
  own_settings.sinkhorn_iters = atoi(argv[8]);
  const int K = columns = is_head ? 1 : own_settings.constraint == Constraint::kIdentity ? 2 : 3;
  const size_t num = sizes.values(), num_phi = size_t(hidden) * K;
  x = streams<Stream>(num), d_u = streams<Stream>(num), y = streams<Stream>(num);
  d_x = streams<Stream>(num), d_y = guarded<Stream>(num);
  const std::vector<Stream> d_x_in(d_x, d_x + num);
  const auto any = [](size_t) { return normal(); };
  phi = floats(num_phi, any);
  alpha = floats(K, [](size_t i) { return .3f + .1f * i; });
  bias = floats(K, any), m = floats(size_t(tokens) * K, any);
  r = floats(tokens, [](size_t) { return 1.f + .3f * std::tanh(normal()); });
  h_res = is_deferred ? floats(tokens, any) : nullptr;
  if (!is_head) {
    d_h_pre = floats(tokens, any), d_h_post = floats(tokens, any), d_h_res = floats(tokens, any);
  }
  h_post_old = floats(tokens, any), h_res_old = floats(tokens, any);
  d_h_post_old = guarded<float>(tokens), d_h_res_old = guarded<float>(tokens);
  const int threads = atoi(argv[9]), blocks = sizes.clusters;
  d_phi = guarded<float>(blocks * num_phi), gates = guarded<float>(blocks * (K + 3));
  for (int b = 0; b < blocks; ++b) {
    emulated::run_cluster(b, blocks, 1, threads, is_post_pre ? post_pre : pre, sizes.seed + b);
  }
  sizes.spoil(phi);

  constexpr double kStreamError = of_stream(kRoundingError, kHalfRoundingError, 1e-6);
  std::vector<double> exact_d_phi(num_phi), exact_gates(K + 3), own(hidden);
  Error error{"d_x", kStreamError}, error_of_y{"d_y", kStreamError};
  Error error_of_phi{"d_phi", 1e-6}, error_of_gates{"gates", 2e-6};
  Error error_of_h{"d_h of post", 2e-6};
  error_of_y.add(1, 1), error_of_h.add(1, 1);
  for (int t = 0; t < tokens; ++t) {
    const auto at = [&](const Stream* values, int c) {
      return double(wide(values[size_t(t) * hidden + c]));
    };
    double dot = 0, r_dm[3] = {}, f = 0, h_pre = 0;
    for (int c = 0; c < hidden; ++c) {
      own[c] = at(x, c);
      if (is_post_pre) {
        // As it was rounded forward.
        Stream rounded;
        set(rounded, fmaf(h_res_old[t], float(at(x, c)), h_post_old[t] * float(at(y, c))));
        own[c] = wide(rounded);
      }
      dot += own[c] * at(d_u, c);
    }
    for (int k = 0; k < K; ++k) {
      const double own_m = m[t * K + k], z = double(alpha[k]) * own_m + bias[k], h = logistic(z);
      double d_z = 0;
      if (k == 0) d_z = ((is_head ? 0 : d_h_pre[t]) + dot) * h * (1 - h);
      if (k == 1) d_z = d_h_post[t] * 2. * h * (1 - h);
      if (k == 2) {
        const bool is_free = own_settings.constraint == Constraint::kNone;
        const bool is_exponential =
            own_settings.constraint == Constraint::kBirkhoff && own_settings.sinkhorn_iters == 0;
        d_z = is_free ? d_h_res[t] : is_exponential ? d_h_res[t] * std::exp(z) : 0;
      }
      if (k == 0) h_pre = h + settings().pre_eps;
      const double dm = alpha[k] * d_z;
      f += dm * own_m;
      r_dm[k] = r[t] * dm;
      exact_gates[k] += d_z;
      exact_gates[K + k] += d_z * own_m;
    }
    f *= double(r[t]) * r[t] / hidden;
    double of_y = 0, of_x = 0;
    for (int c = 0; c < hidden; ++c) {
      const double h = is_head ? 0 : is_deferred ? h_res[t] : 1;
      double value = h * wide(d_x_in[size_t(t) * hidden + c]) + h_pre * at(d_u, c) - f * own[c];
      for (int k = 0; k < K; ++k) {
        value += r_dm[k] * phi[size_t(c) * K + k];
        exact_d_phi[size_t(c) * K + k] += own[c] * r_dm[k];
      }
      error.add(at(d_x, c), value);
      // post goes on with the cotangent that is rounded.
      of_y += at(d_x, c) * at(y, c), of_x += at(d_x, c) * at(x, c);
      if (is_post_pre) error_of_y.add(at(d_y, c), h_post_old[t] * at(d_x, c));
    }
    if (is_post_pre) error_of_h.add(d_h_post_old[t], of_y), error_of_h.add(d_h_res_old[t], of_x);
  }
  for (size_t i = 0; i < num_phi; ++i) {
    error_of_phi.add(sum_of_arrays(d_phi, blocks, num_phi, i), exact_d_phi[i]);
  }
  for (int k = 0; k < K + 3; ++k)
    error_of_gates.add(sum_of_arrays(gates, blocks, K + 3, k), exact_gates[k]);
}
