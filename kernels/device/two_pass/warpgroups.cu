// The products of projection.cu that have the streams as their left factor, where phi has many columns: by warpgroups,
// from operands that the copy engine brings to shared memory as lines of 128 bytes.
//
//   phi_lines      phi in two bfloat16 parts, as lines of 64 rows
//   project_lines  vec(X) phi and the sum of X^2, for slices of the n C values of a token            [14]
//   r_dm_lines     r dm in two parts, as lines of 64 tokens
//   d_phi_lines    sums over some tokens of vec(X)^T (r dm)
//
// Clusters of two blocks are persistent, and have a ring of stages. A stage has 64 values of the sum, of as many tokens or
// channels as the warpgroups have rows, 64 each. Phi and r dm are the same for both blocks: each copies one part of them to
// both, so that they come from the L2 cache once for all rows of a cluster. A warpgroup that multiplies nothing, and has
// hardly any registers, asks for a stage as soon as everybody has gone through what was there: a warp that multiplied
// and copied would keep its warpgroup waiting, and so the ring.

#include "one_pass/one_pass.cuh"

// Columns of a chunk, which a block works on.
constexpr int kColumns = 8 * SIZE;
constexpr int kParts = kWeightParts<Stream>;
static_assert(sizeof(Stream) == 2 && kStreamParts<Stream> == 1 && kParts == 2);
// Values of a line, and rows of a warpgroup.
constexpr int kLine = kBoxChannels, kRows = 64;
static_assert(kLine == 64);
// Both parts of a chunk for 64 values of the sum: [part][column], a line each.
constexpr u32 kPartBytes = kColumns * kRowBytes, kRightBytes = kParts * kPartBytes;
static_assert(kPartBytes % 1024 == 0);
// 16 bytes of a line.
constexpr int kUnits = 8;
// Blocks of a cluster, which bring each other a part of the right factor each.
constexpr int kBlocks = 2;
static_assert(kBlocks == kParts);

// Where the unit of a line lies in the lines of a chunk.
__device__ inline long long place_of(long long lines, int part, int column, int unit) {
  return ((lines * kParts + part) * kColumns + column) * kUnits + (unit ^ column % 8);
}

// ---- operands in lines ----------------------------------------------------------------------------

// Columns of a piece of phi, which 128 threads have at once.
constexpr int kPieceColumns = 16, kPieceThreads = kPieceColumns * kUnits;
static_assert(kColumns % kPieceColumns == 0 && tuning_phi_lines::threads % kPieceThreads == 0);

// lines: [chunk][64 rows][part][column], a line each; zero behind the last column. Neighbours read neighbours of a row of
// phi and write neighbours of a line: shared memory turns a piece of 64 rows.
KERNEL(phi_lines, tuning_phi_lines::threads)
(const float* phi, uint4* lines, int width, int columns, int chunks) {
  constexpr int kPieces = tuning_phi_lines::threads / kPieceThreads;
  // One more column, so that the threads of a warp find their numbers in different banks.
  static __shared__ float pieces[kPieces][kLine][kPieceColumns + 1];
  const int blocks = width / kLine, of_block = threadIdx.x / kPieceThreads;
  const int thread = threadIdx.x % kPieceThreads;
  const int piece = blockIdx.x * kPieces + of_block;
  const int first = piece % (kColumns / kPieceColumns) * kPieceColumns;
  const int group = piece / (kColumns / kPieceColumns);
  const bool exists = group < chunks * blocks;
  auto& own = pieces[of_block];

  const int from_row = thread / kPieceColumns, own_column = thread % kPieceColumns;
  const int c = group / blocks * kColumns + first + own_column;
#pragma unroll
  for (int row = from_row; row < kLine; row += kPieceThreads / kPieceColumns) {
    const long long k = (long long)(group % blocks) * kLine + row;
    own[row][own_column] = exists && c < columns ? phi[k * columns + c] : 0.f;
  }
  __syncthreads();
  if (!exists) return;
  const int unit = thread % kUnits, column = thread / kUnits;
  u32 words[4][kParts];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    split(own[8 * unit + 2 * w][column], own[8 * unit + 2 * w + 1][column], words[w]);
  }
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    lines[place_of(group, p, first + column, unit)] = {words[0][p], words[1][p], words[2][p],
                                                       words[3][p]};
  }
}

// lines: [64 tokens][chunk][part][column], from what `Fragments` has for d_phi; zero behind the last token and column.
KERNEL(r_dm_lines, tuning_r_dm_lines::threads)
(u32* fragments, uint4* lines, int tokens, int columns, int chunks) {
  const Fragments dm{nullptr, fragments, columns};
  const int tiles = (tokens + kTile - 1) / kTile, groups = (tokens + kLine - 1) / kLine;
  constexpr int kTiles = kLine / kTile;
  const long long at = (long long)blockIdx.x * tuning_r_dm_lines::threads + threadIdx.x;
  if (at >= (long long)groups * chunks * kParts * kColumns * kTiles) return;
  const int quarter = at % kTiles, own = at / kTiles % kColumns;
  const int part = at / kTiles / kColumns % kParts;
  const long long group = at / kTiles / kColumns / kParts;
  const int c = group % chunks * kColumns + own, tile = int(group / chunks) * kTiles + quarter;
  // Those of the first 8 tokens and those of the others take turns.
  uint4 first = {}, second = {};
  if (tile < tiles && c / 8 < dm.octets()) {
    const uint2* octet = dm.column_fragments<kParts>(tile) + (c / 8 * kParts + part) * 32;
    const uint4* from = reinterpret_cast<const uint4*>(octet + c % 8 * 4);
    first = from[0], second = from[1];
  }
  lines[place_of(group, part, own, 2 * quarter)] = {first.x, first.z, second.x, second.z};
  lines[place_of(group, part, own, 2 * quarter + 1)] = {first.y, first.w, second.y, second.w};
}

// ---- a block ----------------------------------------------------------------------------------------

extern __shared__ __align__(1024) unsigned char memory[];

// Stages, each the lines of X and behind them those of the other factor; then the barriers.
template <class TUNING, u32 LEFT_BYTES>
struct StagesOf {
  // Those of the warps that multiply.
  static constexpr int kThreads = TUNING::threads - 128, kWarps = kThreads / 32;
  static constexpr int kNum = TUNING::stages;
  static constexpr u32 kBytes = LEFT_BYTES + kRightBytes, kBarriers = kNum * kBytes;
  static_assert(kThreads % 128 == 0 && LEFT_BYTES % 1024 == 0);
  // Registers, and those of the loader, are as many as a block starts with.
  static constexpr int kRegisters = TUNING::registers;
  static constexpr int kAtStart = 65536 / TUNING::threads / 8 * 8;
  static constexpr int kOtherRegisters = (TUNING::threads * kAtStart - kThreads * kRegisters) / 128;
  static_assert(kRegisters % 8 == 0 && kOtherRegisters % 8 == 0 && kOtherRegisters >= 24);
  static_assert(kBarriers + 2 * kNum * 8 <= TUNING::shared_bytes);
  using Place = Ring<kNum>;

  u32 base = shared_address(memory);

  __device__ u32 left(const Place& place) const { return base + place.slot * kBytes; }
  __device__ u32 right(const Place& place) const { return left(place) + LEFT_BYTES; }
  __device__ u32 full(int slot) const { return base + kBarriers + slot * 8; }
  __device__ u32 empty(int slot) const { return full(kNum + slot); }

  // By all threads, before anything else.
  __device__ void start() const {
    if (threadIdx.x == 0) {
      for (int slot = 0; slot < kNum; ++slot) {
        init_barrier(full(slot), 1);
        init_barrier(empty(slot), kBlocks * kWarps);
      }
      publish_barriers();
    }
    start_cluster();
    cluster_wait();
  }

  // By one thread: a box of X, whose first token and 64 channels are given, and this block's part of the lines for both
  // blocks, once both have gone through what was there.
  __device__ void fill(Place& place, const TensorMap& x, int token, int box, const uint4* lines,
                       u32 rank) const {
    wait(empty(place.slot), place.parity ^ 1);
    arrive_and_expect(full(place.slot), kBytes);
    copy_in(left(place), x, token, box, 0, full(place.slot), evict_first());
    copy_to_both(right(place) + rank * kPartBytes, lines + rank * (kPartBytes / 16), kPartBytes,
                 full(place.slot));
    place.next();
  }
  // By all threads that multiply. What the other block sends counts for this block's barrier, too.
  __device__ void await(const Place& place) const { wait(full(place.slot), place.parity); }
  __device__ void release(Place& place, u32 rank) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      arrive(empty(place.slot));
      arrive_in_block(in_block(empty(place.slot), rank ^ 1));
    }
    place.next();
  }
};

// uint4 of the lines of a stage.
constexpr int kRightLines = kRightBytes / 16;

// ---- project_lines ----------------------------------------------------------------------------------

namespace forward {

constexpr int kTokens = kTile * tuning_project_lines::tiles;
using Stages = StagesOf<tuning_project_lines, kTokens * kRowBytes>;
static_assert(Stages::kWarps * 16 == kTokens && kTile == tuning_project_lines::tokens);
// Neighbouring boxes that go to the L2 cache at once, ahead of the ring: memory delivers 256 bytes of a token in less time
// than twice 128.
constexpr int kAhead = 2;

// Tensor cores cut a sum off after every addition: they have those of a stage alone, the lower parts first.
struct Sums {
  float products[SIZE * 4] = {};
  float squares[2] = {};

  __device__ void add_stage(const Stages& stages, const Stages::Place& place, int first_row,
                            bool has_squares) {
    const int lane = threadIdx.x % 32;
    u32 x[4][4];
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      read_matrices(x[step],
                    stages.left(place) + swizzled(first_row + lane % 16, 2 * step + lane / 16));
    }
    float fresh[SIZE * 4];
    begin_products();
#pragma unroll
    for (int p = kParts - 1; p >= 0; --p) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        multiply(fresh, x[step], lines_at(stages.right(place) + p * kPartBytes + step * 32),
                 p < kParts - 1 || step > 0);
      }
    }
    commit_products();
    if (has_squares) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float low = low_half(x[step][r]), high = high_half(x[step][r]);
          squares[r % 2] += low * low;
          squares[r % 2] += high * high;
        }
      }
    }
    finish_products();
#pragma unroll
    for (int s = 0; s < SIZE * 4; ++s) {
      keep(fresh[s]);
      products[s] += fresh[s];
    }
  }
};

// What clusters take in turn: a slice of some tokens, for a chunk of the columns. Chunks have the same X, slices
// neighbouring values of it.
struct Units {
  static constexpr int kPair = kBlocks * kTokens;
  int tokens, width, slice, chunks, rank;

  __device__ int slices() const { return (width + slice - 1) / slice; }
  __device__ u32 num() const { return (tokens + kPair - 1) / kPair * slices() * chunks; }
  __device__ int chunk(int unit) const { return unit % chunks; }
  __device__ int slice_of(int unit) const { return unit / chunks % slices(); }
  // The first token of this block, and the first 64 values.
  __device__ int token(int unit) const { return unit / chunks / slices() * kPair + rank * kTokens; }
  __device__ int first(int unit) const { return slice_of(unit) * (slice / kLine); }
  __device__ int num_blocks(int unit) const {
    return min(slice / kLine, width / kLine - first(unit));
  }
};

}  // namespace forward

// partial: [tokens, slices, num_octets * 8 + 2], the last two entries the sum of squares and nothing. A slice is a
// multiple of 64 values, and so is the width.
KERNEL(project_lines, tuning_project_lines::threads, 1)
(const __grid_constant__ TensorMap x, const uint4* phi, float* partial, int tokens, int width,
 int columns, int slice, int chunks) {
  using namespace forward;
  const Stages stages;
  const int rank = cluster_rank();
  stages.start();
  // Each role asks for its units again, so that none keeps in registers what the other wants.
  const Units all{tokens, width, slice, chunks, rank};
  Stages::Place place;
  if (threadIdx.x < Stages::kThreads) {
    take_registers<Stages::kRegisters>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    for (u32 unit = cluster_id(); unit < all.num(); unit += num_clusters()) {
      Sums sums;
      const bool has_squares = all.chunk(unit) == 0;
      const bool has_tokens = all.token(unit) + warp / 4 * kRows < tokens;
      for (int left = all.num_blocks(unit); left > 0; --left) {
        stages.await(place);
        // The tensor cores are those of the warpgroups that have tokens.
        if (has_tokens) sums.add_stage(stages, place, warp * 16, has_squares);
        stages.release(place, rank);
      }
      keep(unit);
      const int row_length = (columns + 7) / 8 * 8 + 2;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float square = sums.squares[h];
        square += __shfl_xor_sync(kAllLanes, square, 1);
        square += __shfl_xor_sync(kAllLanes, square, 2);
        const int token = all.token(unit) + warp * 16 + g + 8 * h;
        if (token >= tokens) continue;
        const long long at = (long long)token * all.slices() + all.slice_of(unit);
        float* out = partial + at * row_length;
#pragma unroll
        for (int octet = 0; octet < SIZE; ++octet) {
          const int c = all.chunk(unit) * kColumns + octet * 8 + 2 * q;
          if (c < row_length - 2) {
            *reinterpret_cast<float2*>(out + c) = {sums.products[4 * octet + 2 * h],
                                                   sums.products[4 * octet + 2 * h + 1]};
          }
        }
        if (has_squares && q == 0) out[row_length - 2] = square;
      }
    }
  } else {
    give_registers<Stages::kOtherRegisters>();
    if (threadIdx.x == Stages::kThreads) {
      for (u32 unit = cluster_id(); unit < all.num(); unit += num_clusters()) {
        const int token = all.token(unit), first = all.first(unit);
        const int end = first + all.num_blocks(unit);
        const uint4* lines = phi + (long long)all.chunk(unit) * (width / kLine) * kRightLines;
#pragma unroll 1
        for (int block = first; block < end; ++block) {
          for (int ahead = 0; (block - first) % kAhead == 0 && ahead < kAhead; ++ahead) {
            if (block + kAhead + ahead < end) prefetch(x, token, block + kAhead + ahead, 0);
          }
          stages.fill(place, x, token, block, lines + (long long)block * kRightLines, rank);
        }
      }
    }
  }
  end_cluster();
}

// ---- d_phi_lines ------------------------------------------------------------------------------------

namespace gradient {

constexpr int kChannels = tuning_d_phi_lines::channels;
using Stages = StagesOf<tuning_d_phi_lines, kChannels * kLine * sizeof(Stream)>;
static_assert(Stages::kWarps * 16 == kChannels && kLine == kTile * tuning_d_phi_lines::tiles);
// Where a product takes both parts, each has sums of its own.
constexpr bool kIsBoth = kParts * kColumns <= 256;
constexpr int kSums = SIZE * 4 * (kIsBoth ? kParts : 1);

// Of a warpgroup, whose X begins at `x`; d_phi of nothing before it where not `adds`.
__device__ inline void add_stage(float (&sums)[kSums], u32 x, u32 r_dm, bool adds) {
  begin_products();
#pragma unroll
  for (int step = 0; step < kLine / 16; ++step) {
    const u64 left = transposed_lines_at(x + step * 16 * kRowBytes);
#pragma unroll
    for (int p = kIsBoth ? 0 : kParts - 1; p >= 0; --p) {
      multiply(sums, left, lines_at(r_dm + p * kPartBytes + step * 32), adds);
      adds = true;
    }
  }
  commit_products();
  finish_products();
#pragma unroll
  for (int s = 0; s < kSums; ++s) keep(sums[s]);
}

// What clusters take in turn: some channels of a split of the tokens, for a chunk of the columns. Chunks have the same X.
struct Units {
  static constexpr int kPair = kBlocks * kChannels;
  int tokens, width, splits, chunks, rank;

  // Lines of tokens, and those of a split.
  __device__ int groups() const { return (tokens + kLine - 1) / kLine; }
  __device__ int of_split() const { return (groups() + splits - 1) / splits; }
  __device__ u32 num() const { return (width + kPair - 1) / kPair * splits * chunks; }
  __device__ int chunk(int unit) const { return unit % chunks; }
  __device__ int split(int unit) const { return unit / chunks % splits; }
  // The first channel of this block, and the first line.
  __device__ int channel(int unit) const {
    return unit / chunks / splits * kPair + rank * kChannels;
  }
  __device__ int first(int unit) const { return split(unit) * of_split(); }
  __device__ int num_groups(int unit) const { return min(of_split(), groups() - first(unit)); }
};

}  // namespace gradient

// partial: [splits, width, columns].
KERNEL(d_phi_lines, tuning_d_phi_lines::threads, 1)
(const __grid_constant__ TensorMap x, const uint4* r_dm, float* partial, int tokens, int width,
 int columns, int splits, int chunks) {
  using namespace gradient;
  const Stages stages;
  const int rank = cluster_rank();
  stages.start();
  const Units all{tokens, width, splits, chunks, rank};
  Stages::Place place;
  if (threadIdx.x < Stages::kThreads) {
    take_registers<Stages::kRegisters>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    for (u32 unit = cluster_id(); unit < all.num(); unit += num_clusters()) {
      float sums[kSums] = {};
      bool adds = false;
      for (int left = all.num_groups(unit); left > 0; --left, adds = true) {
        stages.await(place);
        add_stage(sums, stages.left(place) + warp / 4 * (kRows * kRowBytes), stages.right(place),
                  adds);
        stages.release(place, rank);
      }
      keep(unit);
      float* out = partial + (long long)all.split(unit) * width * columns;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int k = all.channel(unit) + warp * 16 + g + 8 * h;
        if (k >= width) continue;
#pragma unroll
        for (int octet = 0; octet < SIZE; ++octet) {
          const int c = all.chunk(unit) * kColumns + octet * 8 + 2 * q;
          if (c >= columns) continue;
          float2 own = {sums[4 * octet + 2 * h], sums[4 * octet + 2 * h + 1]};
          if constexpr (kIsBoth) {
            own.x += sums[4 * (SIZE + octet) + 2 * h];
            own.y += sums[4 * (SIZE + octet) + 2 * h + 1];
          }
          float* to = out + (long long)k * columns + c;
          if (columns % 2 == 0) {
            *reinterpret_cast<float2*>(to) = own;
          } else {
            to[0] = own.x;
            if (c + 1 < columns) to[1] = own.y;
          }
        }
      }
    }
  } else {
    give_registers<Stages::kOtherRegisters>();
    if (threadIdx.x == Stages::kThreads) {
      for (u32 unit = cluster_id(); unit < all.num(); unit += num_clusters()) {
        const int box = all.channel(unit) / kLine, first = all.first(unit);
        const int end = first + all.num_groups(unit);
        const uint4* lines = r_dm + (long long)all.chunk(unit) * kRightLines;
#pragma unroll 1
        for (int group = first; group < end; ++group) {
          stages.fill(place, x, group * kLine, box, lines + (long long)group * chunks * kRightLines,
                      rank);
        }
      }
    }
  }
  end_cluster();
}
