// The forward passes that read the streams once (see one_pass.cuh), of up to SIZE channels for each
// block of the cluster:
//
//   pre_fwd_one_pass   pre: all coefficients and u                                  [14 to 19]
//   post_pre_fwd_one_pass  post of one sublayer and pre of the next: X' besides
//
// and pre_norm_fwd_one_pass, post_pre_norm_fwd_one_pass, which write w rho u, after the RMSNorm, in place of u. With
// G[i, j] = <X[i], X[j]> the sum of u^2 is h_pre^T G h_pre: G takes the same way as the sums of the projection,
// so that rho is there as soon as h_pre. (Where the streams nearly cancel each other in u, that loses digits.)
//
// A block's warps, by what they do with each tile of tokens:
//
//   loader        X (and y, h_post, h_res) from memory
//   project (8)   the slice of vec(X) phi and of the sum of squares, and of G, with phi in registers all the
//                 time; in post_pre X' before that, in place of X. Warp w has the 16 bytes w of every 128, in
//                 all streams, so that X' goes from its registers to the tensor cores
//   send          the sum of the 8 warps' partial sums, to the block that owns the token
//   owner         the sums over the cluster, in the order of its blocks, r and rho of the tokens that this block
//                 owns; h_pre, or rho h_pre, to every block
//   apply (4)     u from h_pre, once that is there; in post_pre X' on its way out
//   finish        all coefficients of owned tokens, many at a time, for H_res takes long. Nobody waits for it
//
// A token's sums are cut by C alone: they do not depend on the other tokens or on how many there are.

#include "math/coefficients.cuh"
#include "math/permutations.cuh"
#include "math/sinkhorn.cuh"
#include "one_pass/products.cuh"
#include "one_pass/products_f32.cuh"

constexpr int kProjectWarps = 8;
constexpr int kApplyWarps = 4;
constexpr int kApplyThreads = 32 * kApplyWarps;
constexpr int kThreads = 32 * (kProjectWarps + kApplyWarps + 4);
constexpr int kMaxCluster = 16;

// Tokens of a tile that each block owns: the same number, but for the last owner, which may have less, and the blocks
// behind it, which have none.
__device__ constexpr int owned_of(int tokens, int ranks) { return (tokens + ranks - 1) / ranks; }
// The same for all numbers of blocks, less one, four bits each: a division would take longer, and more registers.
__device__ constexpr u64 owned_less_one(int tokens) {
  u64 all = 0;
  for (int ranks = kMaxCluster; ranks > 0; --ranks) all = all << 4 | (owned_of(tokens, ranks) - 1);
  return all;
}
// Rows of sums that an owner gets for a tile, one for each of its tokens from each block, at most.
__device__ constexpr int most_own_rows(int tokens) {
  int most = 0;
  for (int ranks = 1; ranks <= kMaxCluster; ++ranks) {
    const int rows = ranks * owned_of(tokens, ranks);
    most = rows > most ? rows : most;
  }
  return most;
}

// 16 bytes, what a lane of `apply` takes at once.
constexpr int kUnits = SIZE / kUnitChannels;
// Pairs of streams, by which phi comes.
constexpr int kPairs = N / 2;
// Of phi for a warp: a box has so many, which share its streams.
constexpr int kBoxSlices = N / Slice<Stream>::kStreams;
constexpr int kSlices = kBoxSlices * kBoxes;

// ---- sizes ------------------------------------------------------------------------------------------

template <bool POST_PRE, bool NORM>
using Tuning = typename Choose<
    POST_PRE,
    typename Choose<NORM, tuning_post_pre_norm_fwd_one_pass, tuning_post_pre_fwd_one_pass>::Type,
    typename Choose<NORM, tuning_pre_norm_fwd_one_pass, tuning_pre_fwd_one_pass>::Type>::Type;

// Columns of H_res: its entries, the permutations', or none where it is I.
constexpr int kResColumns = kColumns - 2 * N;
constexpr bool kHasMatrix = kResColumns == N * N;
constexpr bool kIsPermuted = kResColumns == kFactorial<N>;
static_assert(kHasMatrix || kResColumns == 0 || kIsPermuted, "constraints");
constexpr int kNumGates = kResColumns ? 3 : 2;
// A fragment of phi of each warp.
constexpr int kFragmentBytes = 32 * kProjectWarps * 16;

// Where things lie in shared memory.
template <bool POST_PRE, bool NORM>
struct Plan {
  using Tuned = Tuning<POST_PRE, NORM>;
  static constexpr int kTokens = Tuned::tokens;
  static constexpr int kStages = Tuned::stages;
  static constexpr int kSharedFragments = Tuned::fragments;
  // A stage: X as [stream, box, token, 128 bytes], then y alike. Elsewhere its h_res and h_post.
  static constexpr int kBoxBytes = Tile<kTokens>::kBoxBytes;
  static constexpr int kStreamBytes = Tile<kTokens>::kPlaneBytes;
  static constexpr int kY = N * kStreamBytes;
  static constexpr int kStageBytes = POST_PRE ? kY + kStreamBytes : kY;
  static constexpr int kHPost = kTokens * N * N * 4;
  static constexpr int kMixingBytes = POST_PRE ? kHPost + kTokens * N * 4 : 0;

  // A row of a token: kColumns sums, the sum of squares, G, and padding to a multiple of 16 bytes. For `finish` r, rho
  // and the token are behind the columns.
  static constexpr int kSquares = 4 * kColumns;
  static constexpr int kG = kSquares + 4;
  static constexpr int kSumsBytes = (kG + (NORM ? 4 * kProducts : 0) + 15) / 16 * 16;
  static constexpr int kR = 4 * kColumns;
  static constexpr int kRho = kR + 4;
  static constexpr int kToken = kRho + 4;
  static_assert(kToken + 4 <= kSumsBytes, "a row");
  static constexpr int kPartialBytes = kProjectWarps * kTokens * kSumsBytes;
  static constexpr int kOwnBytes = most_own_rows(kTokens) * kSumsBytes;

  static constexpr int kPartials = 640;  // behind the barriers
  static constexpr int kOwn = kPartials + 2 * kPartialBytes;
  static constexpr int kHPre = kOwn + kStages * kOwnBytes;
  static constexpr int kMixing = kHPre + kStages * kTokens * N * 4;
  static constexpr int kGates = kMixing + kStages * kMixingBytes;  // alpha, then bias
  static constexpr int kBias = kGates + 16;
  static constexpr int kWeights = kBias + (4 * kColumns + 15) / 16 * 16;  // norm_scale
  static constexpr int kWeightBytes = NORM ? SIZE * 4 : 0;
  static constexpr int kFragments = kWeights + kWeightBytes;
  static constexpr int kFinish = kFragments + kSharedFragments * kFragmentBytes;

  // Lanes of a token in `finish`, and tokens that it takes at a time, in each of two batches: the fewer lanes, the more
  // tokens share Sinkhorn's chain of waits, if there are registers and room for them.
  static constexpr int kMostBytes = 232448;  // of a block
  static constexpr int kMostBatch =
      (kMostBytes - kStages * kStageBytes - kFinish) / (2 * kSumsBytes);
  static constexpr bool kHasRegisters =
      !POST_PRE && !kIsPermuted && sizeof(Stream) == 2 && Tuned::other_registers >= 72;
  static constexpr int kFewest = N == 2 || kHasRegisters ? 1 : 2;
  static constexpr int kFinishLanes = kMostBatch >= 32 / kFewest       ? kFewest
                                      : kMostBatch >= 32 / kFewest / 2 ? 2 * kFewest
                                                                       : 4 * kFewest;
  static constexpr int kBatch = 32 / kFinishLanes;
  static_assert(kBatch >= kTokens, "one tile at least");
  static_assert(kFinishLanes <= N, "columns of a matrix");

  static constexpr int kStage = (kFinish + 2 * kBatch * kSumsBytes + 1023) / 1024 * 1024;
  static constexpr int kBytes = kStage + kStages * kStageBytes;

  static constexpr int kAllStagesBytes = kStages * kStageBytes;
  // Stages of less than 100 KB are too few to hide how long memory takes.
  static constexpr bool kPrefetches = kAllStagesBytes < 100 * 1024;

  // On its way to registers phi lies where the last stages will be, rows of kColumns float32 by stream: all pieces at
  // once, or one after the other. A piece is a pair of streams, or half of its boxes where stages have no room for it.
  static constexpr int kPhiRowBytes = kColumns * 4;
  static constexpr int kPairPieces = kAllStagesBytes < 2 * SIZE * kPhiRowBytes ? 2 : 1;
  static constexpr int kPieceBoxes = kBoxes / kPairPieces;
  static constexpr int kPieceChannels = kPieceBoxes * kBoxChannels;
  static constexpr int kPhiBytes = kPieceChannels * kPhiRowBytes;  // of a stream
  static constexpr int kPieces = kPairs * kPairPieces;
  static constexpr int kPiecesAtOnce = kAllStagesBytes < kPieces * 2 * kPhiBytes ? 1 : kPieces;
  static constexpr int kPhi = kBytes - kPiecesAtOnce * 2 * kPhiBytes;
  static constexpr int kFreeStages = (kPhi - kStage) / kStageBytes;
  static_assert(kBoxes % kPairPieces == 0 && kPieces <= 4, "whole boxes, and barriers");
  static_assert(2 * kPiecesAtOnce % Slice<Stream>::kStreams == 0, "slices are read at once");
  static_assert(kPhi >= kStage, "phi lies in stages alone");
  static_assert(kBytes == Tuned::shared_bytes && kThreads == Tuned::threads, "kernels/tuning.rs");
  static_assert(kBytes <= kMostBytes, "shared memory of a block");
  static_assert(2 * Tuned::project_registers + Tuned::apply_registers + Tuned::other_registers <=
                    512,
                "registers of a block");
};

// ---- a block ------------------------------------------------------------------------------------------

// The arguments of a kernel.
struct Args {
  const BlockMaps* x_maps;
  const float *phi, *alpha, *bias;
  Stream* u;
  float *h_pre, *h_post, *h_res, *m, *r;
  int tokens, hidden;
  const Settings* settings;
  // In post_pre alone.
  const BlockMaps* y_maps;
  const float *h_post_in, *h_res_in;
  Stream* x_new;
  // With a layer norm alone.
  const float* norm_scale;
  float* rho;
  float norm_scale_eps;
};

// Barriers, of 8 bytes each, in this order at the start of shared memory: what is there once a phase is over, and who
// arrives for that (`Block::init_barriers` has the numbers). Copies and other blocks arrive with bytes, which one warp
// here announces.
enum Barrier : u32 {
  kFull = 0,       // X of a stage, and in post_pre y, h_res and h_post; the loader, with bytes
  kEmpty = 16,     // nobody needs the stage any more; the warps of apply
  kSumsFull = 32,  // all blocks' sums for the owned tokens of a stage; the owner, with bytes
  kHFull = 48,     // h_pre of a stage's tokens, or rho h_pre; the first warp of apply, with bytes
  kPartialFull = 64,   // a tile's sums of each warp; the warps of project
  kPartialEmpty = 66,  // these have been sent; send
  kFinishFull = 68,    // the sums, r and rho of a batch of tokens; the owner
  kFinishEmpty = 70,   // these have been read; finish
  kPhiFull = 72,       // a piece of phi; the loader, with bytes
  kPhiEmpty = 76,  // phi is in registers, as far as it was in shared memory; the warps of project
};

// Numbers that go to memory at once.
template <int V>
struct alignas(4 * V) Floats {
  float values[V];
};

// A token of a batch for `finish`, which `exists` unless it is behind the last one.
struct FinishedToken {
  u32 row;
  float r;
  size_t token;
  bool exists;
};

template <bool POST_PRE, bool NORM>
struct Block : Place<Plan<POST_PRE, NORM>::kTokens> {
  using P = Plan<POST_PRE, NORM>;
  using Place<P::kTokens>::shared, Place<P::kTokens>::rank, Place<P::kTokens>::ranks;
  using Place<P::kTokens>::hidden, Place<P::kTokens>::first_token;
  static_assert(P::kStages <= 16, "barriers");

  const Args& args;

  __device__ Block(const void* memory, const Args& args)
      : Place<P::kTokens>(memory, args.hidden), args(args) {}

  __device__ u32 barrier(Barrier which, u32 index = 0) const {
    return shared + 8 * (which + index);
  }
  __device__ u32 stage(u32 slot) const { return shared + P::kStage + slot * P::kStageBytes; }
  __device__ u32 mixing(u32 slot) const { return shared + P::kMixing + slot * P::kMixingBytes; }
  __device__ bool has_tile(int i) const { return first_token(i) < args.tokens; }
  // Tokens of a tile that a block owns, if it is neither the last owner nor behind it, and that this one owns.
  __device__ int owned() const {
    constexpr u64 kAll = owned_less_one(P::kTokens);
    return 1 + int(kAll >> 4 * (ranks - 1) & 15);
  }
  __device__ int owned_here() const { return min(owned(), P::kTokens - int(rank) * owned()); }

  // Asks for phi first: nothing can start without it.
  __device__ void init_barriers(int lane) const {
    if (lane == 0) {
      for (int piece = 0; piece < P::kPieces; ++piece) init_barrier(barrier(kPhiFull, piece), 1);
      publish_barriers();
      fence_for_copies();
      copy_phi(0);
      prefetch(args.x_maps->boxes);
      if constexpr (POST_PRE) prefetch(args.y_maps->boxes);
    }
    clear_phi(lane);
    if (lane < P::kStages) {
      init_barrier(barrier(kFull, lane), 1);
      init_barrier(barrier(kEmpty, lane), kApplyWarps);
      init_barrier(barrier(kSumsFull, lane), 1);
      init_barrier(barrier(kHFull, lane), 1);
    }
    if (lane < 2) {
      init_barrier(barrier(kPartialFull, lane), kProjectWarps);
      init_barrier(barrier(kPartialEmpty, lane), 1);
      init_barrier(barrier(kFinishFull, lane), 1);
      init_barrier(barrier(kFinishEmpty, lane), 1);
    }
    if (lane == 0) init_barrier(barrier(kPhiEmpty), kProjectWarps);
    publish_barriers();
  }

  __device__ void project(int warp, int lane) const;
  __device__ void apply(int thread) const;
  __device__ void copy_phi(int first_piece) const;
  __device__ void clear_phi(int lane) const;
  __device__ void copy_rest_of_phi() const;
  // Channels of a piece from its first one on: the last block may have none of a second half.
  __device__ int phi_channels(int first) const {
    if (P::kPairPieces == 1) return this->channels();
    return max(0, min(P::kPieceChannels, this->channels() - first));
  }
  __device__ u32 phi_piece(int piece) const {
    return shared + P::kPhi + piece % P::kPiecesAtOnce * 2 * P::kPhiBytes;
  }
  __device__ void load_tiles() const;
  __device__ void send_sums(int lane) const;
  __device__ void reply() const;
  __device__ void finish() const;
  __device__ void add_blocks(u32 from, u32 to, int tokens) const;
  __device__ void store_others(FinishedToken token, int lane) const;
  template <class GetToken>
  __device__ void store_h_res(GetToken get_token) const;
  __device__ void store_permuted(FinishedToken token, int lane) const;
};

// ---- loader ------------------------------------------------------------------------------------------

// By one lane.
template <bool POST_PRE, bool NORM>
__device__ inline void Block<POST_PRE, NORM>::copy_phi(int first_piece) const {
  for (int piece = first_piece; piece < first_piece + P::kPiecesAtOnce; ++piece) {
    const int pair = piece / P::kPairPieces;
    const int first_channel = piece % P::kPairPieces * P::kPieceChannels;
    const u32 full = barrier(kPhiFull, piece),
              bytes = phi_channels(first_channel) * P::kPhiRowBytes;
    arrive_and_expect(full, 2 * bytes);
    if (P::kPairPieces > 1 && bytes == 0) continue;
    for (int j = 0; j < 2; ++j) {
      const size_t row = size_t(2 * pair + j) * hidden + rank * SIZE + first_channel;
      copy_in(phi_piece(piece) + j * P::kPhiBytes, args.phi + row * kColumns, bytes, full);
    }
  }
}

// By one warp: zeros behind the last channel in a box that is not whole. Where a piece takes the place of an earlier one,
// those rows have that one's, which are multiplied by zeros.
template <bool POST_PRE, bool NORM>
__device__ inline void Block<POST_PRE, NORM>::clear_phi(int lane) const {
  const int last = this->channels() % kBoxChannels;
  if (last == 0) return;
  for (int piece = 0; piece < P::kPiecesAtOnce; ++piece) {
    const int channels = phi_channels(piece % P::kPairPieces * P::kPieceChannels);
    if (channels % kBoxChannels == 0) continue;
    for (int j = 0; j < 2; ++j) {
      const u32 first = phi_piece(piece) + j * P::kPhiBytes + channels * P::kPhiRowBytes;
      for (u32 at = 16 * lane; at < (kBoxChannels - last) * P::kPhiRowBytes; at += 16 * 32)
        write4(first + at, {});
    }
  }
  // The copy engine will write there.
  fence_for_copies();
}

// What there was no room for, then the wait for all of phi to be in registers.
template <bool POST_PRE, bool NORM>
__device__ inline void Block<POST_PRE, NORM>::copy_rest_of_phi() const {
  u32 parity = 0;
  for (int piece = P::kPiecesAtOnce; piece < P::kPieces; piece += P::kPiecesAtOnce, parity ^= 1) {
    wait(barrier(kPhiEmpty), parity);
    copy_phi(piece);
  }
  wait(barrier(kPhiEmpty), parity);
}

// By one lane. It has nothing to do with other blocks, and does not wait for them to start.
template <bool POST_PRE, bool NORM>
__device__ inline void Block<POST_PRE, NORM>::load_tiles() const {
  const u64 policy = evict_first();
  const auto lines = this->lines();
  Ring<P::kStages> ring;
  int i = 0;
#pragma unroll 1
  for (; has_tile(i); ++i, ring.next()) {
    if (i == P::kFreeStages) copy_rest_of_phi();
    if (P::kPrefetches && i >= P::kStages) {
      // The tile comes as far as the L2 cache until there is room for it.
      lines.template prefetch<N>(*args.x_maps, first_token(i));
      if constexpr (POST_PRE) lines.template prefetch<1>(*args.y_maps, first_token(i));
    }
    wait(barrier(kEmpty, ring.slot), ring.parity ^ 1);
    // X' was written there, and not by the copy engine.
    if constexpr (POST_PRE) fence_for_copies();
    const u32 full = barrier(kFull, ring.slot), to = stage(ring.slot);
    const int first = first_token(i), count = min(P::kTokens, args.tokens - first);
    // Bulk copies have 16 bytes or more: half of that is left where two streams have an odd number of tokens.
    const int copied = N % 4 == 0 ? count : count / 2 * 2;
    if constexpr (POST_PRE && N % 4 != 0) {
      for (int k = copied * N; k < count * N; ++k) {
        const float left = args.h_post_in[size_t(first) * N + k];
        write_float(mixing(ring.slot) + P::kHPost + 4 * k, left);
      }
    }
    const int coefficients = POST_PRE ? (count * N + copied) * N * 4 : 0;
    arrive_and_expect(full, P::kStageBytes + coefficients);
    lines.template copy_in<N>(to, *args.x_maps, first, full, policy);
    if constexpr (POST_PRE) {
      lines.template copy_in<1>(to + P::kY, *args.y_maps, first, full, policy);
      const u32 h_res = mixing(ring.slot);
      copy_in(h_res, args.h_res_in + size_t(first) * N * N, count * N * N * 4, full);
      if (N % 4 == 0 || copied > 0) {
        copy_in(h_res + P::kHPost, args.h_post_in + size_t(first) * N, copied * N * 4, full);
      }
    }
  }
  if (P::kPiecesAtOnce < P::kPieces && i <= P::kFreeStages) copy_rest_of_phi();
}

// ---- project ---------------------------------------------------------------------------------------

#include "one_pass/one_pass_fwd_project.cuh"

// ---- send ------------------------------------------------------------------------------------------

__device__ inline void add(float4& sum, float4 v) {
  sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
}

template <bool POST_PRE, bool NORM>
__device__ inline void Block<POST_PRE, NORM>::send_sums(int lane) const {
  // A lane has the same four sums of the same token in every tile.
  constexpr int kParts = P::kSumsBytes / 16;
  constexpr int kItems = P::kTokens * kParts, kRounds = (kItems + 31) / 32;
  const u32 owned = this->owned();
  u32 from[kRounds], to[kRounds], full[kRounds];
#pragma unroll
  for (int k = 0; k < kRounds; ++k) {
    const u32 item = min(lane + 32 * k, kItems - 1), t = item / kParts, part = item % kParts;
    const u32 owner = t / owned, row = rank * owned + t % owned;
    from[k] = shared + P::kPartials + t * P::kSumsBytes + part * 16;
    to[k] = in_block(shared + P::kOwn + row * P::kSumsBytes + part * 16, owner);
    full[k] = in_block(barrier(kSumsFull), owner);
  }
  Ring<P::kStages> ring;
#pragma unroll 1
  for (int i = 0; has_tile(i); ++i, ring.next()) {
    const u32 slot = i % 2;
    wait(barrier(kPartialFull, slot), i / 2 & 1);
    // The owners have read what this slot of theirs held before once they have replied to it.
    if (i >= P::kStages) wait_for_cluster(barrier(kHFull, ring.slot), ring.parity ^ 1);
#pragma unroll
    for (int k = 0; k < kRounds; ++k) {
      if (lane + 32 * k >= kItems) break;
      float4 sum = {};
#pragma unroll
      for (int w = 0; w < kProjectWarps; ++w) {
        const u32 at = from[k] + slot * P::kPartialBytes + w * P::kTokens * P::kSumsBytes;
        add(sum, read_float4(at));
      }
      send(to[k] + ring.slot * P::kOwnBytes, sum, full[k] + 8 * ring.slot);
    }
    __syncwarp();
    if (lane == 0) arrive(barrier(kPartialEmpty, slot));
  }
}

// ---- owner -------------------------------------------------------------------------------------------

// The sums over the blocks for some of the owned tokens, which lie in rows behind each other `from` and `to`.
template <bool POST_PRE, bool NORM>
__device__ inline void Block<POST_PRE, NORM>::add_blocks(u32 from, u32 to, int tokens) const {
  // Reads that are under way at once.
  constexpr u32 kReads = P::Tuned::other_registers < 64 ? 4 : 8;
  const u32 stride = owned() * P::kSumsBytes;
#pragma unroll 1
  for (u32 at = 8 * lane_id(); at < tokens * P::kSumsBytes; at += 8 * 32) {
    float sums[2][2] = {};
    u32 row = from + at;
#pragma unroll 1
    for (u32 first = 0; first < ranks; first += kReads) {
      uint2 parts[kReads];
#pragma unroll
      for (u32 k = 0; k < kReads; ++k, row += stride) {
        if (first + k < ranks) parts[k] = read2(row);
      }
#pragma unroll
      for (u32 k = 0; k < kReads; ++k) {
        if (first + k < ranks) {
          sums[k % 2][0] += __uint_as_float(parts[k].x);
          sums[k % 2][1] += __uint_as_float(parts[k].y);
        }
      }
    }
    write_float(to + at, sums[0][0] + sums[1][0]);
    write_float(to + at + 4, sums[0][1] + sums[1][1]);
  }
}

// N lanes have a token. All blocks wait for this warp: what they do not wait for is left to `finish`.
template <bool POST_PRE, bool NORM>
__device__ inline void Block<POST_PRE, NORM>::reply() const {
  const int owned = owned_here();
  if (owned <= 0) return;
  constexpr int kAtOnce = 32 / N;
  const float alpha = args.alpha[0], bias = args.bias[lane_id() % N];
  int at = 0;  // the row in the batch
  Ring<P::kStages> ring;
  Ring<2> batch;
#pragma unroll 1
  for (int i = 0; has_tile(i); ++i, ring.next()) {
    const u32 full = barrier(kSumsFull, ring.slot), h_full = barrier(kHFull, ring.slot);
    if (lane_id() == 0) arrive_and_expect(full, ranks * owned * P::kSumsBytes);
    wait_for_cluster(full, ring.parity);
    if (at == 0) wait(barrier(kFinishEmpty, batch.slot), batch.parity ^ 1);
#pragma unroll 1
    for (int o = 0; o < owned; o += kAtOnce) {
      const int here = min(owned - o, kAtOnce);
      const u32 rows = shared + P::kFinish + (batch.slot * P::kBatch + at + o) * P::kSumsBytes;
      add_blocks(shared + P::kOwn + ring.slot * P::kOwnBytes + o * P::kSumsBytes, rows, here);
      __syncwarp();

      // Where there are more lanes than tokens, the others repeat the last one.
      const int lane = lane_id(), t = min(lane / N, here - 1), j = lane % N;
      const u32 row = rows + t * P::kSumsBytes;
      const Settings& settings = *args.settings;
      const float r = inverse_norm(settings, read_float(row + P::kSquares), N * hidden);
      const float m = r * read_float(row + 4 * j);
      float h = sigmoid(alpha * m + bias) + settings.pre_eps;
      float rho = 1.f;
      if constexpr (NORM) {
        // h_pre^T G h_pre, of which a lane has the row j of G.
        float of_row = 0.f;
#pragma unroll
        for (int k = 0; k < N; ++k) {
          const float g = read_float(row + P::kG + 4 * entry_of_g(j, k));
          of_row += g * __shfl_sync(kAllLanes, h, k, N);
        }
        float square = h * of_row;
#pragma unroll
        for (int step = 1; step < N; step *= 2) {
          square += __shfl_xor_sync(kAllLanes, square, step);
        }
        const float mean = square * reciprocal(hidden);
        // What is left of a sum of zero may be less than that; NaN stays.
        rho = inverse_root((mean < 0.f ? 0.f : mean) + args.norm_scale_eps);
        h *= rho;
      }
      float h_pre[N];
#pragma unroll
      for (int k = 0; k < N; ++k) h_pre[k] = __shfl_sync(kAllLanes, h, k, N);
      const int token = rank * this->owned() + o + t;  // of the tile
      const u32 h_pre_at = shared + P::kHPre + (ring.slot * P::kTokens + token) * N * 4;
      // A single token goes to all blocks at once.
      const bool is_single = here == 1;
      if (is_single || lane / N == t) {
#pragma unroll 1
        for (u32 block = is_single ? lane : j; block < ranks; block += is_single ? 32 : N) {
          send_floats(in_block(h_pre_at, block), h_pre, in_block(h_full, block));
        }
      }

      // Behind the reads of what lay there.
      __syncwarp();
      if (lane == t * N) {
        write_float(row + P::kR, r);
        if (NORM) write_float(row + P::kRho, rho);
        write1(row + P::kToken, first_token(i) + token);
      }
      __syncwarp();
    }
    // A batch has whole tiles.
    at += owned;
    if (at + owned > P::kBatch || !has_tile(i + 1)) {
      if (lane_id() == 0) arrive(barrier(kFinishFull, batch.slot));
      batch.next();
      at = 0;
    }
  }
}

// ---- apply ------------------------------------------------------------------------------------------

template <bool POST_PRE, bool NORM>
__device__ inline void Block<POST_PRE, NORM>::apply(int thread) const {
  give_registers<P::Tuned::apply_registers>();
  cluster_wait();
  if constexpr (NORM) {
    // The first four channels of all units, then the second ones: without conflicts.
    const float4* from = reinterpret_cast<const float4*>(args.norm_scale + rank * SIZE);
    if (thread < this->channels() / kUnitChannels) {
#pragma unroll
      for (int part = 0; part < kUnitChannels / 4; ++part) {
        write_float4(shared + P::kWeights + 16 * (part * kUnits + thread),
                     from[kUnitChannels / 4 * thread + part]);
      }
    }
    sync_threads<kApplyThreads>(1);
  }
  constexpr int kUnroll = P::Tuned::apply_registers < 64 ? 1 : 2;
  Ring<P::kStages> ring;
#pragma unroll 1
  for (int i = 0; has_tile(i); ++i, ring.next()) {
    if (thread == 0) arrive_and_expect(barrier(kHFull, ring.slot), P::kTokens * N * 4);
    wait_for_cluster(barrier(kHFull, ring.slot), ring.parity);
    const u32 h_pre = shared + P::kHPre + ring.slot * P::kTokens * N * 4;
#pragma unroll kUnroll
    for (int k = thread; k < P::kTokens * kUnits; k += kApplyThreads) {
      const int t = k / kUnits, unit = k % kUnits;
      float h[N];
      read_floats(h, h_pre + t * N * 4);
      const u32 at = stage(ring.slot) + unit / 8 * P::kBoxBytes + swizzled(t, unit % 8);
      Pack<Stream, kUnitChannels> x[N];
      float sums[kUnitChannels] = {};
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const uint4 words = read4(at + j * P::kStreamBytes);
        x[j].words[0] = words.x, x[j].words[1] = words.y, x[j].words[2] = words.z;
        x[j].words[3] = words.w;
#pragma unroll
        for (int v = 0; v < kUnitChannels; ++v) sums[v] += h[j] * x[j][v];
      }
      const long long to = first_token(i) + t;
      const int channel = rank * SIZE + unit * kUnitChannels;
      if (to >= args.tokens || channel >= hidden) continue;
      if constexpr (POST_PRE) {
#pragma unroll
        for (int j = 0; j < N; ++j) {
          write_through(args.x_new + (to * N + j) * hidden + channel,
                        {x[j].words[0], x[j].words[1], x[j].words[2], x[j].words[3]});
        }
      }
      if constexpr (NORM) {
#pragma unroll
        for (int v = 0; v < kUnitChannels; v += 4) {
          const float4 w = read_float4(shared + P::kWeights + 16 * (v / 4 * kUnits + unit));
          sums[v] *= w.x, sums[v + 1] *= w.y, sums[v + 2] *= w.z, sums[v + 3] *= w.w;
        }
      }
      Pack<Stream, kUnitChannels> u;
      u.set(sums);
      write_through(args.u + to * hidden + channel,
                    {u.words[0], u.words[1], u.words[2], u.words[3]});
    }
    __syncwarp();
    if (thread % 32 == 0) arrive(barrier(kEmpty, ring.slot));
  }
}

// ---- finish ----------------------------------------------------------------------------------------

// What there is of a token besides H_res, by the lanes of it in turn: m four columns at a time, r and rho, h_pre and
// h_post.
template <bool POST_PRE, bool NORM>
__device__ inline void Block<POST_PRE, NORM>::store_others(FinishedToken token, int lane) const {
  float4* m = reinterpret_cast<float4*>(args.m + token.token * kColumns);
#pragma unroll
  for (int q = lane; q < kColumns / 4; q += P::kFinishLanes) {
    const float4 sums = read_float4(token.row + 16 * q);
    m[q] = {token.r * sums.x, token.r * sums.y, token.r * sums.z, token.r * sums.w};
  }
  if (lane == P::kFinishLanes - 1) {
    args.r[token.token] = token.r;
    if (NORM) args.rho[token.token] = read_float(token.row + P::kRho);
  }
  const Settings& settings = *args.settings;
#pragma unroll 1
  for (int gate = lane; gate < 2; gate += P::kFinishLanes) {
    const float alpha = read_float(shared + P::kGates + 4 * gate);
    float own[N], bias[N];
    read_floats(own, token.row + gate * N * 4);
    read_floats(bias, shared + P::kBias + gate * N * 4);
    const float scale = gate == 0 ? 1.f : settings.post_scale;
    const float offset = gate == 0 ? settings.pre_eps : settings.post_eps;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      own[k] = scale * sigmoid(alpha * (token.r * own[k]) + bias[k]) + offset;
    }
    float* h = (gate == 0 ? args.h_pre : args.h_post) + token.token * N;
    Pack<f32, N> all;
    all.set(own);
    store<true>(all, h, 0, N);
  }
}

// H_res of a token, by kFinishLanes lanes; all lanes of the warp come here. get_token: gives the token, and reads it
// again, for Sinkhorn wants the registers.
template <bool POST_PRE, bool NORM>
template <class GetToken>
__device__ inline void Block<POST_PRE, NORM>::store_h_res(GetToken get_token) const {
  const Settings& settings = *args.settings;
  const auto get_matrix = [&] {
    return Sinkhorn<N, P::kFinishLanes>{settings, N, int(lane_id() % P::kFinishLanes)};
  };
  const auto matrix = get_matrix();
  typename Sinkhorn<N, P::kFinishLanes>::Matrix z, h_res;
  const FinishedToken token = get_token();
  const float alpha = read_float(shared + P::kGates + 4 * 2);
  matrix.for_each([&](int k, int j) {
    z[k][j] = matrix.column(k) == j;
    if constexpr (kHasMatrix) {
      const int c = 2 * N + matrix.at(k, j);
      z[k][j] =
          alpha * (token.r * read_float(token.row + 4 * c)) + read_float(shared + P::kBias + 4 * c);
    }
    h_res[k][j] = z[k][j];
  });
  if (kHasMatrix && settings.constraint == Constraint::kBirkhoff) {
    matrix.forward(z, h_res, nullptr, 0);
  }
  const FinishedToken same = get_token();
  if (!same.exists) return;
  float* out = args.h_res + same.token * N * N;
  // A lane's columns lie side by side, or its rows do.
  const auto same_matrix = get_matrix();
  if (settings.row_first) {
#pragma unroll
    for (int k = 0; k < matrix.kOwn; ++k) {
      Floats<N> row;
#pragma unroll
      for (int j = 0; j < N; ++j) row.values[j] = h_res[k][j];
      *reinterpret_cast<Floats<N>*>(out + same_matrix.at(k, 0)) = row;
    }
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      Floats<matrix.kOwn> part;
#pragma unroll
      for (int k = 0; k < matrix.kOwn; ++k) part.values[k] = h_res[k][j];
      *reinterpret_cast<Floats<matrix.kOwn>*>(out + same_matrix.at(0, j)) = part;
    }
  }
}

// The same of constraint `permutations`, by kPermutedLanes lanes, with the logits in place of their sums.
template <bool POST_PRE, bool NORM>
__device__ inline void Block<POST_PRE, NORM>::store_permuted(FinishedToken token, int lane) const {
  float* z = static_cast<float*>(__cvta_shared_to_generic(token.row + 4 * 2 * N));
  const float alpha = read_float(shared + P::kGates + 4 * 2);
  const u32 bias = shared + P::kBias + 4 * 2 * N;
  Permutations<N>::for_own(
      lane, [&](int, int p, int) { z[p] = alpha * (token.r * z[p]) + read_float(bias + 4 * p); });
  Permutations<N>::forward(z, args.h_res + token.token * N * N, lane, token.exists);
}

template <bool POST_PRE, bool NORM>
__device__ inline void Block<POST_PRE, NORM>::finish() const {
  const int owned = owned_here();
  if (owned <= 0) return;
  const int total = this->share_of((args.tokens + P::kTokens - 1) / P::kTokens) * owned;
  const int of_batch = P::kBatch / owned * owned;
  // Nobody else reads these.
  if (lane_id() < kNumGates) write_float(shared + P::kGates + 4 * lane_id(), args.alpha[lane_id()]);
  if (lane_id() < kColumns) write_float(shared + P::kBias + 4 * lane_id(), args.bias[lane_id()]);
  static_assert(kColumns <= 32, "a column a lane");
  __syncwarp();
  Ring<2> ring;
#pragma unroll 1
  for (int first = 0; first < total; first += of_batch, ring.next()) {
    wait(barrier(kFinishFull, ring.slot), ring.parity);
    const u32 rows = shared + P::kFinish + ring.slot * P::kBatch * P::kSumsBytes;
    const auto token_of_row = [&](int t) {
      const u32 at = rows + t * P::kSumsBytes, token = read1(at + P::kToken);
      return FinishedToken{at, read_float(at + P::kR), token,
                           t < min(of_batch, total - first) && token < args.tokens};
    };
    const auto get_token = [&] { return token_of_row(lane_id() / P::kFinishLanes); };
    if (const FinishedToken token = get_token(); token.exists) {
      store_others(token, lane_id() % P::kFinishLanes);
    }
    if constexpr (!kIsPermuted) store_h_res(get_token);
    if constexpr (kIsPermuted) {
      __syncwarp();
#pragma unroll 1
      for (int t = lane_id() / kPermutedLanes; t < P::kBatch; t += 32 / kPermutedLanes) {
        store_permuted(token_of_row(t), lane_id() % kPermutedLanes);
      }
    }
    __syncwarp();
    if (lane_id() == 0) arrive(barrier(kFinishEmpty, ring.slot));
  }
}

// ---- kernels ------------------------------------------------------------------------------------------

template <bool POST_PRE, bool NORM>
__device__ inline void run(const Args& args) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const Block<POST_PRE, NORM> block(memory, args);
  // The same in all lanes, and by this the compiler knows it.
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / 32, 0);
  if (warp == 0) block.init_barriers(lane_id());
  // Every role begins with the wait for the other blocks.
  start_cluster();
  if (warp < kProjectWarps) {
    block.project(thread_id() / 32, lane_id());
  } else if (warp < kProjectWarps + kApplyWarps) {
    block.apply(thread_id() - 32 * kProjectWarps);
  } else {
    give_registers<Plan<POST_PRE, NORM>::Tuned::other_registers>();
    const int role = warp - kProjectWarps - kApplyWarps;
    if (role == 0 && lane_id() == 0) block.load_tiles();
    __syncwarp();
    cluster_wait();
    switch (role) {
      case 1: block.send_sums(lane_id()); break;
      case 2: block.reply(); break;
      case 3: block.finish(); break;
    }
  }
  // A block may go before the others: it has waited for all that they send to it.
}

KERNEL(pre_fwd_one_pass, kThreads, 1)
(const __grid_constant__ BlockMaps x_maps, const float* phi, const float* alpha, const float* bias,
 Stream* u, float* h_pre, float* h_post, float* h_res, float* m, float* r, int tokens, int hidden,
 const __grid_constant__ Settings settings) {
  run<false, false>(
      {&x_maps, phi, alpha, bias, u, h_pre, h_post, h_res, m, r, tokens, hidden, &settings});
}

KERNEL(pre_norm_fwd_one_pass, kThreads, 1)
(const __grid_constant__ BlockMaps x_maps, const float* phi, const float* alpha, const float* bias,
 const float* norm_scale, Stream* u, float* h_pre, float* h_post, float* h_res, float* m, float* r,
 float* rho, float norm_scale_eps, int tokens, int hidden,
 const __grid_constant__ Settings settings) {
  run<false, true>({&x_maps, phi,     alpha,   bias,       u,      h_pre,         h_post,
                    h_res,   m,       r,       tokens,     hidden, &settings,     nullptr,
                    nullptr, nullptr, nullptr, norm_scale, rho,    norm_scale_eps});
}

KERNEL(post_pre_fwd_one_pass, kThreads, 1)
(const __grid_constant__ BlockMaps x_maps, const __grid_constant__ BlockMaps y_maps,
 const float* h_post_in, const float* h_res_in, const float* phi, const float* alpha,
 const float* bias, Stream* x_new, Stream* u, float* h_pre, float* h_post, float* h_res, float* m,
 float* r, int tokens, int hidden, const __grid_constant__ Settings settings) {
  run<true, false>({&x_maps, phi, alpha, bias, u, h_pre, h_post, h_res, m, r, tokens, hidden,
                    &settings, &y_maps, h_post_in, h_res_in, x_new});
}

KERNEL(post_pre_norm_fwd_one_pass, kThreads, 1)
(const __grid_constant__ BlockMaps x_maps, const __grid_constant__ BlockMaps y_maps,
 const float* h_post_in, const float* h_res_in, const float* phi, const float* alpha,
 const float* bias, const float* norm_scale, Stream* x_new, Stream* u, float* h_pre, float* h_post,
 float* h_res, float* m, float* r, float* rho, float norm_scale_eps, int tokens, int hidden,
 const __grid_constant__ Settings settings) {
  run<true, true>({&x_maps,   phi,      alpha, bias,       u,      h_pre,         h_post,
                   h_res,     m,        r,     tokens,     hidden, &settings,     &y_maps,
                   h_post_in, h_res_in, x_new, norm_scale, rho,    norm_scale_eps});
}
