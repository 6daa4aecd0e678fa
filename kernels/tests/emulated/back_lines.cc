// The kernels of back_lines.cu on a CPU against float64.

#include "two_pass/back_lines.cu"

unsigned char memory[1];
constexpr bool kMixes = false;

#include "back.h"

static uint4* lines;
static float* units;

static void cut_phi() {
  CONCAT(mhc_phi_back_lines, SUFFIX)(phi, lines, units, n * hidden, columns);
}
static void back() {
  CONCAT(mhc_project_back_lines, SUFFIX)
  (x, lines, units, rows, columns, h_pre, factors, d_u, d_x_in, d_x, tokens, n, hidden);
}

static void run(const Sizes& sizes) {
  const int groups = n * hidden / kGroup, blocks = (groups + kGroups - 1) / kGroups;
  lines = reinterpret_cast<uint4*>(guarded<u32>(size_t(groups) * kGroupBytes / 4));
  units = guarded<float>(groups * 8);
  for (int b = 0; b < groups; ++b) emulated::run_cluster(b, groups, 1, 256, cut_phi, sizes.seed);
  emulated::num_rows = sizes.clusters;
  for (int y = 0; y < sizes.clusters; ++y) {
    emulated::row_of_blocks = y;
    for (int b = 0; b < blocks; ++b) {
      emulated::run_cluster(b, blocks, 1, kThreads, back, sizes.seed + b);
    }
  }
}
