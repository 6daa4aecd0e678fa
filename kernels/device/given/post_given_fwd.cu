// The forward pass of post_pre with given weights, but for the coefficients, in one pass over the streams:
//
//   X'[i] = h_post[i] y + sum over j of H_res[i, j] X[j]                                            [3]
//   u     = sum over i of h_given[i] X'[i]                                                          [D1]
//   parts of vec(X') phi and of the sum of X'^2, each over some channels                            [14, 15]
//
// u does not wait for the projection, so that streams wait for no other block. A block has SIZE channels of all streams,
// as far as there are so many, and every gridDim.y-th tile of 8 tokens. Its warps, by what they do with each tile:
//
//   main (8)    X' and u in place of X and y, and the warp's part of the sums, with phi in registers all the time. Warp w
//               has the 16 bytes w of every 128, in all streams
//   mover       X and y from memory and the tokens' coefficients; X' and u to memory
//   sum (2)     the sum of the main warps' parts, and of two blocks' where these are a cluster, to memory: there
//               given_coefficients.cu adds up those of all channels. The two take tiles in turns
//
// A token's sums are cut by C alone: they do not depend on the other tokens or on how many there are.

#include "one_pass/products.cuh"
#include "one_pass/products_f32.cuh"

using Tuned = tuning_post_given_fwd;
constexpr int kTokens = kTileTokens;
constexpr int kStages = Tuned::stages;
constexpr int kSlots = Tuned::slots;  // of tiles whose sums wait for those of the other block
constexpr int kSumWarps = 2;
constexpr int kThreads = Tuned::threads;
constexpr int kMainWarps = kRowBytes / 16;
// Registers of a thread go from four warps to eight.
constexpr int kMainRegisters = 208;
constexpr int kOtherRegisters = 504 - 2 * kMainRegisters;
static_assert(kTokens == Tuned::tokens && kThreads == 32 * (kMainWarps + 4), "kernels/tuning.rs");

// ---- shared memory ----------------------------------------------------------------------------------

// A row of a tile's sums of a warp: the columns of phi, the sum of squares, and padding.
constexpr int kSquares = 4 * kColumns;
constexpr int kSumsBytes = (kSquares + 4 + 15) / 16 * 16;
constexpr int kPartBytes = kTokens * kSumsBytes;
constexpr int kPartsBytes = kMainWarps * kPartBytes;
// A row of a token's coefficients: H_res, h_post, h_given, and padding that keeps the rows of all tokens in different
// banks.
constexpr int kHPost = N * N * 4;
constexpr int kHGiven = kHPost + N * 4;
constexpr int kCoefficientStride = kHGiven + 2 * N * 4;
constexpr int kCoefficientBytes = kTokens * kCoefficientStride;
// A stage: X as [stream, box, token, 128 bytes], then y alike.
constexpr int kBox = Tile<kTokens>::kBoxBytes;
constexpr int kPlane = Tile<kTokens>::kPlaneBytes;
constexpr int kY = N * kPlane;
constexpr int kStageBytes = kY + kPlane;

constexpr int kParts = 384;                             // behind the barriers
constexpr int kOthers = kParts + kSlots * kPartsBytes;  // sums of the cluster's other block
constexpr int kCoefficients = kOthers + kSlots * kPartBytes;
constexpr int kFirstStage = (kCoefficients + kStages * kCoefficientBytes + 1023) / 1024 * 1024;
constexpr int kBytes = kFirstStage + kStages * kStageBytes;
static_assert(kBytes == Tuned::shared_bytes, "kernels/tuning.rs");

// On its way to registers phi lies in the last stages, rows of kColumns float32 by stream.
constexpr int kPhiRowBytes = kColumns * 4;
constexpr int kPhiStreamBytes = SIZE * kPhiRowBytes;
constexpr int kPhi = kBytes - N * kPhiStreamBytes;
constexpr int kFreeStages = (kPhi - kFirstStage) / kStageBytes;
static_assert(kPhi >= kFirstStage, "phi lies in stages alone");

// ---- a block ----------------------------------------------------------------------------------------

struct Args {
  const float *h_post, *h_res, *h_given, *phi;
  float4* sums;
  float* squares;
  int tokens, hidden;
};

struct Maps {
  const BlockMaps &x, &y, &x_new, &u;
};

struct Block {
  u32 base;  // address of the block's shared memory
  const Args& args;

  // Barriers, 8 bytes each: a stage's tile is there; the main warps are done with it; their sums of a tile are there;
  // these have been added; so for the sums of the other block; phi is there; it is in registers.
  __device__ u32 full(u32 slot) const { return base + 8 * slot; }
  __device__ u32 done(u32 slot) const { return base + 8 * (kStages + slot); }
  __device__ u32 barrier_of(u32 which, u32 slot) const {
    return base + 8 * (2 * kStages + which * kSlots + slot);
  }
  __device__ u32 parts_full(u32 slot) const { return barrier_of(0, slot); }
  __device__ u32 parts_empty(u32 slot) const { return barrier_of(1, slot); }
  __device__ u32 others_full(u32 slot) const { return barrier_of(2, slot); }
  __device__ u32 others_empty(u32 slot) const { return barrier_of(3, slot); }
  __device__ u32 phi_full() const { return barrier_of(4, 0); }
  __device__ u32 phi_empty() const { return barrier_of(4, 1); }
  static_assert(8 * (2 * kStages + 4 * kSlots + 2) <= kParts, "barriers");

  __device__ u32 stage(u32 slot) const { return base + kFirstStage + slot * kStageBytes; }
  __device__ u32 coefficients(u32 slot) const {
    return base + kCoefficients + slot * kCoefficientBytes;
  }
  __device__ u32 parts(u32 slot) const { return base + kParts + slot * kPartsBytes; }
  __device__ u32 others(u32 slot) const { return base + kOthers + slot * kPartBytes; }

  template <bool MAY_HAVE_REST = true>
  __device__ Lines<kTokens, MAY_HAVE_REST> lines() const {
    return {int(blockIdx.x) * SIZE, args.hidden};
  }
  // Channels that this block has of a stream.
  __device__ int channels() const { return min(SIZE, args.hidden - int(blockIdx.x) * SIZE); }
  __device__ int num_tiles() const {
    const int tiles = (args.tokens + kTokens - 1) / kTokens;
    return (tiles - int(blockIdx.y) + int(gridDim.y) - 1) / int(gridDim.y);
  }
  __device__ int first_token(int i) const {
    return (int(blockIdx.y) + i * int(gridDim.y)) * kTokens;
  }

  __device__ void init_barriers() const {
    for (u32 slot = 0; slot < kStages; ++slot) {
      init_barrier(full(slot), 1 + 32);
      init_barrier(done(slot), kMainWarps);
    }
    for (u32 slot = 0; slot < kSlots; ++slot) {
      init_barrier(parts_full(slot), kMainWarps);
      init_barrier(parts_empty(slot), 1);
      init_barrier(others_full(slot), 1);
      init_barrier(others_empty(slot), 1);
    }
    init_barrier(phi_full(), 1);
    init_barrier(phi_empty(), kMainWarps);
    publish_barriers();
  }
};

// ---- mover ------------------------------------------------------------------------------------------

__device__ inline void copy_phi(const Block& block) {
  const u32 bytes = block.channels() * kPhiRowBytes;
  arrive_and_expect(block.phi_full(), N * bytes);
  for (int j = 0; j < N; ++j) {
    const size_t row = size_t(j) * block.args.hidden + blockIdx.x * SIZE;
    copy_in(block.base + kPhi + j * kPhiStreamBytes, block.args.phi + row * kColumns, bytes,
            block.phi_full());
  }
}

// WIDTH numbers of each token of a tile, to their places in its rows. Those of tokens that there are not stay as they are:
// no token's results depend on another's.
template <int WIDTH>
__device__ inline void copy_rows(u32 to, const float* from, int first, int tokens, int lane) {
  const int there = min(kTokens, tokens - first) * WIDTH;
#pragma unroll
  for (int number = lane; number < kTokens * WIDTH; number += 32) {
    const u32 at = to + number / WIDTH * kCoefficientStride + number % WIDTH * 4;
    if (number < there) {
      copy_word_async(__cvta_shared_to_generic(at), from + size_t(first) * WIDTH + number);
    }
  }
}

template <bool HAS_REST>
__device__ inline void move_tiles(const Block& block, const Maps& maps, int lane) {
  const Args& args = block.args;
  const u64 policy = evict_first();
  const int num = block.num_tiles();
  const auto lines = block.lines<HAS_REST>();
  int next = 0;
  Ring<kStages> ring;
  const auto load_next = [&] {
    if (next < num) {
      const u32 stage = block.stage(ring.slot), full = block.full(ring.slot);
      const int first = block.first_token(next);
      if (lane == 0) {
        arrive_and_expect(full, kStageBytes);
        lines.template copy_in<N>(stage, maps.x, first, full, policy);
        lines.template copy_in<1>(stage + kY, maps.y, first, full, policy);
      }
      const u32 rows = block.coefficients(ring.slot);
      copy_rows<N * N>(rows, args.h_res, first, args.tokens, lane);
      copy_rows<N>(rows + kHPost, args.h_post, first, args.tokens, lane);
      copy_rows<N>(rows + kHGiven, args.h_given, first, args.tokens, lane);
      arrive_behind_copies(full);
    }
    ++next;
    ring.next();
  };
  if (lane == 0) copy_phi(block);
  while (next < kFreeStages) load_next();
  wait(block.phi_empty(), 0);
  while (next < kStages) load_next();
  Ring<kStages> finished;
#pragma unroll 1
  for (int i = 0; i < num; ++i, finished.next()) {
    wait(block.done(finished.slot), finished.parity);
    if (lane == 0) {
      const u32 stage = block.stage(finished.slot);
      lines.template copy_out<N>(maps.x_new, block.first_token(i), stage);
      lines.template copy_out<1>(maps.u, block.first_token(i), stage + kY);
      commit_copies();
      wait_for_reads<1>();
    }
    __syncwarp();
    // The stage of the tile before has been read.
    if (i > 0) load_next();
  }
  if (lane == 0) finish_copies();
}

// ---- main warps -------------------------------------------------------------------------------------

struct Coefficients {
  float h_res[N][N], h_post[N], h_given[N];

  __device__ explicit Coefficients(u32 row) {
#pragma unroll
    for (int i = 0; i < N; ++i) read_floats(h_res[i], row + i * N * 4);
    read_floats(h_post, row + kHPost);
    read_floats(h_given, row + kHGiven);
  }
};

// X' in place of X, for a word of channels of a token; gives u of X' as it is rounded.
__device__ inline u32 mix(u32 (&x)[N], u32 y, const Coefficients& of) {
  using Word = Pack<Stream, kWordChannels>;
  Word values[N + 1];
#pragma unroll
  for (int j = 0; j <= N; ++j) values[j].words[0] = j < N ? x[j] : y;
  float sums[kWordChannels] = {};
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float own[kWordChannels];
#pragma unroll
    for (int e = 0; e < kWordChannels; ++e) {
      own[e] = of.h_post[i] * values[N][e];
#pragma unroll
      for (int j = 0; j < N; ++j) own[e] += of.h_res[i][j] * values[j][e];
    }
    Word mixed;
    mixed.set(own);
    x[i] = mixed.words[0];
#pragma unroll
    for (int e = 0; e < kWordChannels; ++e) sums[e] += of.h_given[i] * mixed[e];
  }
  Word u;
  u.set(sums);
  return u.words[0];
}

__device__ inline void make_tiles(const Block& block, int warp, int lane) {
  using Phi = Slice<Stream>;
  // Slices of phi that share a box's streams.
  constexpr int kBoxSlices = N / Phi::kStreams;
  const int g = lane / 4;

  Phi phi[kBoxes][kBoxSlices];
  Units<Stream> units;
  wait(block.phi_full(), 0);
#pragma unroll
  for (int box = 0; box < kBoxes; ++box) {
    const int channel = box * kBoxChannels + warp * kUnitChannels + lane % 4 * kWordChannels;
    const u32 at = block.base + kPhi + channel * kPhiRowBytes + 4 * g;
#pragma unroll
    for (int part = 0; part < kBoxSlices; ++part) {
      // Channels behind C are of no stream.
      phi[box][part] = {};
      if (box * kBoxChannels + warp * kUnitChannels < block.channels()) {
        phi[box][part] =
            Phi::read(at + part * Phi::kStreams * kPhiStreamBytes, kPhiRowBytes, kPhiStreamBytes);
      }
      units.add(phi[box][part]);
    }
  }
  __syncwarp();
  if (lane == 0) arrive(block.phi_empty());
  if constexpr (!Units<Stream>::kAreOne) {
    units.find();
#pragma unroll
    for (auto& of_box : phi) {
#pragma unroll
      for (Phi& part : of_box) units.cut(part);
    }
  }

  // Within a stage: lane l points at the 16 bytes of token l % 8 of stream l / 8, and has a word of u.
  const u32 matrices = lane / 8 * kPlane + swizzled(lane % 8, warp);
  const u32 y_rows = kY + swizzled(lane % 8, warp);
  const u32 u_word = kY + swizzled(g, warp) + lane % 4 * 4;
  const int num = block.num_tiles();
  Ring<kStages> ring;
  Ring<kSlots> slots;
#pragma unroll 1
  for (int i = 0; i < num; ++i, ring.next(), slots.next()) {
    wait(block.full(ring.slot), ring.parity);
    const u32 stage = block.stage(ring.slot);
    const Coefficients of(block.coefficients(ring.slot) + g * kCoefficientStride);
    Sums<Stream> sums;
    Squares<Stream> squares;
    // The next box is on its way to registers while this one is mixed.
    u32 next[N], next_y;
    const auto read = [&](int box) {
      read_matrices(next, stage + matrices + box * kBox);
      read_matrix(next_y, stage + y_rows + box * kBox);
    };
    read(0);
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) {
      u32 x[N];
#pragma unroll
      for (int j = 0; j < N; ++j) x[j] = next[j];
      const u32 y = next_y;
      if (box + 1 < kBoxes) read(box + 1);
      const u32 u = mix(x, y, of);
      write_matrices(stage + matrices + box * kBox, x);
      write1(stage + u_word + box * kBox, u);
#pragma unroll
      for (int part = 0; part < kBoxSlices; ++part) {
#pragma unroll
        for (uint4& fragment : phi[box][part].fragments) Phi::keep_whole(fragment);
        sums.add(phi[box][part], x, part * Phi::kStreams);
      }
      squares.add(x);
    }
    fence_for_copies();
    __syncwarp();
    if (lane == 0) arrive(block.done(ring.slot));

    const u32 slot = slots.slot, own = block.parts(slot) + warp * kPartBytes;
    wait(block.parts_empty(slot), slots.parity ^ 1);
    sums.template store<kSumsBytes>(own, lane, units);
    squares.template store<kSumsBytes>(own + kSquares, lane);
    __syncwarp();
    if (lane == 0) arrive(block.parts_full(slot));
  }
}

// ---- sum --------------------------------------------------------------------------------------------

// 16 bytes of a token's sums, of which the last have the sum of squares.
constexpr int kRowParts = kSumsBytes / 16;
constexpr int kColumnParts = kColumns / 4;
static_assert(kRowParts == kColumnParts + 1, "a part for the sum of squares");

__device__ inline void add(float4& sum, float4 v) {
  sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
}

// The second block of a cluster sends its sums to the first, which adds them to its own. `which` of the warps has every
// second tile.
__device__ inline void sum_tiles(const Block& block, int which, int lane) {
  constexpr int kItems = kTokens * kRowParts;
  const Args& args = block.args;
  const u32 ranks = cluster_size(), slices = gridDim.x / ranks, slice = blockIdx.x / ranks;
  const bool sends = cluster_rank() == 1, receives = ranks == 2 && !sends;
  const int num = block.num_tiles();
#pragma unroll 1
  for (int i = which; i < num; i += kSumWarps) {
    const u32 slot = i % kSlots, parity = i / kSlots & 1;
    wait(block.parts_full(slot), parity);
    if (receives) {
      if (lane == 0) arrive_and_expect(block.others_full(slot), kPartBytes);
      wait_for_cluster(block.others_full(slot), parity);
    } else if (sends && i >= kSlots) {
      wait_for_cluster(block.others_empty(slot), parity ^ 1);
    }
#pragma unroll
    for (int first = 0; first < kItems; first += 32) {
      const int item = first + lane, t = item / kRowParts, part = item % kRowParts;
      if (item >= kItems) break;
      const u32 at = block.parts(slot) + item * 16;
      float4 sum = {};
#pragma unroll
      for (int warp = 0; warp < kMainWarps; ++warp) add(sum, read_float4(at + warp * kPartBytes));
      const u32 others = block.others(slot) + item * 16;
      if (sends) {
        send(in_block(others, 0), sum, in_block(block.others_full(slot), 0));
        continue;
      }
      if (receives) add(sum, read_float4(others));
      const int token = block.first_token(i) + t;
      const size_t row = size_t(token) * slices + slice;
      if (token >= args.tokens) continue;
      if (part < kColumnParts) {
        args.sums[row * kColumnParts + part] = sum;
      } else {
        args.squares[row] = sum.x;
      }
    }
    __syncwarp();
    if (lane == 0) {
      arrive(block.parts_empty(slot));
      // The other block is there until it has sent the last of its sums.
      if (receives && i + kSlots < num) arrive_in_block(in_block(block.others_empty(slot), 1));
    }
  }
}

// ---- kernel -----------------------------------------------------------------------------------------

// sums: [tokens, slices, kColumns], squares: [tokens, slices]; a slice is that of a cluster of one or two blocks. The maps
// have boxes of 8 tokens and SIZE channels; gridDim.x is C / SIZE, rounded up.
KERNEL(post_given_fwd, kThreads, 1)
(const __grid_constant__ BlockMaps x, const __grid_constant__ BlockMaps y,
 const __grid_constant__ BlockMaps x_new, const __grid_constant__ BlockMaps u, const float* h_post,
 const float* h_res, const float* h_given, const float* phi, float4* sums, float* squares,
 int tokens, int hidden) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Args args{h_post, h_res, h_given, phi, sums, squares, tokens, hidden};
  const Block block{shared_address(shared), args};
  if (threadIdx.x == 0) block.init_barriers();
  // Where there is no cluster, no instruction asks for one.
  __syncthreads();
  if (cluster_size() > 1) {
    cluster_arrive();
    cluster_wait();
  }
  if (warp < kMainWarps) {
    take_registers<kMainRegisters>();
    make_tiles(block, warp, lane);
  } else {
    give_registers<kOtherRegisters>();
    if (warp == kMainWarps) {
      const Maps maps{x, y, x_new, u};
      block.lines().has_rest ? move_tiles<true>(block, maps, lane)
                             : move_tiles<false>(block, maps, lane);
    }
    const int which = warp - kMainWarps - 1;
    if (which >= 0 && which < kSumWarps) sum_tiles(block, which, lane);
  }
}
