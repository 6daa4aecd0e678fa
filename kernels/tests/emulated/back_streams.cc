// project_back_streams on a CPU against float64.

#include "two_pass/back_streams.cu"

constexpr int kBlockChannels = kSets * kChannels;

#include "back_mixing.h"

static void back() {
#if EXACT
  const auto kernel = &CONCAT(mhc_project_back_streams, SUFFIX);
#else
  const auto kernel = hidden % 8 ? &CONCAT(mhc_project_back_streams_unaligned, SUFFIX)
                                 : &CONCAT(mhc_project_back_streams, SUFFIX);
#endif
  kernel(x, phi, rows, columns, h_pre, factors, d_u, d_x_in, h_res, d_x, tokens, n, hidden, groups);
}
