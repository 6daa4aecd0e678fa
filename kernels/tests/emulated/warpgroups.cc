// The kernels of warpgroups.cu on a CPU against float64.

#include "two_pass/warpgroups.cu"

#include "products.h"

unsigned char memory[1];

static uint4 *phi_of_lines, *r_dm_of_lines;
static Map x_of_tokens, x_of_channels;
static int slice, splits, chunks;

static void cut_phi() { CONCAT(mhc_phi_lines, SUFFIX)(phi, phi_of_lines, width, columns, chunks); }
static void project() {
  CONCAT(mhc_project_lines, SUFFIX)
  (x_of_tokens.tensor_map(), phi_of_lines, partial, tokens, width, columns, slice, chunks);
}
static void cut_r_dm() {
  CONCAT(mhc_r_dm_lines, SUFFIX)(r_dm_columns, r_dm_of_lines, tokens, columns, chunks);
}
static void sum_d_phi() {
  CONCAT(mhc_d_phi_lines, SUFFIX)
  (x_of_channels.tensor_map(), r_dm_of_lines, d_phi_partial, tokens, width, columns, splits,
   chunks);
}

// n C, tokens, splits of them, clusters; the seed; whether float64 gets another phi; then the columns.
int main(int, char** argv) {
  const Sizes sizes(argv);
  width = sizes.hidden, tokens = sizes.tokens, splits = sizes.clusters, columns = atoi(argv[7]);
  const int clusters = sizes.deferred;
  chunks = ceiling(columns, kColumns), slice = 128;
  make_operands(sizes, slice, splits);
  x_of_tokens = {(void*)x, tokens, 1, width, 0, 1, forward::kTokens, kLine, 1};
  x_of_channels = {(void*)x, tokens, 1, width, 0, 1, kLine, gradient::kChannels, 1};
  const auto lines = [&](int groups) {
    return reinterpret_cast<uint4*>(guarded<u32>(size_t(groups) * chunks * kRightLines * 4));
  };
  const int of_width = width / kLine, of_tokens = ceiling(tokens, kLine);
  phi_of_lines = lines(of_width), r_dm_of_lines = lines(of_tokens);

  const auto run = [&](int num, void (*body)()) {
    run_blocks(nullptr, 256, ceiling(num, 256), 1, body, sizes.seed);
  };
  const auto run_pairs = [&](int threads, void (*body)()) {
    for (int c = 0; c < clusters; ++c) {
      emulated::run_cluster(c, clusters, kBlocks, threads, body, sizes.seed + c);
    }
  };
  run(of_width * chunks * kUnits * kColumns, cut_phi);
  run_pairs(tuning_project_lines::threads, project);
  run(of_tokens * chunks * kParts * kColumns * 4, cut_r_dm);
  run_pairs(tuning_d_phi_lines::threads, sum_d_phi);
  sizes.spoil(phi);
  check_products();
  check_d_phi(splits);
}
