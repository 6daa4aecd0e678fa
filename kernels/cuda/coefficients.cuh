// Formulas of a token's coefficients that several kernels share.

#pragma once

#include "common.cuh"

__device__ inline float sigmoid(float z) { return reciprocal(1.f + expf(-z)); }

// r [15]
__device__ inline float inverse_norm(const Settings& settings, float sum_of_squares, int width) {
  const float mean = sum_of_squares * reciprocal(width);
  if (settings.norm_eps_outside) return reciprocal(square_root(mean) + settings.norm_eps);
  return reciprocal(square_root(mean + settings.norm_eps));
}

// f with dr/dX = -f r X
__device__ inline float norm_factor(const Settings& settings, float r, int width) {
  const float over_width = r * reciprocal(width);
  if (!settings.norm_eps_outside) return r * over_width;
  const float root_mean = reciprocal(r) - settings.norm_eps;
  // sqrt has no derivative at a token of zeros; X = 0 takes nothing from d_x there.
  return root_mean > 0.f ? over_width * reciprocal(root_mean) : 0.f;
}
