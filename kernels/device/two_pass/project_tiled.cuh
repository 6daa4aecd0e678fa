// vec(X) phi and the sum of X^2 where phi has many columns: a block has 256 tokens and, of a slice, 32 values at a time,
// with their rows of phi in shared memory. So phi comes from the L2 cache once for 256 tokens, and from shared memory
// once for the 64 tokens of a warp.

#pragma once

#include "base/matrix.cuh"
#include "two_pass/rows.cuh"

namespace tiled {

constexpr int kThreads = tuning_project_tiled::threads;
constexpr int kBlockTokens = kTile * tuning_project_tiled::tiles;
// Warps beside each other in the tokens; two have the same tokens, and half of the octets each.
constexpr int kRowWarps = kThreads / 32 / 2;
constexpr int kTiles = tuning_project_tiled::tiles / kRowWarps;
constexpr int kStream = kStreamParts<Stream>;
constexpr int kWeight = kWeightParts<Stream>;
// Values of a token in a stage.
constexpr int kValues = 32;
template <bool ALIGNED>
using Rows = ::Rows<ALIGNED, kBlockTokens, kValues>;
// Octets of a block and of a warp, at most. Beside float32 streams so many that shared memory has room for two stages.
constexpr int kOctets = EXACT || sizeof(Stream) == 2 ? SIZE : SIZE * 2 / 3;
constexpr int kOwnOctets = (kOctets + 1) / 2;
// Steps of 16 values whose products are summed in tensor cores: see kRounded in projection.cu. Later chips' kernels have
// no registers for phi of two.
constexpr int kSteps = kRounded || __CUDA_ARCH__ >= 1000 ? 1 : 2;
static_assert(kTiles % 2 == 0);

// Fragments of phi for a chunk of octets and the rows of one stage: [step of 16 rows][octet][part][lane].
__device__ inline int num_fragments(int octets) { return 2 * octets * kWeight * 32; }

// ---- phi_fragments ------------------------------------------------------------------------------

// phi in parts as B fragments: [chunk][stage][step][octet][part][lane]; zero behind the last row and column. A lane
// takes 8 neighbours of X for two steps, and so the rows of phi in that order.
__device__ inline void phi_fragments(const float* phi, uint2* fragments, int width, int columns,
                                     int octets, int chunks) {
  const int stages = (width + kValues - 1) / kValues;
  const long long count = (long long)chunks * stages * 2 * octets * 32;
  const long long at = (long long)blockIdx.x * kThreads + threadIdx.x;
  if (at >= count) return;
  const int lane = at % 32, octet = at / 32 % octets, step = at / 32 / octets % 2;
  const long long group = at / 32 / octets / 2;
  const int k = group % stages * kValues + lane % 4 * 8 + step * 4;
  const int c = (group / stages * octets + octet) * 8 + lane / 4;
  float w[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    w[e] = k + e < width && c < columns ? phi[(long long)(k + e) * columns + c] : 0.f;
  }
  u32 low[kWeight], high[kWeight];
  split(w[0], w[1], low);
  split(w[2], w[3], high);
#pragma unroll
  for (int p = 0; p < kWeight; ++p) {
    fragments[(at / 32 * kWeight + p) * 32 + lane] = {low[p], high[p]};
  }
}

// ---- the products -------------------------------------------------------------------------------

// What a warp sums up: its tokens g and g + 8 of each tile, and its octets.
struct Sums {
  float products[kTiles][kOwnOctets][4] = {};
  float squares[kTiles / 2][2] = {};

  // Of the `own` octets of one stage, of which `phi` has the warp's first and all `octets`. Only the first
  // `tiles` have tokens. Every second tile, from squared_tile on, has its squares summed here.
  template <bool ALIGNED>
  __device__ void add_stage(const Rows<ALIGNED>& rows, const uint2* phi, int first_row,
                            const int (&shifts)[kTiles][2], int left, int octets, int own,
                            int tiles, int squared_tile) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
#pragma unroll
    for (int first = 0; first < 2; first += kSteps) {
      uint2 b[kSteps][kOwnOctets][kWeight];
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int o = 0; o < kOwnOctets; ++o) {
          if (o >= own) break;
#pragma unroll
          for (int w = 0; w < kWeight; ++w) {
            b[s][o][w] = phi[(((first + s) * octets + o) * kWeight + w) * 32];
          }
        }
      }
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        if (m >= tiles) break;
        Pack<Stream, 8> packs[2];
        u32 parts[2][kStream][4];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          rows.read(packs[h], first_row + m * kTile + g + 8 * h, q, shifts[m][h], left);
          split(packs[h], parts[h]);
        }
        if (m % 2 == squared_tile) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int e = 4 * first; e < 4 * (first + kSteps); ++e) {
              squares[m / 2][h] += packs[h][e] * packs[h][e];
            }
          }
        }
#pragma unroll
        for (int o = 0; o < kOwnOctets; ++o) {
          if (o >= own) break;
          float product[4] = {};
#pragma unroll
          for (int s = 0; s < kSteps; ++s) {
            const int at = 2 * (first + s);
#pragma unroll
            for (int w = kWeight - 1; w >= 0; --w) {
#pragma unroll
              for (int p = kStream - 1; p >= 0; --p) {
                if (counts<Stream>(p, w)) {
                  mma(product, parts[0][p][at], parts[1][p][at], parts[0][p][at + 1],
                      parts[1][p][at + 1], b[s][o][w]);
                }
              }
            }
          }
#pragma unroll
          for (int e = 0; e < 4; ++e) products[m][o][e] += product[e];
        }
      }
    }
  }
};

// partial: [tokens, slices, num_octets * 8 + 2], the last two entries the sum of squares and nothing. Grid: tiles of
// kBlockTokens tokens, each with its chunks of octets beside each other, which have the same X; slices. Shared memory:
// `stages` of X and of phi.
template <bool ALIGNED>
__device__ inline void project(const Stream* x, const uint2* phi, float* partial, int tokens,
                               int width, int columns, int slice, int octets, int chunks,
                               int stages) {
  extern __shared__ char stage_bytes[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int chunk = blockIdx.x % chunks, first_token = blockIdx.x / chunks * kBlockTokens;
  const int first_row = warp % kRowWarps * kTiles * kTile, half = warp / kRowWarps;
  const int first_octet = half * ((octets + 1) / 2);
  const int own = EXACT && kOctets % 2 == 0 ? kOwnOctets : half ? octets / 2 : (octets + 1) / 2;
  const int warp_tokens = tokens - first_token - first_row;
  const int tiles = warp_tokens <= 0 ? 0 : (warp_tokens + kTile - 1) / kTile;
  const int squared_tile = chunk == 0 ? half : -1;
  const int slices = (width + slice - 1) / slice, row_length = (columns + 7) / 8 * 8 + 2;
  const int phi_stages = (width + kValues - 1) / kValues;
  const int fragments = num_fragments(octets);
  const int bytes = Rows<ALIGNED>::kBytes + fragments * int(sizeof(uint2));

  int shifts[kTiles][2];
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      shifts[m][h] =
          Rows<ALIGNED>::shift(x, first_token + first_row + m * kTile + g + 8 * h, width);
    }
  }

  for (int at = blockIdx.y; at < slices; at += gridDim.y) {
    const int first = at * slice, last = min(first + slice, width);
    const int steps = (last - first + kValues - 1) / kValues;
    const auto copy = [&](int step) {
      char* to = stage_bytes + step % stages * bytes;
      const int k = first + step * kValues;
      Rows<ALIGNED>{to}.template copy<kThreads>(x, first_token, tokens, k, width, threadIdx.x);
      const uint2* from = phi + ((long long)chunk * phi_stages + k / kValues) * fragments;
      uint4* fragments_to = reinterpret_cast<uint4*>(to + Rows<ALIGNED>::kBytes);
      for (int i = threadIdx.x; i < fragments / 2; i += kThreads) {
        copy_async(fragments_to + i, reinterpret_cast<const uint4*>(from) + i);
      }
    };

    __syncthreads();  // the last slice's stages have been read
    for (int step = 0; step < stages - 1; ++step) {
      if (step < steps) copy(step);
      commit_async();
    }
    Sums sums;
    for (int step = 0; step < steps; ++step) {
      wait_for_async(stages - 2);
      __syncthreads();  // everybody's copies have come, and everybody has read the stage before
      if (step + stages - 1 < steps) copy(step + stages - 1);
      commit_async();
      char* from = stage_bytes + step % stages * bytes;
      const uint2* own_phi = reinterpret_cast<const uint2*>(from + Rows<ALIGNED>::kBytes) +
                             first_octet * kWeight * 32 + lane;
      sums.add_stage(Rows<ALIGNED>{from}, own_phi, first_row, shifts,
                     width - first - step * kValues, octets, own, tiles, squared_tile);
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      if (m >= tiles) break;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float square = sums.squares[m / 2][h];
        square += __shfl_xor_sync(kAllLanes, square, 1);
        square += __shfl_xor_sync(kAllLanes, square, 2);
        const int token = first_token + first_row + m * kTile + g + 8 * h;
        if (token >= tokens) continue;
        float* out = partial + ((long long)token * slices + at) * row_length;
#pragma unroll
        for (int o = 0; o < kOwnOctets; ++o) {
          const int c = (chunk * octets + first_octet + o) * 8 + 2 * q;
          if (o < own && c < row_length - 2) {
            *reinterpret_cast<float2*>(out + c) = {sums.products[m][o][2 * h],
                                                   sums.products[m][o][2 * h + 1]};
          }
        }
        if (m % 2 == squared_tile && q == 0) out[row_length - 2] = square;
      }
    }
  }
}

}  // namespace tiled
