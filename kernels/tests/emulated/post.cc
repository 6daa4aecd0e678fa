// post_fwd and `mix` of many streams on a CPU against float64.

#include "post.cu"

#include "check.h"

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
  const int warps = tokens * ((hidden + kWarpChannels - 1) / kWarpChannels);
  const int blocks = (warps * 32 + kThreads - 1) / kThreads;
  for (int b = 0; b < blocks; ++b) {
    emulated::run_cluster(b, blocks, 1, kThreads, is_mix ? run_mix : run_post, sizes.seed + b);
  }
  sizes.spoil(h_res);

  Error of_x_new{"x_new", kRoundingError};
  for (int t = 0; t < tokens; ++t) {
    for (int i = 0; i < n; ++i) {
      for (int c = 0; c < hidden; ++c) {
        double sum = is_mix ? 0 : double(h_post[t * n + i]) * wide(y[size_t(t) * hidden + c]);
        for (int j = 0; j < n; ++j) {
          const float* own = h_res + size_t(t) * n * n;
          sum += double(is_mix ? own[j * n + i] : own[i * n + j]) *
                 wide(given[(size_t(t) * n + j) * hidden + c]);
        }
        of_x_new.add(wide(x_new[(size_t(t) * n + i) * hidden + c]), sum);
      }
    }
  }
}
