// What the kernels that make d_x of all streams at once share (back_streams.cu, back_stages.cu).
//
//   d_x = H_res^T d_x_in + h_pre d_u + (r dm) phi^T - f X
//
// A block has 8 rows of 64 channels: those of 8 streams, or of fewer in several sets of channels. It goes through tiles of
// 16 tokens. First warps multiply r dm of all of them by phi of 8 channels of some rows, which stays in registers; then
// a warp has a token alone, and all rows of it. Shared memory hands the products over.
//
// H_res is mixed on tensor cores, a token at a time, in two bfloat16 parts. Rows of several sets are multiplied by each
// other's zeros: an infinity or NaN of a token stays in the token, but may get to another channel of it.

#pragma once

#include "base/matrix.cuh"

constexpr int N = SIZE;
constexpr int kRows = 8;
constexpr int kSets = kRows / N;
constexpr int kChannels = 64;
static_assert(kRows % N == 0);
// Rows whose products are in registers at once.
constexpr int kRowsAtOnce = 4;

// Column i of a token's products is the octet of channels in_place(i): a lane has neighbouring columns, and four lanes
// store neighbouring octets at once where that takes no more registers than there are.
constexpr bool kIsSpread = kSets == 1;
__device__ inline int in_place(int i) { return kIsSpread ? i / 2 + i % 2 * 4 : i; }

// Products of a tile in shared memory: [token][row][64 channels], whose 16-byte pieces are in an order that lets lanes
// write and read all banks at once. Here the place of the four channels `piece` of a row.
constexpr u32 kTokenBytes = kRows * kChannels * 4 + 32;
constexpr u32 kProducts = kTile * kTokenBytes;
__device__ inline u32 place_of(int token, int row, int piece) {
  return token * kTokenBytes + row * kChannels * 4 +
         (piece ^ piece / 8 ^ row % 2 * (kIsSpread ? 1 : 2)) * 16;
}

struct Operands {
  const Stream *x, *d_u, *d_x_in;
  const float *h_pre, *h_res;
  const float2* factors;
  Stream* d_x;
  int tokens, n, hidden;

  // Of a row of the block whose first channel is given: the stream, the first channel, and where the channels end; a
  // row without a stream has none.
  __device__ static int stream(int row) { return row % N; }
  __device__ static int first(int row, int block) { return block + row / N * kChannels; }
  __device__ int end(int row) const { return EXACT || stream(row) < n ? hidden : 0; }

  // 8 channels of `streams` of a token, from `at` on. Behind the last channel of an exact size they are others:
  // nobody needs what comes of them.
  template <bool ALIGNED>
  __device__ void load(Pack<Stream, 8>& pack, const Stream* streams, int stream, int at,
                       int end) const {
    if constexpr (EXACT) {
      ::load<true>(pack, streams + (stream * hidden + min(at, hidden - 8)), 0, 1);
    } else {
      ::load<ALIGNED>(pack, streams + stream * hidden, at, end);
    }
  }
};

// The weights of a token: those of a lane's rows 2 q and 2 q + 1 in its row g, and h_pre of this.
struct Weights {
  float h_res[2], h_pre;

  __device__ void load(const Operands& from, int any_token, int block) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const long long token = min(any_token, from.tokens - 1);
    const float* h_of_token = from.h_res + token * from.n * from.n + from.stream(g);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = 2 * q + r;
      const bool is_there = from.end(g) > 0 && from.end(row) > 0 && row / N == g / N;
      h_res[r] = is_there ? h_of_token[from.stream(row) * from.n] : 0.f;
    }
    h_pre = from.end(g) > 0 ? from.h_pre[token * from.n + from.stream(g)] : 0.f;
  }
};

// The values of a token: of the octet in place g the rows 2 q and 2 q + 1 of d_x_in, and d_u of set q; of the row g of X
// the octets in the places 2 q and 2 q + 1.
struct Values {
  Pack<Stream, 8> d_x_ins[2], d_u, xs[2];

  // Stores d_x of the row g; `products` is the address of the tile's, of which this is `token`.
  template <bool ALIGNED>
  __device__ void finish(const Operands& to, const Weights& weights, float2 factors, u32 products,
                         int token, int tile, int block) const {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    // H_res^T and h_pre: the rows g of A are their upper parts, the rows g + 8 their lower ones. Column g of B is
    // channel e of the octet in place g.
    u32 h[2], own_h_pre[2];
    split(weights.h_res[0], weights.h_res[1], h);
    split(g / N == q ? weights.h_pre : 0.f, 0.f, own_h_pre);
    float values[2][8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const auto pair_of_rows = [&](u32 low, u32 high) {
        return __byte_perm(low, high, e % 2 ? 0x7632 : 0x5410);
      };
      float mixed[4] = {};
      mma(mixed, h[0], h[1], own_h_pre[0], own_h_pre[1],
          {pair_of_rows(d_x_ins[0].words[e / 2], d_x_ins[1].words[e / 2]),
           pair_of_rows(d_u.words[e / 2], 0)});
#pragma unroll
      for (int r = 0; r < 2; ++r) values[r][e] = mixed[r] + mixed[2 + r];
    }
    if (to.end(g) == 0 || tile * kTile + token >= to.tokens) return;
    Stream* row = to.d_x + ((tile * kTile + token) * (long long)to.n + to.stream(g)) * to.hidden;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int octet = in_place(2 * q + r);
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const uint4 four = read4(products + place_of(token, g, 2 * octet + p));
        const u32 words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& value = values[r][4 * p + e];
          value += factors.y * __uint_as_float(words[e]);
          value -= factors.x * xs[r][4 * p + e];
        }
      }
      Pack<Stream, 8> result;
      result.set(values[r]);
      store<ALIGNED>(result, row, to.first(g, block) + 8 * octet, to.end(g));
    }
  }
};

// ---- the product with phi -----------------------------------------------------------------------

// phi of 8 channels, an octet, of some rows, as B fragments of float16 in `unit`: column g is channel g.
template <int ROWS, int HEXETS>
struct Phi {
  uint2 fragments[ROWS][HEXETS];
  float unit;

  __device__ void load(const Operands& from, const float* phi, int columns, int block,
                       int first_row, int octet) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    unit = 0.f;
#pragma unroll 1
    for (int r = 0; r < ROWS; ++r) {
      const int row = first_row + r, first = from.first(row, block) + 8 * octet;
      const float* rows = phi + ((long long)from.stream(row) * from.hidden + first) * columns;
      unit = fmaxf(unit, unit_of(rows, min(from.end(row) - first, 8) * columns));
    }
    const float scale = inverse_of_unit(unit);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int row = first_row + r, channel = from.first(row, block) + 8 * octet + g;
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
  __device__ void multiply(u32 dm, int hexets, u32 products, int first_row, int octet) const {
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
          write2(products + place_of(g + 8 * half, first_row + first + r, 2 * octet + q / 2) +
                     q % 2 * 8,
                 {__float_as_uint(unit * sums[r][2 * half]),
                  __float_as_uint(unit * sums[r][2 * half + 1])});
        }
      }
    }
  }
};
