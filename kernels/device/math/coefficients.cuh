// Formulas of a token's coefficients that several kernels share.

#pragma once

#include "base/common.cuh"

__device__ inline float sigmoid(float z) { return reciprocal(1.f + expf(-z)); }

// 1 / sqrt(v), with an error of one unit in the last place or so, and the right limits.
__device__ inline float inverse_root(float v) {
  const float result = approximate_inverse_root(v);
  const float error = fmaf(-v * result, result, 1.f);
  return fabsf(error) < 1.f ? fmaf(0.5f * error, result, result) : result;
}

// r [15]
__device__ inline float inverse_norm(const Settings& settings, float sum_of_squares, int width) {
  const float mean = sum_of_squares * reciprocal(width);
  if (settings.norm_eps_outside) return reciprocal(square_root(mean) + settings.norm_eps);
  return inverse_root(mean + settings.norm_eps);
}

// f with dr/dX = -f r X
__device__ inline float r_slope(const Settings& settings, float r, int width) {
  const float over_width = r * reciprocal(width);
  if (!settings.norm_eps_outside) return r * over_width;
  const float root_mean = reciprocal(r) - settings.norm_eps;
  // sqrt has no derivative at a token of zeros; X = 0 takes nothing from d_x there.
  return root_mean > 0.f ? over_width * reciprocal(root_mean) : 0.f;
}
