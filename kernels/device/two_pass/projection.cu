// The three products with phi and its gradient, for the ops that have a projection (pre, post_pre, head):
//
//   project        vec(X) phi and the sum of X^2, for slices of the n C values of a token        [14]
//   project_back   d_x = d_x_in + h_pre d_u + (r dm) phi^T - f X, with H_res^T d_x_in where that is deferred
//   d_phi          sums over some tokens of vec(X)^T (r dm)
//   sum_d_phi      d_phi, from these sums
//
// None but project_back depends on n but through n C and K. Sums over n C are cut into slices that depend on n C and K
// alone, so that a token's result does not depend on the others.

#include "base/matrix.cuh"

// Octets (groups of 8 columns) that a block works on.
constexpr int kOctets = SIZE;
constexpr int kStream = kStreamParts<Stream>;
constexpr int kWeight = kWeightParts<Stream>;
constexpr int kThreads = tuning_project::threads;
constexpr int kWarps = kThreads / 32;
static_assert(kThreads == tuning_project_back::threads &&
              kThreads == tuning_project_back_mixing::threads &&
              kThreads == tuning_d_phi::threads && kThreads == tuning_sum_d_phi::threads);
static_assert(kTile == tuning_project::tokens && kTile == tuning_project_back::tokens &&
              kTile == tuning_project_back_mixing::tokens && kTile == tuning_d_phi::tokens);

// Tensor cores cut a sum off after every addition. Beside float32 streams every sum is therefore short,
// begins with the smallest products, and is added to the others by the units that round; the parts of
// the weights beside 16-bit streams err more than longer sums do.
constexpr bool kRounded = sizeof(Stream) == 4;

__device__ inline float weight(const float* phi, int k, int width, int c, int columns) {
  return k < width && c < columns ? phi[(long long)k * columns + c] : 0.f;
}

// ---- project ------------------------------------------------------------------------------------

// Groups of 32 values whose loads are under way at once.
constexpr int kAhead = sizeof(Stream) == 2 ? 4 : kOctets < 10 ? 2 : 1;

// phi of `length` rows from k0 on, as B fragments: fragments[((step * kOctets + octet) * kWeight + part)
// * 32 + lane]. The lane's values of X are 8 neighbours, for two steps; so the rows of phi are taken in
// that order.
__device__ inline void stage_phi(uint2* fragments, const float* phi, int k0, int length, int width,
                                 int first_column, int columns) {
#pragma unroll 8
  for (int at = threadIdx.x; at < length / 16 * kOctets * 32; at += kThreads) {
    const int lane = at % 32, octet = at / 32 % kOctets, step = at / 32 / kOctets;
    const int k = k0 + step / 2 * 32 + lane % 4 * 8 + step % 2 * 4;
    const int c = first_column + octet * 8 + lane / 4;
    float w[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) w[e] = weight(phi, k + e, width, c, columns);
    u32 low[kWeight], high[kWeight];
    split(w[0], w[1], low);
    split(w[2], w[3], high);
#pragma unroll
    for (int p = 0; p < kWeight; ++p) {
      fragments[((step * kOctets + octet) * kWeight + p) * 32 + lane] = {low[p], high[p]};
    }
  }
}

// Some values of the tokens g and g + 8: kAhead groups of 32, of which a lane has 8 neighbours.
template <bool ALIGNED>
struct Batch {
  static constexpr int kValues = 32 * kAhead;
  Pack<Stream, 8> packs[kAhead][2];

  __device__ void load(const Stream* const (&rows)[2], int k, int width) {
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
#pragma unroll
      for (int h = 0; h < 2; ++h) ::load<ALIGNED>(packs[a][h], rows[h], k + 32 * a, width);
    }
  }

  __device__ void add_squares(float (&squares)[2]) const {
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int e = 0; e < 8; ++e) squares[h] += packs[a][h][e] * packs[a][h][e];
      }
    }
  }

  __device__ void add_products(const uint2* phi, float (&sums)[kOctets][4]) const {
    float products[kOctets][4] = {};
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      u32 parts[2][kStream][4];
      split(packs[a][0], parts[0]);
      split(packs[a][1], parts[1]);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int octet = 0; octet < kOctets; ++octet) {
          float fresh[4] = {};
          float (&product)[4] = kRounded ? fresh : products[octet];
#pragma unroll
          for (int w = kWeight - 1; w >= 0; --w) {
            const uint2 b = phi[(((2 * a + s) * kOctets + octet) * kWeight + w) * 32];
#pragma unroll
            for (int p = kStream - 1; p >= 0; --p) {
              if (counts<Stream>(p, w)) {
                mma(product, parts[0][p][2 * s], parts[1][p][2 * s], parts[0][p][2 * s + 1],
                    parts[1][p][2 * s + 1], b);
              }
            }
          }
          if (kRounded) add(fresh, sums[octet]);
        }
      }
    }
    if constexpr (!kRounded) {
#pragma unroll
      for (int octet = 0; octet < kOctets; ++octet) add(products[octet], sums[octet]);
    }
  }

  __device__ static void add(const float (&product)[4], float (&sum)[4]) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e] += product[e];
  }
};

// partial: [tokens, slices, num_octets * 8 + 2], the last two entries the sum of squares and nothing.
// Grid: slices, groups of tokens, chunks of kOctets octets. Shared memory: fragments of `stage` rows.
template <bool ALIGNED>
__device__ inline void project(const Stream* x, const float* phi, float* partial, int tokens,
                               int width, int columns, int slice, int stage) {
  extern __shared__ uint2 fragments[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int first = blockIdx.x * slice, last = min(first + slice, width);
  const int first_octet = blockIdx.z * kOctets;
  const int row_length = (columns + 7) / 8 * 8 + 2;
  constexpr int kBlockTokens = kWarps * kTile;
  const int block_stride = gridDim.y * kBlockTokens;

  // Of the tokens of a block; rows behind the last token compute something that nobody reads.
  const auto rows_of = [&](int block, const Stream*(&rows)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      rows[h] = x + (long long)min(block + warp * kTile + g + 8 * h, tokens - 1) * width;
    }
  };

  bool staged = false;
  const Stream* rows[2];
  Batch<ALIGNED> batch, next;
  rows_of(blockIdx.y * kBlockTokens, rows);
  batch.load(rows, first + q * 8, width);
  for (int block = blockIdx.y * kBlockTokens; block < tokens; block += block_stride) {
    const int token = block + warp * kTile + g;
    float sums[kOctets][4] = {};
    float squares[2] = {};
    for (int from = first; from < last; from += stage) {
      if (!staged || slice > stage) {
        __syncthreads();
        stage_phi(fragments, phi, from, stage, width, first_octet * 8, columns);
        __syncthreads();
        staged = true;
      }
      const int to = min(from + stage, last);
      for (int k = from; k < to; k += Batch<ALIGNED>::kValues) {
        int next_k = k + Batch<ALIGNED>::kValues;
        if (next_k >= last) {
          next_k = first;
          rows_of(block + block_stride, rows);
        }
        next.load(rows, next_k + q * 8, width);
        batch.add_products(fragments + (k - from) / 16 * kOctets * kWeight * 32 + lane, sums);
        batch.add_squares(squares);
        batch = next;
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      squares[h] += __shfl_xor_sync(kAllLanes, squares[h], 1);
      squares[h] += __shfl_xor_sync(kAllLanes, squares[h], 2);
      if (token + 8 * h >= tokens) continue;
      float* out = partial + ((long long)(token + 8 * h) * gridDim.x + blockIdx.x) * row_length;
#pragma unroll
      for (int octet = 0; octet < kOctets; ++octet) {
        const int c = (first_octet + octet) * 8 + 2 * q;
        if (c < row_length - 2) {
          *reinterpret_cast<float2*>(out + c) = {sums[octet][2 * h], sums[octet][2 * h + 1]};
        }
      }
      if (blockIdx.z == 0 && q == 0) out[row_length - 2] = squares[h];
    }
  }
}

KERNEL(project, kThreads, kStream == 1 && EXACT && SIZE < 10 ? 2 : 1)
(const Stream* x, const float* phi, float* partial, int tokens, int width, int columns, int slice,
 int stage) {
  project<true>(x, phi, partial, tokens, width, columns, slice, stage);
}
#if !EXACT
KERNEL(project_unaligned, kThreads)
(const Stream* x, const float* phi, float* partial, int tokens, int width, int columns, int slice,
 int stage) {
  project<false>(x, phi, partial, tokens, width, columns, slice, stage);
}
#endif

// ---- project_back and d_phi ---------------------------------------------------------------------

// A warp goes through tiles of 16 tokens and 64 channels, of which it keeps phi or the sums for d_phi. Lane
// 4 g + q has the channels 8 g to 8 g + 7 of the tokens 2 q, 2 q + 1, 2 q + 8 and 2 q + 9, so that a
// warp reads and writes lines of 128 bytes. In the products j = 0 to 3 row g is channel 8 g + 2 j, and
// row g + 8 the next one.
constexpr int kChannels = tuning_d_phi::channels;
static_assert(kChannels == tuning_project_back::channels &&
              kChannels == tuning_project_back_mixing::channels);

__device__ inline int token_of(int r, int q) { return 2 * q + r % 2 + r / 2 * 8; }

// ---- project_back -------------------------------------------------------------------------------

// An A fragment of phi in parts: the row k and the next one, columns of one hexet; zero from row `end` on.
__device__ inline void phi_fragment(uint4 (&parts)[kWeight], const float* phi, int k, int end,
                                    int hexet, int q, int columns) {
  u32 words[4][kWeight];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int row = k + r % 2;
    const int c = hexet * 16 + r / 2 * 8 + 2 * q;
    split(weight(phi, row, end, c, columns), weight(phi, row, end, c + 1, columns), words[r]);
  }
#pragma unroll
  for (int p = 0; p < kWeight; ++p) {
    parts[p] = {words[0][p], words[1][p], words[2][p], words[3][p]};
  }
}

// Whether the products of two groups of 16 columns are under way at once; later chips' kernels need more
// registers than there are for that.
constexpr bool kTwoHexets = kOctets < 10 && !(kRounded && __CUDA_ARCH__ >= 1000);

// Streams whose deferred cotangents are mixed here: those that have so many columns.
constexpr int kMixed = tuning_project_back_mixing::streams;

// The warps of a block that have the same channels, one for each stream, hand each other a tile of d_x_in: a
// lane needs of the other streams what the same lane of their warps has.
struct Exchange {
  static constexpr int kParts = Pack<Stream, 8>::kWords / 4;
  uint4* packs;  // [2][warps][4 tokens of a lane][kParts][lane]
  float* h;      // [16 tokens][n]: the column of H_res that belongs to the warp's stream
  int warp, stream, n, lane;

  __device__ Exchange(uint4* shared, int warp, int stream, int num_streams, int lane)
      : packs(shared + lane),
        warp(warp),
        stream(stream),
        n(kMixed ? kMixed : num_streams),
        lane(lane) {
    const int warps = blockDim.x / 32;
    h = reinterpret_cast<float*>(shared + 2 * warps * 4 * kParts * 32) + warp * n * kTile;
  }

  __device__ uint4& at(bool second, int of_warp, int r, int part) const {
    const int warps = blockDim.x / 32;
    return packs[(((second ? warps : 0) + of_warp) * 4 + r) * kParts * 32 + part * 32];
  }

  // Nobody waits for it before `wait_for_all`.
  __device__ void load_h(const float* h_res, int tile, int tokens) const {
    __syncwarp();  // other lanes may still need the last tile's
    for (int c = lane; c < n * kTile; c += 32) {
      const long long token = min(tile * kTile + c / n, tokens - 1);
      const u32 to = u32(__cvta_generic_to_shared(h + c));
      const float* from = h_res + (token * n + c % n) * n + stream;
      asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
    }
  }

  // The lane's values of its token r, from row + first on; zero from row + end on. Nobody waits either.
  template <bool ALIGNED>
  __device__ void load_own(bool second, int r, const Stream* row, int first, int end) const {
    if constexpr (ALIGNED) {
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        const u32 to = u32(__cvta_generic_to_shared(&at(second, warp, r, p)));
        const Stream* from = row + (first < end ? first + 8 / kParts * p : 0);
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                     "r"(first < end ? 16 : 0)
                     : "memory");
      }
    } else {
      Pack<Stream, 8> own;
      load<false>(own, row, first, end);
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        at(second, warp, r, p) = *reinterpret_cast<const uint4*>(&own.words[4 * p]);
      }
    }
  }

  // A buffer is written again two tiles later, when all have come by this barrier once more.
  __device__ void wait_for_all() const {
    asm volatile("cp.async.wait_all;" ::: "memory");
    asm volatile("bar.sync %0, %1;" ::"r"(1 + warp / n), "r"(32 * n) : "memory");
  }

  // H_res^T times all streams, at the lane's token r.
  __device__ void add_mixed(bool second, int r, int token, float (&values)[8]) const {
#pragma unroll(kMixed ? kMixed : 1)
    for (int i = 0; i < n; ++i) {
      Pack<Stream, 8> pack;
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        *reinterpret_cast<uint4*>(&pack.words[4 * p]) = at(second, warp - stream + i, r, p);
      }
      const float weight = h[token * n + i];
#pragma unroll
      for (int v = 0; v < 8; ++v) values[v] += weight * pack[v];
    }
  }
};

// Grid: groups of warps, groups of tiles. d_x_in: null for none, or d_x itself. MIXES: it is deferred; then a
// block has warps for all streams of its channels, and phi is staged. STAGED: phi stays in shared memory; where
// it is too large for that, it is read again for every tile.
template <bool ALIGNED, bool MIXES>
__device__ inline void project_back(const Stream* x, const float* phi, Fragments dm,
                                    const float* h_pre, const float* r_factor, const Stream* d_u,
                                    const Stream* d_x_in, const float* h_res, Stream* d_x,
                                    int tokens, int n, int hidden, bool staged) {
  extern __shared__ uint4 staged_phi[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int hexets = EXACT ? (kOctets + 1) / 2 : dm.hexets();
  const int unit = blockIdx.x * (blockDim.x / 32) + warp;
  const int stream = unit % n, at = unit / n * kChannels + g * 8;
  if (unit / n * kChannels >= hidden) return;

  const float* stream_phi = phi + (long long)stream * hidden * dm.num_columns;
  const int warp_phi = hexets * 4 * kWeight * 32;
  uint4* own = staged_phi + warp * warp_phi + lane;
  const Exchange exchange(staged_phi + blockDim.x / 32 * warp_phi, warp, stream, n, lane);
  bool second = false;
  for (int hexet = 0; staged && hexet < hexets; ++hexet) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint4 parts[kWeight];
      phi_fragment(parts, stream_phi, at + 2 * j, hidden, hexet, q, dm.num_columns);
#pragma unroll
      for (int p = 0; p < kWeight; ++p) own[((hexet * 4 + j) * kWeight + p) * 32] = parts[p];
    }
  }

  for (int tile = blockIdx.y; tile * kTile < tokens; tile += gridDim.y) {
    Pack<Stream, 8> xs[4], d_xs[4], d_us[4];
    float h[4], f[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const long long token = min(tile * kTile + token_of(r, q), tokens - 1);
      const long long row = (token * n + stream) * hidden;
      load<ALIGNED>(xs[r], x + row, at, hidden);
      load<ALIGNED>(d_us[r], d_u + token * hidden, at, hidden);
      if (MIXES) {
        exchange.load_own<ALIGNED>(second, r, d_x_in + row, at, hidden);
      } else if (d_x_in) {
        load<ALIGNED>(d_xs[r], d_x_in + row, at, hidden);
      } else {
        d_xs[r] = {};
      }
      h[r] = h_pre[token * n + stream];
      f[r] = r_factor[token];
    }
    if (MIXES) exchange.load_h(h_res, tile, tokens);

    float sums[2][4][4] = {};  // [half of the tile][j]
#pragma unroll(kTwoHexets ? 2 : 1)
    for (int hexet = 0; hexet < hexets; ++hexet) {
      uint4 b[kWeight];
#pragma unroll
      for (int p = 0; p < kWeight; ++p) b[p] = dm.row_fragment<kWeight>(tile, hexet, p, lane);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint4 a[kWeight];
        if (EXACT || staged) {
#pragma unroll
          for (int p = 0; p < kWeight; ++p) a[p] = own[((hexet * 4 + j) * kWeight + p) * 32];
        } else {
          phi_fragment(a, stream_phi, at + 2 * j, hidden, hexet, q, dm.num_columns);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float fresh[4] = {};
          float (&products)[4] = kRounded ? fresh : sums[half][j];
#pragma unroll
          for (int p = kWeight - 1; p >= 0; --p) {
#pragma unroll
            for (int w = kWeight - 1 - p; w >= 0; --w) {
              const uint2 dm_part = half ? uint2{b[p].y, b[p].w} : uint2{b[p].x, b[p].z};
              mma(products, a[w].x, a[w].y, a[w].z, a[w].w, dm_part);
            }
          }
          if constexpr (kRounded) {
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[half][j][e] += fresh[e];
          }
        }
      }
    }

    float values[4][8];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int v = 0; v < 8; ++v) {
        values[r][v] = sums[r / 2][v / 2][v % 2 * 2 + r % 2] + h[r] * d_us[r][v];
        values[r][v] -= f[r] * xs[r][v];
      }
    }
    if (MIXES) exchange.wait_for_all();
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (MIXES) {
        exchange.add_mixed(second, r, token_of(r, q), values[r]);
      } else {
#pragma unroll
        for (int v = 0; v < 8; ++v) values[r][v] += d_xs[r][v];
      }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const long long token = tile * kTile + token_of(r, q);
      if (token >= tokens) continue;
      Pack<Stream, 8> result;
      result.set(values[r]);
      store<ALIGNED>(result, d_x + (token * n + stream) * hidden, at, hidden);
    }
    second = !second;
  }
}

// Blocks at once on a multiprocessor. Later chips' kernels need more registers than there are for two.
constexpr int kBackBlocks =
    sizeof(Stream) == 2 && EXACT && SIZE < 10 && __CUDA_ARCH__ < 1000 ? 2 : 1;

#define BACK(name, aligned, mixes)                                                           \
  KERNEL(name, kThreads, kBackBlocks)                                                        \
  (const Stream* x, const float* phi, u32* rows, u32* columns, int num_columns,              \
   const float* h_pre, const float* r_factor, const Stream* d_u, const Stream* d_x_in,       \
   const float* h_res, Stream* d_x, int tokens, int n, int hidden, int staged) {             \
    project_back<aligned, mixes>(x, phi, {rows, columns, num_columns}, h_pre, r_factor, d_u, \
                                 d_x_in, h_res, d_x, tokens, n, hidden, staged);             \
  }
BACK(project_back, true, false)
BACK(project_back_mixing, true, true)
#if !EXACT
BACK(project_back_unaligned, false, false)
BACK(project_back_mixing_unaligned, false, true)
#endif
#undef BACK

// ---- d_phi --------------------------------------------------------------------------------------

// Octets whose sums a warp holds: 16 registers a thread each.
constexpr int kPhiOctets = kOctets < tuning_d_phi::octets ? kOctets : tuning_d_phi::octets;

// partial: [splits, width, num_columns]. Grid: groups of warps, splits of the tokens, chunks of kPhiOctets
// octets.
template <bool ALIGNED>
__device__ inline void d_phi(const Stream* x, Fragments dm, float* partial, int tokens, int width) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int unit = (blockIdx.x * kWarps + warp) * kChannels, k = unit + 8 * g;
  if (unit >= width) return;
  const int tiles = (tokens + kTile - 1) / kTile;
  const int tiles_a_split = (tiles + gridDim.y - 1) / gridDim.y;
  const int first = blockIdx.y * tiles_a_split, last = min(first + tiles_a_split, tiles);
  const int first_octet = blockIdx.z * kPhiOctets;
  const int octets = EXACT ? kPhiOctets : min(kPhiOctets, dm.octets() - first_octet);

  float sums[kPhiOctets][4][4] = {};
  for (int tile = first; tile < last; ++tile) {
    u32 parts[4][kStream][4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const long long token = tile * kTile + token_of(r, q);
      // Zero behind the last token: whatever lay there, 0 times it could be no number.
      Pack<Stream, 8> pack;
      load<ALIGNED>(pack, x + token * width, k, token < tokens ? width : 0);
      split(pack, parts[r]);
    }
#pragma unroll
    for (int octet = 0; octet < kPhiOctets; ++octet) {
      if (!EXACT && octet >= octets) break;
      float fresh[4][4] = {};
      float (&products)[4][4] = kRounded ? fresh : sums[octet];
#pragma unroll
      for (int w = kWeight - 1; w >= 0; --w) {
        const uint2 b = dm.column_fragment<kWeight>(tile, first_octet + octet, w, lane);
#pragma unroll
        for (int p = kStream - 1; p >= 0; --p) {
          if (!counts<Stream>(p, w)) continue;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            // X^T: neighbours are the same channel of two tokens.
            mma(products[j], __byte_perm(parts[0][p][j], parts[1][p][j], 0x5410),
                __byte_perm(parts[0][p][j], parts[1][p][j], 0x7632),
                __byte_perm(parts[2][p][j], parts[3][p][j], 0x5410),
                __byte_perm(parts[2][p][j], parts[3][p][j], 0x7632), b);
          }
        }
      }
      if constexpr (kRounded) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[octet][j][e] += fresh[j][e];
        }
      }
    }
  }

  float* out = partial + (long long)blockIdx.y * width * dm.num_columns;
#pragma unroll
  for (int v = 0; v < 8; ++v) {
    if (k + v >= width) break;
#pragma unroll
    for (int octet = 0; octet < kPhiOctets; ++octet) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int c = (first_octet + octet) * 8 + 2 * q + e;
        if (c < dm.num_columns) {
          out[(long long)(k + v) * dm.num_columns + c] = sums[octet][v / 2][v % 2 * 2 + e];
        }
      }
    }
  }
}

KERNEL(d_phi, kThreads)
(const Stream* x, u32* rows, u32* columns, int num_columns, float* partial, int tokens, int width) {
  d_phi<true>(x, {rows, columns, num_columns}, partial, tokens, width);
}
#if !EXACT
KERNEL(d_phi_unaligned, kThreads)
(const Stream* x, u32* rows, u32* columns, int num_columns, float* partial, int tokens, int width) {
  d_phi<false>(x, {rows, columns, num_columns}, partial, tokens, width);
}
#endif

KERNEL(sum_d_phi, kThreads)(const float* partial, float* d_phi, int splits, long long size) {
  const long long at = (long long)blockIdx.x * kThreads + threadIdx.x;
  if (at >= size) return;
  float sum = 0.f;
  for (int split = 0; split < splits; ++split) sum += partial[split * size + at];
  d_phi[at] = sum;
}
