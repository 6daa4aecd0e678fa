// phi_fragments, project_tiled and d_phi on a CPU against float64.

#include "two_pass/projection.cu"

#include "products.h"

namespace tiled {
alignas(16) char stage_bytes[emulated::kSharedBytes];
}
namespace phi_gradient {
alignas(16) char stage_bytes[emulated::kSharedBytes];
}
namespace back {
uint4 shared[1];
}

static uint2* fragments;
static int slice, octets, chunks, stages, is_aligned;

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

// n C, tokens, splits of them, chunks of the columns; the seed; whether float64 gets another phi; then the columns and
// whether rows are aligned.
int main(int, char** argv) {
  const Sizes sizes(argv);
  width = sizes.hidden, tokens = sizes.tokens, columns = atoi(argv[7]), is_aligned = atoi(argv[8]);
  const int all_octets = ceiling(columns, 8), splits = sizes.clusters;
  chunks = sizes.deferred, octets = ceiling(all_octets, chunks), stages = 3;
  slice = 64;
  make_operands(sizes, slice, splits);
  const int stage_fragments = tiled::num_fragments(octets) * chunks * ceiling(width, 32);
  fragments = reinterpret_cast<uint2*>(guarded<u32>(2 * stage_fragments));
  run_blocks(tiled::stage_bytes, kThreads, ceiling(stage_fragments / kWeight, kThreads), 1, cut_phi,
             sizes.seed);
  run_blocks(tiled::stage_bytes, kThreads, ceiling(tokens, tiled::kBlockTokens) * chunks, slices,
             project_rows, sizes.seed);
  chunks = ceiling(all_octets, phi_gradient::kOctets), octets = ceiling(all_octets, chunks);
  run_blocks(phi_gradient::stage_bytes, kThreads,
             ceiling(width, phi_gradient::kWarps * kChannels) * chunks, splits, sum_d_phi,
             sizes.seed);
  sizes.spoil(phi);
  check_products();
  check_d_phi(splits);
}
