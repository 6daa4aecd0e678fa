// The kernels of one_pass_fwd.cu on a CPU against float64: post_pre where `deferred` is set, with a layer norm for some
// seeds.

#include "check.h"
#include "one_pass/one_pass_fwd.cu"

unsigned char memory[1];

static Map x_map, y_map;
static const float *phi, *alpha, *bias, *h_post_in, *h_res_in, *norm_scale;
static u16 *x_new, *u;
static float *h_pre, *h_post, *h_res, *m, *r, *rho;
static int tokens, hidden;
static Settings own_settings;
constexpr float kNormScaleEps = 1e-4f;

static void pre() {
  CONCAT(mhc_pre_fwd_one_pass, SUFFIX)
  (x_map.tensor_map(), phi, alpha, bias, reinterpret_cast<Stream*>(u), h_pre, h_post, h_res, m, r,
   tokens, hidden, own_settings);
}
static void pre_norm() {
  CONCAT(mhc_pre_norm_fwd_one_pass, SUFFIX)
  (x_map.tensor_map(), phi, alpha, bias, norm_scale, reinterpret_cast<Stream*>(u), h_pre, h_post,
   h_res, m, r, rho, kNormScaleEps, tokens, hidden, own_settings);
}
static void post_pre_norm() {
  CONCAT(mhc_post_pre_norm_fwd_one_pass, SUFFIX)
  (x_map.tensor_map(), y_map.tensor_map(), h_post_in, h_res_in, phi, alpha, bias, norm_scale,
   reinterpret_cast<Stream*>(x_new), reinterpret_cast<Stream*>(u), h_pre, h_post, h_res, m, r, rho,
   kNormScaleEps, tokens, hidden, own_settings);
}
static void post_pre() {
  CONCAT(mhc_post_pre_fwd_one_pass, SUFFIX)
  (x_map.tensor_map(), y_map.tensor_map(), h_post_in, h_res_in, phi, alpha, bias,
   reinterpret_cast<Stream*>(x_new), reinterpret_cast<Stream*>(u), h_pre, h_post, h_res, m, r,
   tokens, hidden, own_settings);
}

// Divides the numbers of each row, or of each column, by their sum and eps.
static void normalise(double (&m)[N][N], bool rows, double eps) {
  for (int i = 0; i < N; ++i) {
    double sum = eps;
    for (int j = 0; j < N; ++j) sum += rows ? m[i][j] : m[j][i];
    for (int j = 0; j < N; ++j) (rows ? m[i][j] : m[j][i]) /= sum;
  }
}

// H_res of the logits of a token.
static void mix(const double* z, double (&mixed)[N][N]) {
  for (int i = 0; i < N; ++i) {
    for (int j = 0; j < N; ++j) {
      mixed[i][j] = kColumns == N * (N + 2) ? z[i * N + j] : kColumns == 2 * N && i == j;
    }
  }
  if (own_settings.constraint == Constraint::kBirkhoff) {
    const double eps = own_settings.sinkhorn_eps;
    for (auto& row : mixed) {
      for (double& value : row) value = std::exp(value);
    }
    normalise(mixed, own_settings.row_first, 0);
    for (auto& row : mixed) {
      for (double& value : row) value += eps;
    }
    normalise(mixed, !own_settings.row_first, eps);
    for (int i = 1; i < own_settings.sinkhorn_iters; ++i) {
      normalise(mixed, own_settings.row_first, eps);
      normalise(mixed, !own_settings.row_first, eps);
    }
  }
  if (kColumns <= N * (N + 2)) return;
  int images[N] = {0, 1, 2, 3};
  double all = 0;
  for (int p = 0; p < kColumns - 2 * N; ++p) all += std::exp(z[p]);
  for (int p = 0; p < kColumns - 2 * N; ++p, std::next_permutation(images, images + N)) {
    for (int i = 0; i < N; ++i) mixed[i][images[i]] += std::exp(z[p]) / all;
  }
}

int main(int, char** argv) {
  const Sizes sizes(argv);
  const bool is_post_pre = sizes.deferred, has_norm = sizes.seed >= 3;
  constexpr int K = kColumns;
  tokens = sizes.tokens, hidden = sizes.hidden;
  own_settings = settings();
  own_settings.constraint = K == 2 * N           ? Constraint::kIdentity
                            : K != N * (N + 2)   ? Constraint::kPermutations
                            : sizes.seed % 4 < 2 ? Constraint::kBirkhoff
                                                 : Constraint::kNone;
  own_settings.row_first = sizes.seed % 2;
  const size_t num = sizes.values();
  u16 *x = streams(num * N), *y = streams(num);
  x_new = guarded<u16>(num * N), u = guarded<u16>(num);
  const auto any = [](size_t) { return normal(); };
  phi = floats(size_t(N) * hidden * K, [](size_t) { return .02f * normal(); });
  alpha = floats(3, [](size_t i) { return .3f + .1f * i; });
  bias = floats(K, any), h_post_in = floats(size_t(tokens) * N, any);
  h_res_in = floats(size_t(tokens) * N * N, any);
  h_pre = guarded<float>(size_t(tokens) * N), h_post = guarded<float>(size_t(tokens) * N);
  h_res = guarded<float>(size_t(tokens) * N * N), m = guarded<float>(size_t(tokens) * K);
  r = guarded<float>(tokens), rho = guarded<float>(tokens), norm_scale = floats(hidden, any);
  const int boxes[2][2] = {{Plan<false, false>::kTokens, Plan<false, true>::kTokens},
                           {Plan<true, false>::kTokens, Plan<true, true>::kTokens}};
  const int box = boxes[is_post_pre][has_norm];
  void (*const kernels[2][2])() = {{pre, pre_norm}, {post_pre, post_pre_norm}};
  x_map = {x, tokens, N, hidden, 0, 1, box, SIZE, N};
  y_map = {y, tokens, 1, hidden, 0, 1, box, SIZE, 1};
  for (int c = 0; c < sizes.clusters; ++c) {
    emulated::run_cluster(c, sizes.clusters, sizes.ranks(SIZE), kThreads,
                          kernels[is_post_pre][has_norm], sizes.seed + c);
  }
  sizes.spoil(phi);

  Error of_u{"u", kRoundingError}, of_m{"m", kFloatError}, of_r{"r", kFloatError},
      of_h{"h", kFloatError}, of_rho{"rho", kFloatError};
  Error of_x_new{"x_new", kRoundingError};
  of_x_new.add(1, 1), of_rho.add(1, 1);
  std::vector<double> own(size_t(N) * hidden);
  for (int t = 0; t < tokens; ++t) {
    double squares = 0, z[K], mixed[N][N];
    for (int i = 0; i < N; ++i) {
      for (int c = 0; c < hidden; ++c) {
        const auto x_at = [&](int j) { return of_bf16(x[(size_t(t) * N + j) * hidden + c]); };
        double value = x_at(i);
        if (is_post_pre) {
          value = double(h_post_in[t * N + i]) * of_bf16(y[size_t(t) * hidden + c]);
          for (int j = 0; j < N; ++j) value += double(h_res_in[(t * N + i) * N + j]) * x_at(j);
          const u16 got = x_new[(size_t(t) * N + i) * hidden + c];
          of_x_new.add(of_bf16(got), value);
          // pre goes on with the streams that are rounded.
          value = of_bf16(got);
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
      of_m.add(m[t * K + k], norm * sum);
      z[k] = double(alpha[(k >= N) + (k >= 2 * N)]) * norm * sum + bias[k];
    }
    mix(z + 2 * N, mixed);
    for (int i = 0; i < N; ++i) {
      of_h.add(h_pre[t * N + i], logistic(z[i]) + settings().pre_eps);
      of_h.add(h_post[t * N + i], 2 * logistic(z[N + i]));
      for (int j = 0; j < N; ++j) of_h.add(h_res[(t * N + i) * N + j], mixed[i][j]);
    }
    std::vector<double> sums(hidden);
    double squares_of_u = 0;
    for (int c = 0; c < hidden; ++c) {
      for (int i = 0; i < N; ++i) {
        sums[c] += (logistic(z[i]) + settings().pre_eps) * own[i * hidden + c];
      }
      squares_of_u += sums[c] * sums[c];
    }
    const double norm_of_u = 1 / std::sqrt(squares_of_u / hidden + kNormScaleEps);
    if (has_norm) of_rho.add(rho[t], norm_of_u);
    for (int c = 0; c < hidden; ++c) {
      const double scale = has_norm ? norm_of_u * norm_scale[c] : 1;
      of_u.add(of_bf16(u[size_t(t) * hidden + c]), scale * sums[c]);
    }
  }
}
