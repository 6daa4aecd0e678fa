// d_x as project_back_streams makes it, for 5 to 8 streams where a block has shared memory for several tiles: so twice as
// many warps need no registers for what is on its way, and products of the next tile are made beside this one's
// results. H_res is mixed on tensor cores, a token at a time, in two bfloat16 parts.

#include "base/matrix.cuh"

// A row is a stream, or none behind the last one.
constexpr int kRows = 8;
constexpr int kChannels = 64;
static_assert(SIZE == kRows);

// Column i of a token's products is the octet of channels in_place(i): a lane has neighbouring columns, and four lanes
// store neighbouring octets at once.
__device__ inline int in_place(int i) { return i / 2 + i % 2 * 4; }

// Products of a tile in shared memory: [token][row][64 channels], whose 16-byte pieces are in an order that lets lanes
// write and read all banks at once. Here the place of the four channels `piece` of a row.
constexpr u32 kTokenBytes = kRows * kChannels * 4 + 32;
constexpr u32 kProducts = kTile * kTokenBytes;
__device__ inline u32 place_of(int token, int row, int piece) {
  return token * kTokenBytes + row * kChannels * 4 + (piece ^ row % 2) * 16;
}

struct Operands {
  const Stream *x, *d_u, *d_x_in;
  const float *h_pre, *h_res;
  const float2* factors;
  Stream* d_x;
  int tokens, n, hidden;

  // Of a row of the block whose first channel is given: the stream, the first channel, and where the channels end.
  __device__ static int stream(int row) { return row; }
  __device__ static int first(int, int block) { return block; }
  __device__ int end(int row) const { return EXACT || row < n ? hidden : 0; }
};

// The weights of a token: those of a lane's rows 2 q and 2 q + 1 in its row g, and h_pre of this.
struct Weights {
  float h_res[2], h_pre;

  __device__ void load(const Operands& from, int any_token) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const long long token = min(any_token, from.tokens - 1);
    const float* h_of_token = from.h_res + token * from.n * from.n + g;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = 2 * q + r;
      const bool is_there = from.end(g) > 0 && from.end(row) > 0;
      h_res[r] = is_there ? h_of_token[row * from.n] : 0.f;
    }
    h_pre = from.end(g) > 0 ? from.h_pre[token * from.n + g] : 0.f;
  }
};

// The values of a token: of the octet in place g the rows 2 q and 2 q + 1 of d_x_in, and, where q is 0, d_u; of the row g
// of X the octets in the places 2 q and 2 q + 1.
struct Values {
  Pack<Stream, 8> d_x_ins[2], d_u, xs[2];

  // Stores d_x of the row g; `products` is the address of the tile's, of which this is `token`.
  __device__ void finish(const Operands& to, const Weights& weights, float2 factors, u32 products,
                         int token, int tile, int block) const {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    // H_res^T and h_pre: the rows g of A are their upper parts, the rows g + 8 their lower ones. Column g of B is
    // channel e of the octet in place g.
    u32 h[2], own_h_pre[2];
    split(weights.h_res[0], weights.h_res[1], h);
    split(q == 0 ? weights.h_pre : 0.f, 0.f, own_h_pre);
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
    Stream* row = to.d_x + ((tile * kTile + token) * (long long)to.n + g) * to.hidden;
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
      store<true>(result, row, block + 8 * octet, to.end(g));
    }
  }
};

#include "two_pass/back_phi.cuh"

// ---- shared memory ------------------------------------------------------------------------------

constexpr int kThreads = tuning_project_back_stages::threads;
constexpr int kHexets = tuning_project_back_stages::hexets;
constexpr int kStages = tuning_project_back_stages::stages;
// Rows of an octet of channels whose phi a warp has.
constexpr int kOwnRows = kRows * 8 / (kThreads / 32);
static_assert(kTile == tuning_project_back_stages::tokens && kThreads == kTile * 32);
static_assert(kChannels == tuning_project_back_stages::channels);

// Shared memory: stages, each X and d_x_in of a tile as [token][row], and d_u, in lines of 64 channels, and r dm as it is
// in memory; then products of two tiles.
constexpr u32 kLine = kChannels * sizeof(Stream);
constexpr u32 kX = kTile * kRows * kLine, kDU = kTile * kLine;
constexpr u32 kStage = 2 * kX + kDU + kHexets * 32 * 16;
static_assert(kStages * kStage + 2 * kProducts == tuning_project_back_stages::shared_bytes);

// The place of an octet of a row: lanes read all banks at once, those of a row and those of an octet.
__device__ inline u32 line_place(int token, int row, int octet) {
  return (token * kRows + row) * kLine + (octet ^ in_place(row)) * 16;
}

// The copies to a stage: 16 bytes of X and of d_x_in for each thread and 8 tokens, and some of the others.
__device__ inline void copy_tile(const Operands& from, Fragments dm, u32 stage, int tile,
                                 int block) {
  const int octet = threadIdx.x % 8, row = threadIdx.x / 8 % kRows;
  const int channel = block + 8 * octet;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = threadIdx.x / 64 + 8 * half;
    const bool exists = channel < from.end(row) && tile * kTile + token < from.tokens;
    const long long at =
        exists ? ((tile * kTile + token) * (long long)from.n + row) * from.hidden + channel : 0;
    const u32 to = stage + line_place(token, row, octet);
    copy_part(to, from.x + at, exists);
    copy_part(to + kX, from.d_x_in + at, exists);
  }
  if (threadIdx.x < kTile * 8) {
    const int token = tile * kTile + threadIdx.x / 8;
    const bool exists = channel < from.hidden && token < from.tokens;
    const long long at = exists ? (long long)token * from.hidden + channel : 0;
    copy_part(stage + 2 * kX + threadIdx.x * 16, from.d_u + at, exists);
  }
  if (threadIdx.x < dm.hexets() * 32) {
    copy_part(stage + 2 * kX + kDU + threadIdx.x * 16, dm.row_fragments<1>(tile) + threadIdx.x,
              true);
  }
}

// X of a tile is one piece of memory, and so is d_x_in, of which a block has lines of 128 bytes. Memory delivers long pieces
// faster than such lines: so blocks beside each other bring a part each to the L2 cache, so many tiles before the copies.
constexpr int kAhead = 2;
__device__ inline void prefetch_tile(const Operands& from, int tile, int groups) {
  const long long row = (long long)from.n * from.hidden;
  const long long part = (kTile * row / groups + 7) / 8 * 8, first = blockIdx.x % groups * part;
  const long long here = min(part, min(kTile, from.tokens - tile * kTile) * row - first);
  if (here <= 0) return;
  const long long at = tile * kTile * row + first;
  prefetch(from.x + at, here * sizeof(Stream));
  prefetch(from.d_x_in + at, here * sizeof(Stream));
}

__device__ inline void read(Pack<Stream, 8>& pack, u32 at) {
  *reinterpret_cast<uint4*>(&pack.words[0]) = read4(at);
}
__device__ inline void read_values(Values& values, u32 stage, int token) {
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, octet = in_place(g);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    read(values.d_x_ins[r], stage + kX + line_place(token, 2 * q + r, octet));
    read(values.xs[r], stage + line_place(token, g, in_place(2 * q + r)));
  }
  values.d_u = {};
  if (q == 0) read(values.d_u, stage + 2 * kX + token * kLine + octet * 16);
}

// Grid: groups of 64 channels, beside each other; sets of tiles. d_x_in may be d_x.
KERNEL(project_back_stages, kThreads, 1)
(const Stream* x, const float* phi, u32* rows, int num_columns, const float* h_pre,
 const float2* factors, const Stream* d_u, const Stream* d_x_in, const float* h_res, Stream* d_x,
 int tokens, int n, int hidden, int groups) {
  extern __shared__ uint4 shared[];
  const Operands operands = {
      x, d_u, d_x_in, h_pre, h_res, factors, d_x, tokens, EXACT ? kRows : n, hidden};
  const Fragments dm{rows, nullptr, num_columns};
  const u32 memory = u32(__cvta_generic_to_shared(shared));
  const int warp = threadIdx.x / 32;
  const int block = blockIdx.x % groups * kChannels;
  const int tiles = (tokens + kTile - 1) / kTile, step = gridDim.x / groups;
  const int hexets = dm.hexets();
  const auto stage_at = [&](int slot) { return memory + slot * kStage; };
  const auto products_at = [&](int buffer) {
    return memory + kStages * kStage + buffer * kProducts;
  };
  const auto copy = [&](int tile, int slot) {
    if (tile < tiles) copy_tile(operands, dm, stage_at(slot), tile, block);
    commit_async();
  };

  int tile = blockIdx.x / groups, slot = 0, buffer = 0;
  if (tile >= tiles) return;
  for (int i = 0; i < kStages - 1; ++i) copy(tile + i * step, i);
  const auto factors_of = [&](int tile) { return factors[min(tile * kTile + warp, tokens - 1)]; };
  Weights weights;
  weights.load(operands, tile * kTile + warp);
  float2 own_factors = factors_of(tile);
  PhiOf<kOwnRows, kHexets> own_phi;
  own_phi.load(operands, phi, num_columns, block);
  const auto multiply = [&](int slot, int buffer) {
    own_phi.multiply(stage_at(slot) + 2 * kX + kDU, hexets, products_at(buffer));
  };
  wait_for_async<kStages - 2>();
  __syncthreads();  // the first tile is there
  multiply(slot, buffer);

  for (; tile < tiles; tile += step, buffer ^= 1) {
    wait_for_async<kStages - 3>();
    // The products are there, and the next tile. Nobody needs the tile before any more, or its products.
    __syncthreads();
    copy(tile + (kStages - 1) * step, (slot + kStages - 1) % kStages);
    const int later = tile + (kStages - 1 + kAhead) * step;
    if (threadIdx.x == 0 && later < tiles) prefetch_tile(operands, later, groups);
    const int next = min(tile + step, tiles - 1), next_slot = (slot + 1) % kStages;
    Weights next_weights;
    next_weights.load(operands, next * kTile + warp);
    const float2 next_factors = factors_of(next);
    if (tile + step < tiles) multiply(next_slot, buffer ^ 1);
    Values values;
    read_values(values, stage_at(slot), warp);
    values.finish(operands, weights, own_factors, products_at(buffer), warp, tile, block);
    weights = next_weights, own_factors = next_factors, slot = next_slot;
  }
}
