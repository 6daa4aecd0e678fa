// Further common parts of the checks of kernels that mix all streams. `kBlockChannels` are the channels of a stream that a
// block has.

#pragma once

uint4 shared[1];
constexpr bool kMixes = true;

#include "back.h"

static int groups;

// The kernel.
static void back();

static void run(const Sizes& sizes) {
  groups = (hidden + kBlockChannels - 1) / kBlockChannels;
  for (int c = 0; c < sizes.clusters * groups; ++c) {
    emulated::run_cluster(c, sizes.clusters * groups, 1, kThreads, back, sizes.seed + c);
  }
}
