// Common parts of the checks of products with phi: their operands, blocks that run one at a time, and what float64 says.

#pragma once

#include "check.h"

static const Stream* x;
static const float* phi;
static float *partial, *d_phi_partial;
static u32 *rows, *r_dm_columns;
static int tokens, width, columns, slices;
static std::vector<float> r_dm;

static int ceiling(int a, int b) { return (a + b - 1) / b; }
static int row_length() { return ceiling(columns, 8) * 8 + 2; }

static void run_blocks(char* shared, int threads, int blocks, int block_rows, void (*body)(),
                       unsigned seed) {
  emulated::static_memory = reinterpret_cast<unsigned char*>(shared);
  emulated::num_rows = block_rows;
  for (int y = 0; y < block_rows; ++y) {
    emulated::row_of_blocks = y;
    for (int b = 0; b < blocks; ++b) emulated::run_cluster(b, blocks, 1, threads, body, seed + b);
  }
}

// X, phi and room for partial sums of so many values each; r dm, and room for partial sums of d_phi.
static void make_operands(const Sizes& sizes, int slice, int splits) {
  x = reinterpret_cast<Stream*>(streams(sizes.values()));
  phi = floats(size_t(width) * columns, [](size_t) { return .1f * normal(); });
  slices = ceiling(width, slice);
  partial = guarded<float>(size_t(tokens) * slices * row_length());
  Fragments dm{nullptr, nullptr, columns};
  const int tiles = ceiling(tokens, kTile);
  dm.rows = rows = guarded<u32>(size_t(tiles) * dm.hexets() * 128);
  dm.columns = r_dm_columns = guarded<u32>(size_t(tiles) * dm.octets() * 128);
  r_dm.resize(size_t(tokens) * columns);
  for (int t = 0; t < tiles * kTile; ++t) {
    for (int c = 0; c < dm.hexets() * 16; ++c) {
      const bool exists = t < tokens && c < columns;
      const float value = exists ? normal() : 0.f;
      if (exists) r_dm[size_t(t) * columns + c] = value;
      dm.set<Stream>(t, c, value, 1.f);
    }
  }
  d_phi_partial = guarded<float>(size_t(splits) * width * columns);
}

static void check_products() {
  Error of_products{"products", kFloatError}, of_squares{"squares", kFloatError};
  for (int t = 0; t < tokens; ++t) {
    const auto summed = [&](int c) {
      double sum = 0;
      for (int s = 0; s < slices; ++s) {
        sum += partial[(size_t(t) * slices + s) * row_length() + c];
      }
      return sum;
    };
    std::vector<double> sums(columns + 1);
    for (int k = 0; k < width; ++k) {
      const double value = wide(x[size_t(t) * width + k]);
      sums[columns] += value * value;
      for (int c = 0; c < columns; ++c) sums[c] += value * phi[size_t(k) * columns + c];
    }
    for (int c = 0; c < columns; ++c) of_products.add(summed(c), sums[c]);
    of_squares.add(summed(row_length() - 2), sums[columns]);
  }
}

static void check_d_phi(int splits) {
  const size_t size = size_t(width) * columns;
  Error of_d_phi{"d_phi", kFloatError};
  for (int k = 0; k < width; ++k) {
    for (int c = 0; c < columns; ++c) {
      double sum = 0;
      for (int t = 0; t < tokens; ++t) {
        sum += double(wide(x[size_t(t) * width + k])) * r_dm[size_t(t) * columns + c];
      }
      of_d_phi.add(sum_of_arrays(d_phi_partial, splits, size, size_t(k) * columns + c), sum);
    }
  }
}
