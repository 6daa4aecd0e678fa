// post_given_fwd on a CPU against float64.

#include "given/post_given_fwd.cu"

#include "maps.h"

unsigned char shared[1];

static StreamMaps x_maps, y_maps, x_new_maps, u_maps;
static const float *h_post, *h_res, *h_given, *phi;
static float *sums, *squares;
static int tokens, hidden;

static void body() {
  CONCAT(mhc_post_given_fwd, SUFFIX)
  (x_maps.block_maps(), y_maps.block_maps(), x_new_maps.block_maps(), u_maps.block_maps(), h_post,
   h_res, h_given, phi, reinterpret_cast<float4*>(sums), squares, tokens, hidden);
}

// `clusters` are blocks that divide the tokens. Where an even number of blocks divides the channels, two are a cluster.
int main(int, char** argv) {
  const Sizes sizes(argv);
  constexpr int K = kColumns;
  tokens = sizes.tokens, hidden = sizes.hidden;
  const size_t num = sizes.values();
  Stream *x = streams<Stream>(num * N), *y = streams<Stream>(num);
  Stream *x_new = guarded<Stream>(num * N), *u = guarded<Stream>(num);
  const auto any = [](size_t) { return normal(); };
  h_post = floats(size_t(tokens) * N, any), h_res = floats(size_t(tokens) * N * N, any);
  h_given = floats(size_t(tokens) * N, any);
  // Some columns are small beside the others.
  const auto scale_of = [](int k) { return k % 4 == 3 ? 0x1p-20f : 1.f; };
  phi = floats(size_t(N) * hidden * K, [&](size_t i) { return .02f * scale_of(i % K) * normal(); });
  const int rows = sizes.clusters, blocks = sizes.ranks(SIZE), ranks = blocks % 2 ? 1 : 2;
  const int slices = blocks / ranks;
  sums = guarded<float>(size_t(tokens) * slices * K);
  squares = guarded<float>(size_t(tokens) * slices);
  const auto map = [&](Stream* values, int num_streams) {
    return StreamMaps(values, tokens, num_streams, hidden, kTokens);
  };
  x_maps = map(x, N), y_maps = map(y, 1), x_new_maps = map(x_new, N), u_maps = map(u, 1);
  emulated::num_rows = rows;
  for (int row = 0; row < rows; ++row) {
    emulated::row_of_blocks = row;
    for (int slice = 0; slice < slices; ++slice) {
      emulated::run_cluster(slice, slices, ranks, kThreads, body, sizes.seed + row);
    }
  }
  sizes.spoil(phi);

  constexpr double kStreamError = of_stream(kRoundingError, kHalfRoundingError, 1e-6);
  constexpr double kSumsError = of_stream(kFloatError, 1e-6, 2e-6);
  Error of_x_new{"x_new", kStreamError}, of_u{"u", kStreamError};
  Error of_products{"products", kSumsError}, of_squares{"squares", kSumsError};
  std::vector<double> collapsed(hidden);
  for (int t = 0; t < tokens; ++t) {
    double own_sums[K] = {}, own_squares = 0;
    std::fill(collapsed.begin(), collapsed.end(), 0);
    for (int i = 0; i < N; ++i) {
      for (int c = 0; c < hidden; ++c) {
        double value = double(h_post[t * N + i]) * wide(y[size_t(t) * hidden + c]);
        for (int j = 0; j < N; ++j) {
          value += double(h_res[(t * N + i) * N + j]) * wide(x[(size_t(t) * N + j) * hidden + c]);
        }
        const float got = wide(x_new[(size_t(t) * N + i) * hidden + c]);
        of_x_new.add(got, value);
        // What follows is of the streams that are rounded.
        own_squares += double(got) * got;
        collapsed[c] += double(h_given[t * N + i]) * got;
        const float* row = phi + (size_t(i) * hidden + c) * K;
        for (int k = 0; k < K; ++k) own_sums[k] += double(got) * row[k];
      }
    }
    for (int c = 0; c < hidden; ++c) of_u.add(wide(u[size_t(t) * hidden + c]), collapsed[c]);
    const float* own = sums + size_t(t) * slices * K;
    for (int k = 0; k < K; ++k) {
      of_products.add(sum_of_arrays(own, slices, K, k) / scale_of(k), own_sums[k] / scale_of(k));
    }
    of_squares.add(sum_of_arrays(squares + size_t(t) * slices, slices, 1, 0), own_squares);
  }
}
