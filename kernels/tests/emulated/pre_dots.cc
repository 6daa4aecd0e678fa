// pre_bwd of two_pass/pre.cu on a CPU: with the dots that it reads X for otherwise it has to make the same.

#include "emulator.h"

// Blocks run one at a time, and all threads in one of the machine's.
#undef __shared__
#define __shared__ thread_local

#include "check.h"
#include "two_pass/pre.cu"

thread_local float shared_history[1 << 15];

// What pre_bwd makes, and from what.
struct Results {
  u32 *rows, *columns;
  float *h_pre, *gates;
  float2* factors;
};
static Stream *x, *d_u;
static float *alpha, *bias, *m, *r, *d_h_pre, *d_h_post, *d_h_res, *dots, *history;
static Results results;
static int tokens, n, hidden, columns, num_dots;

static void run() {
  Layout layout;
  layout.n = n, layout.num_post = n, layout.num_res = n * n;
  CONCAT(mhc_pre_bwd, SUFFIX)
  (x, alpha, bias, m, r, d_u, d_h_pre, d_h_post, d_h_res, results.rows, results.columns,
   results.h_pre, results.factors, results.gates, history, tokens, hidden, columns, layout,
   settings(), num_dots ? dots : nullptr, num_dots);
}

// Both kinds of launches have as much of everything.
static Results run_all(int blocks, int threads, unsigned seed) {
  const int tiles = (tokens + kTile - 1) / kTile;
  const size_t rows = size_t(tiles) * ((columns + 15) / 16) * 32 * 4;
  const size_t of_columns = size_t(tiles) * ((columns + 7) / 8) * 2 * 32 * 2;
  results = {guarded<u32>(rows), guarded<u32>(of_columns), guarded<float>(size_t(tokens) * n),
             guarded<float>(size_t(blocks) * (columns + 3)),
             reinterpret_cast<float2*>(guarded<float>(size_t(tokens) * 2))};
  for (int b = 0; b < blocks; ++b) {
    emulated::run_cluster(b, blocks, 1, threads, run, seed + b);
  }
  return results;
}

static double both(u32 pair, int half) { return wide(bf16{u16(pair >> 16 * half)}); }

// C, tokens; how many sums are dots; whether Sinkhorn's record is in memory; the seed; whether the dots are others; then n.
int main(int, char** argv) {
  const Sizes sizes(argv);
  tokens = sizes.tokens, hidden = sizes.hidden, n = atoi(argv[7]), columns = n * (n + 2);
  const auto any = [](size_t) { return normal(); };
  x = reinterpret_cast<Stream*>(streams(sizes.values() * n));
  d_u = reinterpret_cast<Stream*>(streams(sizes.values()));
  alpha = floats(3, any), bias = floats(columns, any), m = floats(size_t(tokens) * columns, any);
  r = floats(tokens, [](size_t) { return 0.5f + std::abs(normal()); });
  d_h_pre = floats(size_t(tokens) * n, any), d_h_post = floats(size_t(tokens) * n, any);
  d_h_res = floats(size_t(tokens) * n * n, any);
  const int blocks = 2 * ((tokens + 2 * kTokens - 1) / (2 * kTokens));
  const int recorded = 2 * settings().sinkhorn_iters * 32;
  history = sizes.deferred
                ? guarded<float>(size_t(blocks) * max(kMatrixWarps, kBusyWarps) * recorded)
                : nullptr;
  const Results expected = run_all(blocks, kThreads, sizes.seed);

  num_dots = sizes.clusters;
  dots = floats(size_t(tokens) * num_dots * n, any);
  for (int t = 0; t < tokens; ++t) {
    for (int i = 0; i < n; ++i) {
      double sum = 0;
      for (int c = 0; c < hidden; ++c) {
        sum +=
            double(wide(x[(size_t(t) * n + i) * hidden + c])) * wide(d_u[size_t(t) * hidden + c]);
      }
      const auto dot = [&](int p) -> float& { return dots[(size_t(t) * num_dots + p) * n + i]; };
      for (int p = 1; p < num_dots; ++p) sum -= dot(p);
      dot(0) = float(sum);
    }
  }
  sizes.spoil(dots);
  x = nullptr, d_u = nullptr;
  const Results got = run_all(blocks, 32 * kBusyWarps, sizes.seed);

  Error of_h_pre{"h_pre", kFloatError}, of_gates{"gates", kFloatError};
  Error of_factors{"factors", kFloatError}, of_columns{"r dm", kFloatError};
  Error of_rows{"r dm in float16", 1e-3};
  for (int v = 0; v < tokens * n; ++v) of_h_pre.add(got.h_pre[v], expected.h_pre[v]);
  for (int v = 0; v < blocks * (columns + 3); ++v) of_gates.add(got.gates[v], expected.gates[v]);
  for (int t = 0; t < tokens; ++t) of_factors.add(got.factors[t].x, expected.factors[t].x);
  const int tiles = (tokens + kTile - 1) / kTile, octets = (columns + 7) / 8;
  for (int octet = 0; octet < tiles * octets; ++octet) {
    for (int w = 0; w < 64; ++w) {
      for (int half = 0; half < 2; ++half) {
        const auto sum = [&](const u32* from) {
          return both(from[octet * 128 + w], half) + both(from[octet * 128 + 64 + w], half);
        };
        of_columns.add(sum(got.columns), sum(expected.columns));
      }
    }
  }
  for (int w = 0; w < tiles * ((columns + 15) / 16) * 128; ++w) {
    for (int half = 0; half < 2; ++half) {
      const auto value = [&](const u32* from) {
        return double(wide(f16{u16(from[w] >> 16 * half)}));
      };
      of_rows.add(value(got.rows), value(expected.rows));
    }
  }
}
