// phi_bwd on a CPU against float64.

#include "one_pass/phi_bwd.cu"

#include "maps.h"

unsigned char shared[1];

static StreamMaps x_maps, y_maps;
static const float *h_post, *h_res;
static u16* r_dm;
static float* d_phi;
static int tokens, hidden;

static void body() {
  CONCAT(mhc_phi_bwd, SUFFIX)
  (x_maps.block_maps(), y_maps.block_maps(), reinterpret_cast<const float4*>(h_post),
   reinterpret_cast<const float4*>(h_res), reinterpret_cast<const uint4*>(r_dm), d_phi, tokens,
   hidden);
}

// `clusters` are blocks that divide the tokens.
int main(int, char** argv) {
  const Sizes sizes(argv);
  constexpr int K = kColumns;
  tokens = sizes.tokens, hidden = sizes.hidden;
  const size_t num = sizes.values(), num_phi = size_t(N) * hidden * K;
  Stream *x = streams<Stream>(num * N), *y = streams<Stream>(num);
  const auto any = [](size_t) { return normal(); };
  h_post = floats(size_t(tokens) * N, any), h_res = floats(size_t(tokens) * N * N, any);
  r_dm = guarded<u16>(size_t(tokens) * 2 * K);
  const auto place = [](int t, int k, int part) { return (size_t(t) * 2 + part) * K + k; };
  for (int t = 0; t < tokens; ++t) {
    for (int k = 0; k < K; ++k) {
      const float value = normal();
      r_dm[place(t, k, 0)] = to_bf16(value);
      r_dm[place(t, k, 1)] = to_bf16(value - of_bf16(to_bf16(value)));
    }
  }
  const int rows = sizes.clusters, slices = sizes.ranks(SIZE);
  d_phi = guarded<float>(rows * sum_numbers(hidden));
  const auto map = [&](Stream* values, int num_streams) {
    return StreamMaps(values, tokens, num_streams, hidden, kTokens);
  };
  x_maps = map(x, N), y_maps = map(y, 1);
  emulated::num_rows = rows;
  for (int row = 0; row < rows; ++row) {
    emulated::row_of_blocks = row;
    for (int slice = 0; slice < slices; ++slice) {
      emulated::run_cluster(slice, slices, 1, kThreads, body, sizes.seed + row);
    }
  }
  sizes.spoil(h_post);

  std::vector<double> exact(num_phi);
  for (int t = 0; t < tokens; ++t) {
    for (int i = 0; i < N; ++i) {
      for (int c = 0; c < hidden; ++c) {
        double value = double(h_post[t * N + i]) * wide(y[size_t(t) * hidden + c]);
        for (int j = 0; j < N; ++j) {
          value += double(h_res[(t * N + i) * N + j]) * wide(x[(size_t(t) * N + j) * hidden + c]);
        }
        // As the forward pass rounds it.
        Stream rounded;
        set(rounded, float(value));
        value = wide(rounded);
        for (int k = 0; k < K; ++k) {
          const double own = double(of_bf16(r_dm[place(t, k, 0)])) + of_bf16(r_dm[place(t, k, 1)]);
          exact[(size_t(i) * hidden + c) * K + k] += value * own;
        }
      }
    }
  }
  Error error{"d_phi", of_stream(kProductsError, kFloatError, 0)};
  for (size_t i = 0; i < num_phi; ++i) error.add(sum_of_d_phi(d_phi, rows, hidden, i), exact[i]);
}
