// Common parts of the checks of kernels that make d_x: their operands, and what float64 says. `kMixes` is whether d_x_in is
// deferred.

#pragma once

#include "check.h"

static Stream *x, *d_u, *d_x_in, *d_x;
static const float *phi, *h_pre, *h_res;
static u32* rows;
static float2* factors;
static int tokens, n, hidden, columns;

// The kernels.
static void run(const Sizes& sizes);

// C, tokens, blocks that share the tokens, and whether d_x_in and d_x lie in one place; the seed; whether float64 gets
// another phi; then n and the columns of phi.
int main(int, char** argv) {
  const Sizes sizes(argv);
  tokens = sizes.tokens, hidden = sizes.hidden;
  n = atoi(argv[7]), columns = atoi(argv[8]);
  const auto any = [](size_t) { return normal(); };
  const size_t num = sizes.values();
  x = reinterpret_cast<Stream*>(streams(num * n)), d_u = reinterpret_cast<Stream*>(streams(num));
  d_x_in = reinterpret_cast<Stream*>(streams(num * n));
  d_x = sizes.deferred ? d_x_in : reinterpret_cast<Stream*>(guarded<u16>(num * n));
  const std::vector<Stream> deferred(d_x_in, d_x_in + num * n);
  phi = floats(size_t(n) * hidden * columns, [](size_t) { return .1f * normal(); });
  h_pre = floats(size_t(tokens) * n, any), h_res = floats(size_t(tokens) * n * n, any);
  factors = reinterpret_cast<float2*>(guarded<float>(2 * tokens));
  const int tiles = (tokens + kTile - 1) / kTile;
  Fragments dm{nullptr, nullptr, columns};
  dm.rows = rows = guarded<u32>(size_t(tiles) * dm.hexets() * 128);
  dm.columns = guarded<u32>(size_t(tiles) * dm.octets() * 128);
  std::vector<float> r_dm(size_t(tokens) * columns);
  for (int t = 0; t < tiles * kTile; ++t) {
    const float unit = std::exp2(float(int(numbers() % 9)) - 4);
    if (t < tokens) factors[t] = {normal(), unit};
    for (int c = 0; c < dm.hexets() * 16; ++c) {
      const bool exists = t < tokens && c < columns;
      const float value = exists ? normal() : 0.f;
      if (exists) r_dm[size_t(t) * columns + c] = value;
      dm.set<Stream>(t, c, value, 1 / unit);
    }
  }
  run(sizes);
  sizes.spoil(phi);

  Error of_d_x{"d_x", kRoundingError};
  for (int t = 0; t < tokens; ++t) {
    for (int j = 0; j < n; ++j) {
      for (int c = 0; c < hidden; ++c) {
        const size_t at = (size_t(t) * n + j) * hidden + c;
        double sum = double(h_pre[t * n + j]) * wide(d_u[size_t(t) * hidden + c]) -
                     double(factors[t].x) * wide(x[at]);
        if (!kMixes) sum += wide(deferred[at]);
        for (int i = 0; kMixes && i < n; ++i) {
          sum +=
              double(h_res[(t * n + i) * n + j]) * wide(deferred[(size_t(t) * n + i) * hidden + c]);
        }
        for (int k = 0; k < columns; ++k) {
          sum +=
              double(r_dm[size_t(t) * columns + k]) * phi[(size_t(j) * hidden + c) * columns + k];
        }
        of_d_x.add(wide(d_x[at]), sum);
      }
    }
  }
}
