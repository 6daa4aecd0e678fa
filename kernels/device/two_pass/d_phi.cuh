// d_phi as sums over some tokens each: a warp holds the sums of 64 channels, while X and r dm pass by in shared memory.

#pragma once

#include "base/matrix.cuh"
#include "two_pass/rows.cuh"

namespace phi_gradient {

constexpr int kThreads = tuning_d_phi::threads;
constexpr int kWarps = kThreads / 32;
constexpr int kChannels = tuning_d_phi::channels;
// Octets whose sums a warp holds, 16 registers a thread each; beside float32 streams half as many.
constexpr int kMostOctets = tuning_d_phi::octets / (sizeof(Stream) == 4 ? 2 : 1);
constexpr int kOctets = EXACT && SIZE < kMostOctets ? SIZE : kMostOctets;
static_assert(!EXACT || SIZE % kOctets == 0);
constexpr int kStream = kStreamParts<Stream>;
constexpr int kWeight = kWeightParts<Stream>;
// Pairs of channels whose parts are in registers at once.
constexpr int kPairs = kStream == 3 ? 1 : 4;
// Octets whose products take turns. Later chips' kernels have no registers for two beside float16.
constexpr int kTurns = kStream == 2 && __CUDA_ARCH__ >= 1000 ? 1 : 2;
template <bool ALIGNED>
using Rows = ::Rows<ALIGNED, kTile, kChannels>;

// Blocks at once on a multiprocessor. Later chips' kernels need more registers than there are for two.
constexpr int kBlocks = sizeof(Stream) == 2 && __CUDA_ARCH__ < 1000 ? int(tuning_d_phi::blocks) : 1;

// The sums of a warp, of the products j = 0 to 3 (`token_of` in projection.cu tells which rows they have).
struct Sums {
  float sums[kOctets][4][4] = {};

  template <bool ALIGNED>
  __device__ void add_tile(const Rows<ALIGNED>& rows, const uint2* dm, const int (&shifts)[4],
                           int left, int octets) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
#pragma unroll
    for (int first = 0; first < 4; first += kPairs) {
      // X^T: neighbours are the same channel of two tokens.
      u32 a[kPairs][kStream][4];
      u32 parts[4][kStream][4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        Pack<Stream, 8> pack;
        rows.read(pack, token_of(r, q), g, shifts[r], left);
        split(pack, parts[r]);
      }
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
#pragma unroll
        for (int p = 0; p < kStream; ++p) {
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            a[j][p][r] = __byte_perm(parts[r / 2 * 2][p][first + j],
                                     parts[r / 2 * 2 + 1][p][first + j], r % 2 ? 0x7632 : 0x5410);
          }
        }
      }
      // Some octets in turn: one would wait for the last product.
#pragma unroll
      for (int octet = 0; octet < kOctets; octet += kTurns) {
        if (!EXACT && octet >= octets) break;
        // An octet behind the last one repeats that, and nobody stores its sums.
        const int behind = octet + 1 < (EXACT ? kOctets : octets) ? octet + 1 : octet;
        float fresh[2][kPairs][4] = {};
#pragma unroll
        for (int w = kWeight - 1; w >= 0; --w) {
          const uint2 b[2] = {dm[(octet * kWeight + w) * 32 + lane],
                              dm[(behind * kWeight + w) * 32 + lane]};
#pragma unroll
          for (int p = kStream - 1; p >= 0; --p) {
            if (!counts<Stream>(p, w)) continue;
#pragma unroll
            for (int o = 0; o < kTurns && octet + o < kOctets; ++o) {
#pragma unroll
              for (int j = 0; j < kPairs; ++j) {
                const u32(&x)[4] = a[j][p];
                mma(kRounded ? fresh[o][j] : sums[octet + o][first + j], x[0], x[1], x[2], x[3],
                    b[o]);
              }
            }
          }
        }
        if constexpr (kRounded) {
#pragma unroll
          for (int o = 0; o < kTurns && octet + o < kOctets; ++o) {
#pragma unroll
            for (int j = 0; j < kPairs; ++j) {
#pragma unroll
              for (int e = 0; e < 4; ++e) sums[octet + o][first + j][e] += fresh[o][j][e];
            }
          }
        }
      }
    }
  }
};

// partial: [splits, width, num_columns]. Grid: groups of kWarps * kChannels channels, each with its chunks of octets
// beside each other, which have the same X; splits of the tokens. Shared memory: `stages` of X and of r dm.
template <bool ALIGNED>
__device__ inline void d_phi(const Stream* x, Fragments dm, float* partial, int tokens, int width,
                             int chunk_octets, int chunks, int stages) {
  extern __shared__ char stage_bytes[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int unit = (blockIdx.x / chunks * kWarps + warp) * kChannels;
  const int tiles = (tokens + kTile - 1) / kTile;
  const int tiles_a_split = (tiles + gridDim.y - 1) / gridDim.y;
  const int first = blockIdx.y * tiles_a_split, last = min(first + tiles_a_split, tiles);
  const int first_octet = blockIdx.x % chunks * chunk_octets;
  const int octets = min(chunk_octets, dm.octets() - first_octet);
  constexpr int kRows = kWarps * Rows<ALIGNED>::kBytes;
  const int fragments = chunk_octets * kWeight * 32;
  const int bytes = kRows + fragments * int(sizeof(uint2));

  const auto stage = [&](int tile) { return stage_bytes + (tile - first) % stages * bytes; };
  const auto rows_of = [&](int tile) {
    return Rows<ALIGNED>{stage(tile) + warp * Rows<ALIGNED>::kBytes};
  };
  const auto fragments_of = [&](int tile) { return reinterpret_cast<uint2*>(stage(tile) + kRows); };
  const auto copy = [&](int tile) {
    rows_of(tile).template copy<32>(x, (long long)tile * kTile, tokens, unit, width, lane);
    uint4* to = reinterpret_cast<uint4*>(fragments_of(tile));
    const uint4* from = reinterpret_cast<const uint4*>(dm.column_fragments<kWeight>(tile) +
                                                       first_octet * kWeight * 32);
    for (int i = threadIdx.x; i < octets * kWeight * 16; i += kThreads) {
      copy_async(to + i, from + i);
    }
  };

  for (int i = 0; i < stages - 1; ++i) {
    if (first + i < last) copy(first + i);
    commit_async();
  }
  Sums sums;
  for (int tile = first; tile < last; ++tile) {
    int shifts[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      shifts[r] = Rows<ALIGNED>::shift(x + unit, (long long)tile * kTile + token_of(r, q), width);
    }
    wait_for_async(stages - 2);
    __syncthreads();  // everybody's copies have come, and everybody has read the tile before
    if (tile + stages - 1 < last) copy(tile + stages - 1);
    commit_async();
    sums.add_tile(rows_of(tile), fragments_of(tile), shifts, width - unit, octets);
  }

  float* out = partial + (long long)blockIdx.y * width * dm.num_columns;
  const int k = unit + 8 * g;
#pragma unroll
  for (int v = 0; v < 8; ++v) {
    if (k + v >= width) break;
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
      const int c = (first_octet + octet) * 8 + 2 * q;
      if (octet >= octets || c >= dm.num_columns) continue;
      float* to = out + (long long)(k + v) * dm.num_columns + c;
      const float (&pair)[4] = sums.sums[octet][v / 2];
      const float2 own = {pair[v % 2 * 2], pair[v % 2 * 2 + 1]};
      if (dm.num_columns % 2 == 0) {
        *reinterpret_cast<float2*>(to) = own;
      } else {
        to[0] = own.x;
        if (c + 1 < dm.num_columns) to[1] = own.y;
      }
    }
  }
}

}  // namespace phi_gradient
