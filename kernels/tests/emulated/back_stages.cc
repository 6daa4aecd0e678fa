// project_back_stages on a CPU against float64.

#include "two_pass/back_stages.cu"

constexpr int kBlockChannels = kChannels;

#include "back_mixing.h"

static void back() {
  CONCAT(mhc_project_back_stages, SUFFIX)
  (x, phi, rows, columns, h_pre, factors, d_u, d_x_in, h_res, d_x, tokens, n, hidden, groups);
}
