// d_x as project_back_streams makes it, for 5 to 8 streams where a block has shared memory for several tiles: so twice as
// many warps need no registers for what is on its way, and products of the next tile are made beside this one's
// results.

#include "two_pass/back_streams.cuh"

constexpr int kThreads = tuning_project_back_stages::threads;
constexpr int kHexets = tuning_project_back_stages::hexets;
constexpr int kStages = tuning_project_back_stages::stages;
// Rows of an octet of channels whose phi a warp has.
constexpr int kOwnRows = kRows * 8 / (kThreads / 32);
static_assert(kTile == tuning_project_back_stages::tokens && kThreads == kTile * 32);
static_assert(kSets == 1 && kChannels == tuning_project_back_stages::channels);

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

// What goes to a stage: 16 bytes of X and of d_x_in for each thread and 8 tokens, and some of the others.
__device__ inline void copy_tile(const Operands& from, Fragments dm, u32 stage, int tile,
                                 int block) {
  const int octet = threadIdx.x % 8, row = threadIdx.x / 8 % kRows;
  const int channel = block + 8 * octet, stream = from.stream(row);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = threadIdx.x / 64 + 8 * half;
    const bool exists = channel < from.end(row) && tile * kTile + token < from.tokens;
    const long long at =
        exists ? ((tile * kTile + token) * (long long)from.n + stream) * from.hidden + channel : 0;
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
  const Operands operands = {x,       d_u, d_x_in, h_pre,         h_res,
                             factors, d_x, tokens, EXACT ? N : n, hidden};
  const Fragments dm{rows, nullptr, num_columns};
  const u32 memory = u32(__cvta_generic_to_shared(shared));
  const int warp = threadIdx.x / 32, octet = warp % 8, first_row = warp / 8 * kOwnRows;
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
  weights.load(operands, tile * kTile + warp, block);
  float2 own_factors = factors_of(tile);
  Phi<kOwnRows, kHexets> own_phi;
  own_phi.load(operands, phi, num_columns, block, first_row, octet);
  const auto multiply = [&](int slot, int buffer) {
    own_phi.multiply(stage_at(slot) + 2 * kX + kDU, hexets, products_at(buffer), first_row, octet);
  };
  wait_for_async<kStages - 2>();
  __syncthreads();  // the first tile is there
  multiply(slot, buffer);

  for (; tile < tiles; tile += step, buffer ^= 1) {
    wait_for_async<kStages - 3>();
    // The products are there, and the next tile. Nobody needs the tile before any more, or its products.
    __syncthreads();
    copy(tile + (kStages - 1) * step, (slot + kStages - 1) % kStages);
    const int next = min(tile + step, tiles - 1), next_slot = (slot + 1) % kStages;
    Weights next_weights;
    next_weights.load(operands, next * kTile + warp, block);
    const float2 next_factors = factors_of(next);
    if (tile + step < tiles) multiply(next_slot, buffer ^ 1);
    Values values;
    read_values(values, stage_at(slot), warp);
    values.finish<true>(operands, weights, own_factors, products_at(buffer), warp, tile, block);
    weights = next_weights, own_factors = next_factors, slot = next_slot;
  }
}
