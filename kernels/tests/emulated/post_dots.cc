// post_dots_fwd on a CPU against float64.

#include "post_dots.cu"

#include "emulator.h"
#include "mixed.h"

static Stream *x, *y, *d_u, *x_new;
static float *h_post, *h_res, *dots;
static int tokens, n, hidden;

static void run() {
  CONCAT(mhc_post_dots_fwd, SUFFIX)
  (x, y, h_post, h_res, d_u, x_new, dots, tokens, tokens, n, hidden);
}

// C, tokens; two numbers that say nothing; the seed; whether float64 gets another H_res; then n.
int main(int, char** argv) {
  const Sizes sizes(argv);
  tokens = sizes.tokens, hidden = sizes.hidden, n = atoi(argv[7]);
  const size_t num = sizes.values() * n;
  const int warps = (hidden + kChannels - 1) / kChannels;
  const auto make = [](size_t values) { return reinterpret_cast<Stream*>(streams(values)); };
  x = make(num), y = make(sizes.values()), d_u = make(sizes.values());
  x_new = reinterpret_cast<Stream*>(guarded<u16>(num));
  const auto any = [](size_t) { return normal(); };
  h_res = floats(size_t(tokens) * n * n, any), h_post = floats(size_t(tokens) * n, any);
  dots = guarded<float>(size_t(tokens) * warps * n);
  const int blocks = (tokens * warps * 32 + kThreads - 1) / kThreads;
  for (int b = 0; b < blocks; ++b) {
    emulated::run_cluster(b, blocks, 1, kThreads, run, sizes.seed + b);
  }
  sizes.spoil(h_res);

  check_mixed(x_new, x, y, h_res, h_post, tokens, n, hidden);
  Error of_dots{"dots", kFloatError};
  for (int t = 0; t < tokens; ++t) {
    for (int w = 0; w < warps; ++w) {
      for (int i = 0; i < n; ++i) {
        double sum = 0;
        for (int c = w * kChannels; c < hidden && c < (w + 1) * kChannels; ++c) {
          sum += double(wide(x_new[(size_t(t) * n + i) * hidden + c])) *
                 wide(d_u[size_t(t) * hidden + c]);
        }
        of_dots.add(dots[(size_t(t) * warps + w) * n + i], sum);
      }
    }
  }
}
