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
// Later chips' kernels need more registers.
constexpr bool kIsLater = __CUDA_ARCH__ >= 1000;
// Steps of 16 values whose products are summed in tensor cores: see kRounded in projection.cu.
constexpr int kSteps = kRounded || kIsLater ? 1 : 2;
static_assert(kTiles % 2 == 0);

// Whether lanes take X in the order of `mma` and not 8 neighbours each: where nothing has to be shifted or cut into parts.
__device__ constexpr bool is_in_order(bool aligned) { return aligned && kStream == 1; }

// Fragments of phi for a chunk of octets and the rows of one stage: [step of 16 rows][octet][part][lane].
__device__ inline int num_fragments(int octets) { return 2 * octets * kWeight * 32; }

// ---- phi_fragments ------------------------------------------------------------------------------

// phi in parts as B fragments: [chunk][stage][step][octet][part][lane]; zero behind the last row and column. Where a lane
// takes 8 neighbours of X for two steps, it takes the rows of phi in that order.
__device__ inline void phi_fragments(const float* phi, uint2* fragments, int width, int columns,
                                     int octets, int chunks, bool aligned) {
  const int stages = (width + kValues - 1) / kValues;
  const long long count = (long long)chunks * stages * 2 * octets * 32;
  const long long at = (long long)blockIdx.x * kThreads + threadIdx.x;
  if (at >= count) return;
  const int lane = at % 32, octet = at / 32 % octets, step = at / 32 / octets % 2;
  const long long group = at / 32 / octets / 2;
  const bool in_order = is_in_order(aligned);
  const int q = lane % 4,
            k = group % stages * kValues + (in_order ? step * 16 + q * 2 : q * 8 + step * 4);
  const int c = (group / stages * octets + octet) * 8 + lane / 4;
  float w[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int row = k + (in_order ? e % 2 + e / 2 * 8 : e);
    w[e] = row < width && c < columns ? phi[(long long)row * columns + c] : 0.f;
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

// A tile of X, as A fragments of two steps of 16 values. A lane has 8 neighbours of the tokens g and g + 8 in parts.
template <bool ALIGNED, bool IN_ORDER = is_in_order(ALIGNED)>
struct Left {
  Pack<Stream, 8> packs[2];
  u32 parts[2][kStream][4];

  __device__ void read(const Rows<ALIGNED>& rows, int row, const int (&shifts)[2], int left) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      rows.read(packs[h], row + g + 8 * h, q, shifts[h], left);
      split(packs[h], parts[h]);
    }
  }
  // Of kSteps steps.
  __device__ void add_squares(int first, float (&squares)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int e = 4 * first; e < 4 * (first + kSteps); ++e)
        squares[h] += packs[h][e] * packs[h][e];
    }
  }
  __device__ void multiply(float (&product)[4], int part, int step, uint2 b) const {
    const int at = 2 * step;
    mma(product, parts[0][part][at], parts[1][part][at], parts[0][part][at + 1],
        parts[1][part][at + 1], b);
  }
};

// The same in the order of `ldmatrix`: fragments come into registers that products take as they are.
template <bool ALIGNED>
struct Left<ALIGNED, true> {
  u32 fragments[2][4];

  __device__ void read(const Rows<ALIGNED>& rows, int row, const int (&)[2], int) {
    const int lane = threadIdx.x % 32;
    const u32 bytes = u32(__cvta_generic_to_shared(rows.bytes));
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      read_matrices(fragments[step],
                    bytes + Rows<ALIGNED>::place(row + lane % 16, 2 * step + lane / 16));
    }
  }
  __device__ void add_squares(int first, float (&squares)[2]) const {
#pragma unroll
    for (int step = first; step < first + kSteps; ++step) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float low = low_half(fragments[step][r]), high = high_half(fragments[step][r]);
        squares[r % 2] += low * low;
        squares[r % 2] += high * high;
      }
    }
  }
  __device__ void multiply(float (&product)[4], int, int step, uint2 b) const {
    const u32(&a)[4] = fragments[step];
    mma(product, a[0], a[1], a[2], a[3], b);
  }
};

// What a warp sums up: its tokens g and g + 8 of each tile, and its octets.
struct Sums {
  float products[kTiles][kOwnOctets][4] = {};
  float squares[kTiles / 2][2] = {};

  // Of OWN octets of one stage, of which `phi` has the warp's first and all `octets`. Only the first `tiles` have tokens. Every second tile, from squared_tile
  // on, has its squares summed here. Products of one step have several sums in turn: one would wait for the last.
  template <int OWN, bool ALIGNED>
  __device__ void add_stage(const Rows<ALIGNED>& rows, const uint2* phi, int first_row,
                            const int (&shifts)[kTiles][2], int left, int octets, int tiles,
                            int squared_tile) {
    constexpr int kAtOnce = OWN <= 3 && kStream == 1 ? 2 : 1;
    constexpr int kMost = kStream == 1 ? OWN : 3, kGroup = OWN < kMost ? OWN : kMost;
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
#pragma unroll
    for (int first = 0; first < 2; first += kSteps) {
      uint2 b[kSteps][OWN][kWeight];
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int o = 0; o < OWN; ++o) {
#pragma unroll
          for (int w = 0; w < kWeight; ++w) {
            b[s][o][w] = phi[(((first + s) * octets + o) * kWeight + w) * 32];
          }
        }
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; tile += kAtOnce) {
        // Where this is not asked, the compiler takes registers for the next tile, too.
        if ((kStream > 1 || !EXACT || kIsLater) && tile >= tiles) break;
        Left<ALIGNED> left_operands[kAtOnce];
#pragma unroll
        for (int t = 0; t < kAtOnce; ++t) {
          const int m = tile + t;
          left_operands[t].read(rows, first_row + m * kTile, shifts[m], left);
          if (m % 2 == squared_tile) left_operands[t].add_squares(first, squares[m / 2]);
        }
#pragma unroll
        for (int from = 0; from < OWN; from += kGroup) {
          float product[kAtOnce][kGroup][4] = {};
#pragma unroll
          for (int s = 0; s < kSteps; ++s) {
#pragma unroll
            for (int w = kWeight - 1; w >= 0; --w) {
#pragma unroll
              for (int p = kStream - 1; p >= 0; --p) {
                if (!counts<Stream>(p, w)) continue;
#pragma unroll
                for (int t = 0; t < kAtOnce; ++t) {
#pragma unroll
                  for (int o = 0; o < kGroup && from + o < OWN; ++o) {
                    left_operands[t].multiply(product[t][o], p, first + s, b[s][from + o][w]);
                  }
                }
              }
            }
          }
#pragma unroll
          for (int t = 0; t < kAtOnce; ++t) {
#pragma unroll
            for (int o = 0; o < kGroup && from + o < OWN; ++o) {
#pragma unroll
              for (int e = 0; e < 4; ++e) products[tile + t][from + o][e] += product[t][o][e];
            }
          }
        }
      }
    }
  }

  // The same of `own` octets, up to MOST; an exact size with even octets has that many.
  template <int MOST, bool ALIGNED, class... Arguments>
  __device__ void add_own(int own, const Arguments&... arguments) {
    if constexpr (MOST > 0) {
      if ((EXACT && kOctets % 2 == 0) || own == MOST) {
        add_stage<MOST, ALIGNED>(arguments...);
      } else {
        add_own<MOST - 1, ALIGNED>(own, arguments...);
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
  // Both halves have the octet where there is one: each has its tiles' squares to sum up besides.
  const int first_octet = octets > 1 ? half * ((octets + 1) / 2) : 0;
  const int own = EXACT && kOctets % 2 == 0 ? kOwnOctets
                  : half && octets > 1      ? octets / 2
                                            : (octets + 1) / 2;
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
      if (tiles == 0) continue;
      sums.template add_own<kOwnOctets, ALIGNED>(own, Rows<ALIGNED>{from}, own_phi, first_row,
                                                 shifts, width - first - step * kValues, octets,
                                                 tiles, squared_tile);
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
