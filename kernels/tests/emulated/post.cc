// post_fwd, `mix` and post_bwd of many streams on a CPU against float64.

#include "emulator.h"

// Blocks run one at a time.
#undef __shared__
#define __shared__ static

#include "mixed.h"
#include "post.cu"

static Stream *x, *y, *x_new;
static const float *h_post, *h_res;
static int tokens, n, hidden;

#if EXACT
#define FOR_ROWS(name) CONCAT(mhc_##name, SUFFIX)
#else
#define FOR_ROWS(name) \
  (hidden % 8 ? CONCAT(mhc_##name##_unaligned, SUFFIX) : CONCAT(mhc_##name, SUFFIX))
#endif

static void run_post() {
  FOR_ROWS(post_fwd)(x, y, h_post, h_res, x_new, tokens, tokens, n, hidden);
}
static Stream* d_y;
static float *d_h_post, *d_h_res;
static void run_post_bwd() {
  FOR_ROWS(post_bwd)(x_new, y, h_post, x, d_y, d_h_post, d_h_res, n, hidden);
}

// The gradients, with some streams in the place of X.
static void check_post_bwd(const Sizes& sizes) {
  x_new = reinterpret_cast<Stream*>(streams(sizes.values() * n));
  d_y = reinterpret_cast<Stream*>(guarded<u16>(sizes.values()));
  d_h_post = guarded<float>(size_t(tokens) * n), d_h_res = guarded<float>(size_t(tokens) * n * n);
  for (int t = 0; t < tokens; ++t) {
    emulated::run_cluster(t, tokens, 1, 64, run_post_bwd, sizes.seed + t);
  }
  Error of_d_y{"d_y", kRoundingError}, of_d_h_post{"d_h_post", kFloatError};
  Error of_d_h_res{"d_h_res", kFloatError};
  for (int t = 0; t < tokens; ++t) {
    const auto at = [&](const Stream* from, int i, int c) {
      return double(wide(from[(size_t(t) * n + i) * hidden + c]));
    };
    for (int c = 0; c < hidden; ++c) {
      double sum = 0;
      for (int i = 0; i < n; ++i) sum += h_post[t * n + i] * at(x, i, c);
      of_d_y.add(wide(d_y[size_t(t) * hidden + c]), sum);
    }
    for (int i = 0; i < n; ++i) {
      double with_y = 0;
      for (int c = 0; c < hidden; ++c) with_y += at(x, i, c) * wide(y[size_t(t) * hidden + c]);
      of_d_h_post.add(d_h_post[t * n + i], with_y);
      for (int j = 0; j < n; ++j) {
        double sum = 0;
        for (int c = 0; c < hidden; ++c) sum += at(x, i, c) * at(x_new, j, c);
        of_d_h_res.add(d_h_res[(size_t(t) * n + i) * n + j], sum);
      }
    }
  }
}

static void run_mix() { FOR_ROWS(mix)(x, h_res, x, tokens, tokens, n, hidden); }

// C, tokens; whether it is `mix`, in place; the seed; whether float64 gets another H_res; then n.
int main(int, char** argv) {
  const Sizes sizes(argv);
  const bool is_mix = sizes.deferred;
  tokens = sizes.tokens, hidden = sizes.hidden, n = atoi(argv[7]);
  const size_t num = sizes.values() * n;
  x = reinterpret_cast<Stream*>(streams(num)),
  y = reinterpret_cast<Stream*>(streams(sizes.values()));
  x_new = is_mix ? x : reinterpret_cast<Stream*>(guarded<u16>(num));
  const std::vector<Stream> given(x, x + num);
  const auto any = [](size_t) { return normal(); };
  h_res = floats(size_t(tokens) * n * n, any), h_post = floats(size_t(tokens) * n, any);
  const int threads =
      kMixesByWarps ? (hidden + kWarpChannels - 1) / kWarpChannels * 32 : (hidden + V - 1) / V;
  const int blocks = (tokens * threads + kThreads - 1) / kThreads;
  for (int b = 0; b < blocks; ++b) {
    emulated::run_cluster(b, blocks, 1, kThreads, is_mix ? run_mix : run_post, sizes.seed + b);
  }
  sizes.spoil(h_res);

  check_mixed(x_new, given.data(), is_mix ? nullptr : y, h_res, h_post, tokens, n, hidden);
  check_post_bwd(sizes);
}
