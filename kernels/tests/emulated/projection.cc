// phi_fragments, project_tiled and d_phi on a CPU against float64.

#include "two_pass/projection.cu"

#include "check.h"

namespace tiled {
alignas(16) char stage_bytes[emulated::kSharedBytes];
}
namespace phi_gradient {
alignas(16) char stage_bytes[emulated::kSharedBytes];
}
namespace back {
uint4 shared[1];
}

static const Stream* x;
static const float* phi;
static uint2* fragments;
static float *partial, *d_phi_partial;
static u32 *rows, *r_dm_columns;
static int tokens, width, columns, slice, octets, chunks, stages, is_aligned;

static void cut_phi() {
  CONCAT(mhc_phi_fragments, SUFFIX)(phi, fragments, width, columns, octets, chunks, is_aligned);
}
static void project_rows() {
#if EXACT
  const auto kernel = &CONCAT(mhc_project_tiled, SUFFIX);
#else
  const auto kernel = is_aligned ? &CONCAT(mhc_project_tiled, SUFFIX)
                                 : &CONCAT(mhc_project_tiled_unaligned, SUFFIX);
#endif
  kernel(x, fragments, partial, tokens, width, columns, slice, octets, chunks, stages);
}
static void sum_d_phi() {
#if EXACT
  const auto kernel = &CONCAT(mhc_d_phi, SUFFIX);
#else
  const auto kernel =
      is_aligned ? &CONCAT(mhc_d_phi, SUFFIX) : &CONCAT(mhc_d_phi_unaligned, SUFFIX);
#endif
  kernel(x, rows, r_dm_columns, columns, d_phi_partial, tokens, width, octets, chunks, stages);
}

static void run_blocks(char* shared, int blocks, int block_rows, void (*body)(), unsigned seed) {
  emulated::static_memory = reinterpret_cast<unsigned char*>(shared);
  emulated::num_rows = block_rows;
  for (int y = 0; y < block_rows; ++y) {
    emulated::row_of_blocks = y;
    for (int b = 0; b < blocks; ++b) emulated::run_cluster(b, blocks, 1, kThreads, body, seed + b);
  }
}
static int ceiling(int a, int b) { return (a + b - 1) / b; }

// n C, tokens, splits of them, chunks of the columns; the seed; whether float64 gets another phi; then the columns and
// whether rows are aligned.
int main(int, char** argv) {
  const Sizes sizes(argv);
  width = sizes.hidden, tokens = sizes.tokens, columns = atoi(argv[7]), is_aligned = atoi(argv[8]);
  const int all_octets = ceiling(columns, 8), splits = sizes.clusters;
  chunks = sizes.deferred, octets = ceiling(all_octets, chunks), stages = 3;
  slice = 64;
  x = reinterpret_cast<Stream*>(streams(sizes.values()));
  phi = floats(size_t(width) * columns, [](size_t) { return .1f * normal(); });
  const int stage_fragments = tiled::num_fragments(octets) * chunks;
  const int slices = ceiling(width, slice), row_length = all_octets * 8 + 2;
  fragments = reinterpret_cast<uint2*>(guarded<u32>(2 * stage_fragments * ceiling(width, 32)));
  partial = guarded<float>(size_t(tokens) * slices * row_length);
  run_blocks(tiled::stage_bytes, ceiling(stage_fragments * ceiling(width, 32) / kWeight, kThreads),
             1, cut_phi, sizes.seed);
  run_blocks(tiled::stage_bytes, ceiling(tokens, tiled::kBlockTokens) * chunks, slices,
             project_rows, sizes.seed);
  sizes.spoil(phi);

  Error of_products{"products", kFloatError}, of_squares{"squares", kFloatError};
  for (int t = 0; t < tokens; ++t) {
    const auto summed = [&](int c) {
      double sum = 0;
      for (int s = 0; s < slices; ++s) sum += partial[(size_t(t) * slices + s) * row_length + c];
      return sum;
    };
    std::vector<double> sums(columns + 1);
    for (int k = 0; k < width; ++k) {
      const double value = wide(x[size_t(t) * width + k]);
      sums[columns] += value * value;
      for (int c = 0; c < columns; ++c) sums[c] += value * phi[size_t(k) * columns + c];
    }
    for (int c = 0; c < columns; ++c) of_products.add(summed(c), sums[c]);
    of_squares.add(summed(row_length - 2), sums[columns]);
  }

  Fragments dm{nullptr, nullptr, columns};
  const int tiles = ceiling(tokens, kTile);
  dm.rows = rows = guarded<u32>(size_t(tiles) * dm.hexets() * 128);
  dm.columns = r_dm_columns = guarded<u32>(size_t(tiles) * dm.octets() * 128);
  std::vector<float> r_dm(size_t(tokens) * columns);
  for (int t = 0; t < tiles * kTile; ++t) {
    for (int c = 0; c < dm.hexets() * 16; ++c) {
      const bool exists = t < tokens && c < columns;
      const float value = exists ? normal() : 0.f;
      if (exists) r_dm[size_t(t) * columns + c] = value;
      dm.set<Stream>(t, c, value, 1.f);
    }
  }
  chunks = ceiling(all_octets, phi_gradient::kOctets), octets = ceiling(all_octets, chunks);
  const size_t size = size_t(width) * columns;
  d_phi_partial = guarded<float>(splits * size);
  run_blocks(phi_gradient::stage_bytes, ceiling(width, phi_gradient::kWarps * kChannels) * chunks,
             splits, sum_d_phi, sizes.seed);
  Error of_d_phi{"d_phi", kFloatError};
  for (int k = 0; k < width; ++k) {
    for (int c = 0; c < columns; ++c) {
      double sum = 0;
      for (int t = 0; t < tokens; ++t) {
        sum += double(wide(x[size_t(t) * width + k])) * r_dm[size_t(t) * columns + c];
      }
      of_d_phi.add(sum_of_arrays(d_phi_partial, splits, size, size_t(k) * columns + c), sum);
    }
  }
}
