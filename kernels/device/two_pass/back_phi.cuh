// phi in registers, and its products with r dm, for the kernels that make d_x of all streams at once. `Operands` tells
// where a row's channels are, `place_of` where products go.

#pragma once

#include "base/matrix.cuh"

// Rows whose products are in registers at once.
constexpr int kRowsAtOnce = 4;

// phi of 8 channels, an octet, of some rows, as B fragments of float16 in `unit`: column g is channel g.
template <int ROWS, int HEXETS>
struct PhiOf {
  uint2 fragments[ROWS][HEXETS];
  float unit;

  // Of this warp: those with the same octet have the next rows each.
  __device__ static int octet() {
    const int warp = threadIdx.x / 32;
    return ROWS == kRows ? warp : warp % 8;
  }
  __device__ static int first_row() { return ROWS == kRows ? 0 : threadIdx.x / 256 * ROWS; }

  __device__ void load(const Operands& from, const float* phi, int columns, int block) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    // Some on their way at once: nothing else goes on meanwhile.
    constexpr int kSome = 4 * HEXETS;
    u32 largest = 0;
#pragma unroll 1
    for (int r = 0; r < ROWS; ++r) {
      const int row = first_row() + r, first = from.first(row, block) + 8 * octet();
      const float* rows = phi + ((long long)from.stream(row) * from.hidden + first) * columns;
      const int count = min(from.end(row) - first, 8) * columns;
#pragma unroll 1
      for (int at = lane; at < count; at += 32 * kSome) {
        u32 own[kSome];
#pragma unroll
        for (int s = 0; s < kSome; ++s) {
          own[s] = at + 32 * s < count ? magnitude(rows[at + 32 * s]) : 0;
        }
#pragma unroll
        for (int s = 0; s < kSome; ++s) largest = max(largest, own[s]);
      }
    }
    unit = half_unit(__reduce_max_sync(kAllLanes, largest));
    const float scale = inverse_of_unit(unit);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int row = first_row() + r, channel = from.first(row, block) + 8 * octet() + g;
      const float* own = phi + ((long long)from.stream(row) * from.hidden + channel) * columns;
      const int end = channel < from.end(row) ? columns : 0;
#pragma unroll
      for (int hexet = 0; hexet < HEXETS; ++hexet) {
        u32 words[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int c = hexet * 16 + half * 8 + 2 * q;
          const float a = c < end ? own[c] : 0.f, b = c + 1 < end ? own[c + 1] : 0.f;
          words[half] = half_pair(a * scale, b * scale);
        }
        fragments[r][hexet] = {words[0], words[1]};
      }
    }
  }

  // r dm of a tile, at an address, times phi.
  __device__ void multiply(u32 dm, int hexets, u32 products) const {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
#pragma unroll
    for (int first = 0; first < ROWS; first += kRowsAtOnce) {
      float sums[kRowsAtOnce][4] = {};
#pragma unroll
      for (int hexet = 0; hexet < HEXETS; ++hexet) {
        if (hexet >= hexets) break;
        const uint4 a = read4(dm + (hexet * 32 + lane) * 16);
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) {
          mma_half(sums[r], a.x, a.y, a.z, a.w, fragments[first + r][hexet]);
        }
      }
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          write2(products + place_of(g + 8 * half, first_row() + first + r, 2 * octet() + q / 2) +
                     q % 2 * 8,
                 {__float_as_uint(unit * sums[r][2 * half]),
                  __float_as_uint(unit * sums[r][2 * half + 1])});
        }
      }
    }
  }
};
