// The kernels of one_pass_fwd.cu on a CPU against float64: post_pre where bit 0 of `deferred` is set, with a layer norm
// where bit 1 is.

#include "h_res.h"
#include "maps.h"
#include "one_pass/one_pass_fwd.cu"

unsigned char memory[1];

static StreamMaps x_maps, y_maps;
static const float *phi, *alpha, *bias, *h_post_in, *h_res_in, *norm_scale;
static Stream *x_new, *u;
static float *h_pre, *h_post, *h_res, *m, *r, *rho;
static int tokens, hidden;
static Settings own_settings;
constexpr float kNormScaleEps = 1e-3f;

static void pre() {
  CONCAT(mhc_pre_fwd_one_pass, SUFFIX)
  (x_maps.block_maps(), phi, alpha, bias, u, h_pre, h_post, h_res, m, r, tokens, hidden,
   own_settings);
}
static void pre_norm() {
  CONCAT(mhc_pre_norm_fwd_one_pass, SUFFIX)
  (x_maps.block_maps(), phi, alpha, bias, norm_scale, u, h_pre, h_post, h_res, m, r, rho,
   kNormScaleEps, tokens, hidden, own_settings);
}
static void post_pre() {
  CONCAT(mhc_post_pre_fwd_one_pass, SUFFIX)
  (x_maps.block_maps(), y_maps.block_maps(), h_post_in, h_res_in, phi, alpha, bias, x_new, u, h_pre,
   h_post, h_res, m, r, tokens, hidden, own_settings);
}
static void post_pre_norm() {
  CONCAT(mhc_post_pre_norm_fwd_one_pass, SUFFIX)
  (x_maps.block_maps(), y_maps.block_maps(), h_post_in, h_res_in, phi, alpha, bias, norm_scale,
   x_new, u, h_pre, h_post, h_res, m, r, rho, kNormScaleEps, tokens, hidden, own_settings);
}

int main(int, char** argv) {
  const Sizes sizes(argv);
  const bool is_post_pre = sizes.deferred & 1, has_norm = sizes.deferred & 2;
  constexpr int K = kColumns;
  tokens = sizes.tokens, hidden = sizes.hidden;
  own_settings = settings();
  const auto matrix = sizes.seed % 4 < 2 ? Constraint::kBirkhoff : Constraint::kNone;
  own_settings.constraint = K == 2 * N         ? Constraint::kIdentity
                            : K == N * (N + 2) ? matrix
                                               : Constraint::kPermutations;
  const size_t num = sizes.values();
  Stream *x = streams<Stream>(num * N), *y = streams<Stream>(num);
  x_new = guarded<Stream>(num * N), u = guarded<Stream>(num);
  const auto any = [](size_t) { return normal(); };
  // Some columns are small beside the others.
  const auto scale_of = [](int k) { return k % 4 == 3 ? 0x1p-20f : 1.f; };
  phi = floats(size_t(N) * hidden * K, [&](size_t i) { return .02f * scale_of(i % K) * normal(); });
  alpha = floats(kColumns == 2 * N ? 2 : 3, [](size_t i) { return .3f + .1f * i; });
  bias = floats(K, any), h_post_in = floats(size_t(tokens) * N, any);
  h_res_in = floats(size_t(tokens) * N * N, any);
  norm_scale = floats(hidden, any), rho = guarded<float>(tokens);
  h_pre = guarded<float>(size_t(tokens) * N), h_post = guarded<float>(size_t(tokens) * N);
  h_res = guarded<float>(size_t(tokens) * N * N), m = guarded<float>(size_t(tokens) * K);
  r = guarded<float>(tokens);
  const int boxes[] = {Plan<false, false>::kTokens, Plan<true, false>::kTokens,
                       Plan<false, true>::kTokens, Plan<true, true>::kTokens};
  const int box = boxes[sizes.deferred];
  x_maps = StreamMaps(x, tokens, N, hidden, box);
  y_maps = StreamMaps(y, tokens, 1, hidden, box);
  void (*const kernels[])() = {pre, post_pre, pre_norm, post_pre_norm};
  for (int c = 0; c < sizes.clusters; ++c) {
    emulated::run_cluster(c, sizes.clusters, sizes.ranks(SIZE), kThreads, kernels[sizes.deferred],
                          sizes.seed + c);
  }
  sizes.spoil(phi);

  constexpr double kStreamError = of_stream(kRoundingError, kHalfRoundingError, 1e-6);
  constexpr double kSumsError = of_stream(kFloatError, 1e-6, 2e-6);
  Error of_u{"u", kStreamError}, of_x_new{"x_new", kStreamError}, of_m{"m", kSumsError};
  Error of_r{"r", kSumsError}, of_h{"h", kSumsError}, of_rho{"rho", kSumsError};
  of_x_new.add(1, 1), of_rho.add(1, 1);
  std::vector<double> own(size_t(N) * hidden), collapsed(hidden);
  for (int t = 0; t < tokens; ++t) {
    double squares = 0, z[K], mixed[N][N];
    for (int i = 0; i < N; ++i) {
      for (int c = 0; c < hidden; ++c) {
        const auto x_at = [&](int j) { return wide(x[(size_t(t) * N + j) * hidden + c]); };
        double value = x_at(i);
        if (is_post_pre) {
          value = double(h_post_in[t * N + i]) * wide(y[size_t(t) * hidden + c]);
          for (int j = 0; j < N; ++j) value += double(h_res_in[(t * N + i) * N + j]) * x_at(j);
          const float got = wide(x_new[(size_t(t) * N + i) * hidden + c]);
          of_x_new.add(got, value);
          // pre goes on with the streams that are rounded.
          value = got;
        }
        own[i * hidden + c] = value;
        squares += value * value;
      }
    }
    const double norm = 1 / std::sqrt(squares / (N * hidden) + settings().norm_eps);
    of_r.add(r[t], norm);
    for (int k = 0; k < K; ++k) {
      double sum = 0;
      for (int i = 0; i < N * hidden; ++i) sum += own[i] * phi[size_t(i) * K + k];
      of_m.add(m[t * K + k] / scale_of(k), norm * sum / scale_of(k));
      z[k] = double(alpha[(k >= N) + (k >= 2 * N)]) * norm * sum + bias[k];
    }
    h_res_of(mixed, z + 2 * N, kColumns - 2 * N, own_settings);
    for (int i = 0; i < N; ++i) {
      of_h.add(h_pre[t * N + i], logistic(z[i]) + settings().pre_eps);
      of_h.add(h_post[t * N + i], 2 * logistic(z[N + i]) + settings().post_eps);
      for (int j = 0; j < N; ++j) of_h.add(h_res[(t * N + i) * N + j], mixed[i][j]);
    }
    double square = 0;
    for (int c = 0; c < hidden; ++c) {
      collapsed[c] = 0;
      for (int i = 0; i < N; ++i) {
        collapsed[c] += (logistic(z[i]) + settings().pre_eps) * own[i * hidden + c];
      }
      square += collapsed[c] * collapsed[c];
    }
    const double own_rho = has_norm ? 1 / std::sqrt(square / hidden + kNormScaleEps) : 1;
    if (has_norm) of_rho.add(rho[t], own_rho);
    for (int c = 0; c < hidden; ++c) {
      const double value = collapsed[c] * own_rho * (has_norm ? norm_scale[c] : 1);
      of_u.add(wide(u[size_t(t) * hidden + c]), value);
    }
  }
}
