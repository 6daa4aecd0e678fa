// H_res of a token's logits in float64.

#pragma once

#include <numeric>

#include "check.h"

// `columns` are those of z: n^2, those of permutations, or none where H_res is I.
template <int STREAMS>
void h_res_of(double (&mixed)[STREAMS][STREAMS], const double* z, int columns,
              const Settings& settings) {
  constexpr int n = STREAMS;
  // Divides what `use(i, j)` gives for every j by its sum and eps, for every i.
  const auto normalise = [&](auto use) {
    for (int i = 0; i < n; ++i) {
      double sum = settings.sinkhorn_eps;
      for (int j = 0; j < n; ++j) sum += use(i, j);
      for (int j = 0; j < n; ++j) use(i, j) /= sum;
    }
  };
  const auto row = [&](int i, int j) -> double& { return mixed[i][j]; };
  const auto column = [&](int j, int i) -> double& { return mixed[i][j]; };
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) mixed[i][j] = columns == n * n ? z[i * n + j] : !columns && i == j;
  }
  if (settings.constraint == Constraint::kBirkhoff) {
    for (int j = 0; j < n; ++j) {
      double sum = 0;
      for (int i = 0; i < n; ++i) sum += std::exp(mixed[i][j]);
      for (int i = 0; i < n; ++i) {
        mixed[i][j] = std::exp(mixed[i][j]) / sum + settings.sinkhorn_eps;
      }
    }
    normalise(row);
    for (int iter = 1; iter < settings.sinkhorn_iters; ++iter) {
      normalise(column);
      normalise(row);
    }
  }
  if (settings.constraint != Constraint::kPermutations) return;
  int images[n];
  std::iota(images, images + n, 0);
  double all = 0;
  for (int p = 0; p < columns; ++p) all += std::exp(z[p]);
  for (int p = 0; p < columns; ++p, std::next_permutation(images, images + n)) {
    for (int i = 0; i < n; ++i) mixed[i][images[i]] += std::exp(z[p]) / all;
  }
}
