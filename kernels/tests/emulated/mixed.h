// New streams of post, or of H_res^T, against float64.

#pragma once

#include "check.h"

// Without `y` they are those of `mix`.
inline void check_mixed(const Stream* got, const Stream* x, const Stream* y, const float* h_res,
                        const float* h_post, int tokens, int n, int hidden) {
  Error error{"x_new", kRoundingError};
  for (int t = 0; t < tokens; ++t) {
    const float* own = h_res + size_t(t) * n * n;
    for (int i = 0; i < n; ++i) {
      for (int c = 0; c < hidden; ++c) {
        double sum = y ? double(h_post[t * n + i]) * wide(y[size_t(t) * hidden + c]) : 0;
        for (int j = 0; j < n; ++j) {
          const float weight = y ? own[i * n + j] : own[j * n + i];
          sum += double(weight) * wide(x[(size_t(t) * n + j) * hidden + c]);
        }
        error.add(wide(got[(size_t(t) * n + i) * hidden + c]), sum);
      }
    }
  }
}
