// d_x = d_x_in + h_pre d_u + (r dm) phi^T - f X, with H_res^T d_x_in where that is deferred.
//
// A warp goes through tiles of 16 tokens, of which it has 64 channels of a stream: a unit. The warps of a block are some
// units, each several times for other tiles. Those that have a tile together, a group, hand each other d_x_in and share
// r dm; while they work on it, what they need for the next one is on its way.

#pragma once

#include "base/copies.cuh"
#include "base/matrix.cuh"

namespace back {

constexpr int kChannels = tuning_project_back::channels;
constexpr int kParts = kBackParts<Stream>;
// Streams whose deferred cotangents are mixed here; 0 for any number.
constexpr int kMixed = tuning_project_back_mixing::streams;
// 16 bytes of the 8 neighbours that a lane has of a token.
constexpr int kPieces = Pack<Stream, 8>::kWords / 4;
// uint4 of a tile of a warp.
constexpr int kWarpTile = 4 * kPieces * 32;

// Blocks at once on a multiprocessor. Later chips' kernels need more registers than there are for two.
constexpr int kBlocks =
    sizeof(Stream) == 2 && __CUDA_ARCH__ < 1000 ? int(tuning_project_back::blocks) : 1;

// Groups of 16 columns whose products are under way at once; more would take too many registers.
constexpr int kHexetsAhead = kParts == 1 && EXACT                                 ? (SIZE + 1) / 2
                             : (SIZE < 10 || kParts == 1) && __CUDA_ARCH__ < 1000 ? 2
                                                                                  : 1;

// ---- phi ----------------------------------------------------------------------------------------

// An A fragment of phi in parts: the row k and the next one, columns of one hexet; zero from row `end` on.
__device__ inline void phi_fragment(uint4 (&parts)[kParts], const float* phi, int k, int end,
                                    int hexet, int columns, float scale) {
  u32 words[4][kParts];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int row = k + r % 2;
    const int c = hexet * 16 + r / 2 * 8 + threadIdx.x % 4 * 2;
    const float a = weight(phi, row, end, c, columns), b = weight(phi, row, end, c + 1, columns);
    if constexpr (kParts == 1) {
      words[r][0] = half_pair(a * scale, b * scale);
    } else {
      split(a, b, words[r]);
    }
  }
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    parts[p] = {words[0][p], words[1][p], words[2][p], words[3][p]};
  }
}

// phi^T r dm of half a tile, added to `sum`: the smallest products first.
__device__ inline void add_product(float (&sum)[4], const uint4 (&phi)[kParts],
                                   const uint4 (&dm)[kParts], int half) {
  float fresh[4] = {};
  float (&product)[4] = kRounded ? fresh : sum;
#pragma unroll
  for (int p = kParts - 1; p >= 0; --p) {
    const uint2 b = half ? uint2{dm[p].y, dm[p].w} : uint2{dm[p].x, dm[p].z};
#pragma unroll
    for (int w = kParts - 1 - p; w >= 0; --w) {
      const uint4 a = phi[w];
      if constexpr (kParts == 1) {
        mma_half(product, a.x, a.y, a.z, a.w, b);
      } else {
        mma(product, a.x, a.y, a.z, a.w, b);
      }
    }
  }
  if constexpr (kRounded) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e] += fresh[e];
  }
}

// ---- what is on its way -------------------------------------------------------------------------

// Of the lane's four tokens of a tile, in registers.
template <bool ALIGNED>
struct Inputs {
  Pack<Stream, 8> xs[4], d_us[4];
  float h[4];
  float2 factors[4];

  __device__ void load(const Stream* x, const Stream* d_u, const float* h_pre,
                       const float2* all_factors, int tile, int tokens, int n, int stream, int at,
                       int hidden) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const long long token = min(tile * kTile + token_of(r, threadIdx.x % 4), tokens - 1);
      ::load<ALIGNED>(xs[r], x + (token * n + stream) * hidden, at, hidden);
      ::load<ALIGNED>(d_us[r], d_u + token * hidden, at, hidden);
      h[r] = h_pre[token * n + stream];
      factors[r] = all_factors[token];
    }
  }
};

// Two tiles in shared memory: d_x_in of each warp as its lanes have it, r dm of each group, and, of each warp, the column
// of H_res that belongs to its stream, [16 tokens][n].
struct Buffers {
  uint4* d_x;
  uint4* dm;
  float* h;
  int warps, groups, dm_tile, h_tile;

  __device__ Buffers(uint4* shared, int groups, int dm_tile, int h_tile)
      : d_x(shared),
        dm(shared + 2 * (blockDim.x / 32) * kWarpTile),
        h(reinterpret_cast<float*>(dm + 2 * groups * dm_tile)),
        warps(blockDim.x / 32),
        groups(groups),
        dm_tile(dm_tile),
        h_tile(h_tile) {}

  // This lane's pieces of its token r.
  __device__ uint4* d_x_of(int buffer, int warp, int r) const {
    return d_x + (buffer * warps + warp) * kWarpTile + r * kPieces * 32 + threadIdx.x % 32;
  }
  __device__ uint4* dm_of(int buffer, int group) const {
    return dm + (buffer * groups + group) * dm_tile;
  }
  __device__ float* h_of(int buffer, int warp) const {
    return h + (buffer * warps + warp) * h_tile;
  }
};

// d_x_in of this warp, on its way to shared memory: at once, or by way of registers where rows are not aligned.
template <bool ALIGNED>
struct Incoming {
  Pack<Stream, 8> packs[ALIGNED ? 1 : 4];

  __device__ void load(const Buffers& to, int buffer, int warp, const Stream* d_x_in, int tile,
                       int tokens, int n, int stream, int at, int hidden) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const long long token = min(tile * kTile + token_of(r, threadIdx.x % 4), tokens - 1);
      const Stream* row = d_x_in + (token * n + stream) * hidden;
      if constexpr (ALIGNED) {
#pragma unroll
        for (int p = 0; p < kPieces; ++p) {
          const bool exists = at < hidden;
          copy_async(to.d_x_of(buffer, warp, r) + p * 32,
                     exists ? row + at + p * 8 / kPieces : d_x_in, exists ? 16 : 0);
        }
      } else {
        ::load<false>(packs[r], row, at, hidden);
      }
    }
  }

  __device__ void store(const Buffers& to, int buffer, int warp) const {
    if constexpr (ALIGNED) return;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        to.d_x_of(buffer, warp, r)[p * 32] =
            *reinterpret_cast<const uint4*>(&packs[ALIGNED ? 0 : r].words[4 * p]);
      }
    }
  }
};

// ---- project_back -------------------------------------------------------------------------------

// Grid: sets of `units` units, of all streams where it MIXES; sets of groups of tiles. d_x_in: null for none, or d_x
// itself. has_phi, has_dm: whether shared memory has room for phi and for r dm; it has both where the size is exact.
template <bool ALIGNED, bool MIXES>
__device__ inline void project_back(const Stream* x, const float* phi, Fragments dm,
                                    const float* h_pre, const float2* factors, const Stream* d_u,
                                    const Stream* d_x_in, const float* h_res, Stream* d_x,
                                    int tokens, int num_streams, int hidden, int units,
                                    bool has_phi, bool has_dm) {
  extern __shared__ uint4 shared[];
  const int n = MIXES && kMixed ? kMixed : num_streams;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int groups = blockDim.x / 32 / units, group = warp / units, place = warp % units;
  const int unit = blockIdx.x * units + place;
  // A unit behind the last one has no channels.
  const int stream = unit % n, first_channel = unit / n * kChannels, at = first_channel + g * 8;
  const int hexets = EXACT ? (SIZE + 1) / 2 : dm.hexets();

  // phi of each unit, [hexet][j][part][lane]: the groups of a block share it.
  const int unit_phi = hexets * 4 * kParts * 32;
  uint4* own_phi = shared + place * unit_phi + lane;
  const float* stream_phi = phi + (long long)stream * hidden * dm.num_columns;
  const float phi_unit = kParts > 1
                             ? 1.f
                             : unit_of(stream_phi + (long long)first_channel * dm.num_columns,
                                       min(hidden - first_channel, kChannels) * dm.num_columns);
  const float scale = inverse_of_unit(phi_unit);
  for (int hexet = group; (EXACT || has_phi) && hexet < hexets; hexet += groups) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint4 parts[kParts];
      phi_fragment(parts, stream_phi, at + 2 * j, hidden, hexet, dm.num_columns, scale);
#pragma unroll
      for (int p = 0; p < kParts; ++p) own_phi[((hexet * 4 + j) * kParts + p) * 32] = parts[p];
    }
  }
  const int dm_tile = EXACT || has_dm ? hexets * kParts * 32 : 0;
  const Buffers buffers(shared + (EXACT || has_phi ? units * unit_phi : 0), groups, dm_tile,
                        MIXES ? kTile * n : 0);
  Incoming<ALIGNED> incoming;

  // What the group shares of a tile, and d_x_in.
  const auto start = [&](int tile, int buffer) {
    if (MIXES || d_x_in) {
      incoming.load(buffers, buffer, warp, d_x_in, tile, tokens, n, stream, at, hidden);
    }
    const uint4* from = dm.row_fragments<kParts>(tile);
    for (int i = place * 32 + lane; i < dm_tile; i += 32 * units) {
      copy_async(buffers.dm_of(buffer, group) + i, from + i);
    }
    if constexpr (MIXES) {
      float* to = buffers.h_of(buffer, warp);
      for (int i = lane; i < kTile * n; i += 32) {
        const long long token = min(tile * kTile + i / n, tokens - 1);
        copy_word_async(to + i, h_res + (token * n + i % n) * n + stream);
      }
    }
    commit_async();
  };

  const int step = gridDim.y * groups;
  int tile = blockIdx.y * groups + group, buffer = 0;
  Inputs<ALIGNED> inputs;
  if (tile * kTile < tokens) {
    start(tile, buffer);
    incoming.store(buffers, buffer, warp);
    inputs.load(x, d_u, h_pre, factors, tile, tokens, n, stream, at, hidden);
  }
  __syncthreads();  // phi is there

  for (; tile * kTile < tokens; tile += step, buffer ^= 1) {
    wait_for_async<0>();
    // The group has the tile, and nobody reads the one before any more, whose place the next one takes.
    sync_threads(1 + group, 32 * units);
    const int next = tile + step;
    const bool has_next = next * kTile < tokens;
    if (has_next) start(next, buffer ^ 1);

    float sums[2][4][4] = {};  // [half of the tile][j]
    const uint4* fragments =
        (EXACT || has_dm ? buffers.dm_of(buffer, group) : dm.row_fragments<kParts>(tile)) + lane;
#pragma unroll(kHexetsAhead)
    for (int hexet = 0; hexet < hexets; ++hexet) {
      uint4 b[kParts];
#pragma unroll
      for (int p = 0; p < kParts; ++p) b[p] = fragments[(hexet * kParts + p) * 32];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint4 a[kParts];
        if (EXACT || has_phi) {
#pragma unroll
          for (int p = 0; p < kParts; ++p) a[p] = own_phi[((hexet * 4 + j) * kParts + p) * 32];
        } else {
          phi_fragment(a, stream_phi, at + 2 * j, hidden, hexet, dm.num_columns, scale);
        }
        add_product(sums[0][j], a, b, 0);
        add_product(sums[1][j], a, b, 1);
      }
    }

    float values[4][8];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float unit = phi_unit * inputs.factors[r].y;
#pragma unroll
      for (int v = 0; v < 8; ++v) {
        const float sum = sums[r / 2][v / 2][v % 2 * 2 + r % 2];
        values[r][v] = (kParts == 1 ? sum * unit : sum) + inputs.h[r] * inputs.d_us[r][v];
        values[r][v] -= inputs.factors[r].x * inputs.xs[r][v];
      }
    }
    // Registers are free for the next tile, which has the rest of this one to come.
    if (has_next) inputs.load(x, d_u, h_pre, factors, next, tokens, n, stream, at, hidden);

    const auto add_d_x = [&](int r, int of_warp, float weight) {
      Pack<Stream, 8> pack;
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        *reinterpret_cast<uint4*>(&pack.words[4 * p]) = buffers.d_x_of(buffer, of_warp, r)[p * 32];
      }
#pragma unroll
      for (int v = 0; v < 8; ++v) values[r][v] += weight * pack[v];
    };
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if constexpr (MIXES) {
        const float* h = buffers.h_of(buffer, warp) + token_of(r, q) * n;
#pragma unroll(kMixed ? kMixed : 1)
        for (int i = 0; i < n; ++i) add_d_x(r, warp - place + i, h[i]);
      } else if (d_x_in) {
        add_d_x(r, warp, 1.f);
      }
      const long long token = tile * kTile + token_of(r, q);
      if (token >= tokens) continue;
      Pack<Stream, 8> result;
      result.set(values[r]);
      store<ALIGNED>(result, d_x + (token * n + stream) * hidden, at, hidden);
    }
    if (has_next) incoming.store(buffers, buffer ^ 1, warp);
  }
}

}  // namespace back
