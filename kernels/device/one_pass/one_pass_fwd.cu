// The forward passes that read the streams once (see one_pass.cuh), for four bfloat16 streams whose width
// is SIZE times the cluster's:
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
//                 time; in post_pre X' before that, in place of X. Warp w has the 8 channels w of every 64, in
//                 all streams, so that X' goes from its registers to the tensor cores
//   send          the sum of the 8 warps' partial sums, to the block that owns the token
//   owner         the sum over the cluster, in the order of its blocks, r, m and rho of the tokens that this
//                 block owns; h_pre, or rho h_pre, to every block
//   apply (4)     u from h_pre, once that is there; in post_pre X' on its way out
//   finish        all coefficients of owned tokens, many at a time, for H_res takes long. Nobody waits for it
//
// A token's sums are cut by C alone: they do not depend on the other tokens or on how many there are.

#include "math/coefficients.cuh"
#include "math/sinkhorn.cuh"
#include "one_pass/geometry.cuh"
#include "one_pass/owner.cuh"

constexpr int kProjectWarps = 8;
constexpr int kApplyWarps = 4;
constexpr int kApplyThreads = 32 * kApplyWarps;
constexpr int kThreads = 32 * (kProjectWarps + kApplyWarps + 4);
constexpr int kMaxCluster = 16;
// 8 channels, what a lane of `apply` takes at once.
constexpr int kUnits = SIZE / 8;
// Of phi for a warp: the same 8 channels of two streams.
constexpr int kSlices = 2 * kBoxes;

// ---- sizes ------------------------------------------------------------------------------------------

template <bool POST_PRE, bool NORM>
using Tuning = typename Choose<
    POST_PRE,
    typename Choose<NORM, tuning_post_pre_norm_fwd_one_pass, tuning_post_pre_fwd_one_pass>::Type,
    typename Choose<NORM, tuning_pre_norm_fwd_one_pass, tuning_pre_fwd_one_pass>::Type>::Type;

// Entries of G on and above its diagonal: the diagonal, then the others row by row.
constexpr int kProducts = N * (N + 1) / 2;
// m, r and rho of a token.
constexpr int kFinishRowBytes = 28 * 4;
// Tokens that `finish` takes at a time: as many as a warp has matrices.
constexpr int kBatch = 32 / N;
// A fragment of phi of each warp.
constexpr int kFragmentBytes = 32 * kProjectWarps * 16;

// Where things lie in shared memory.
template <bool POST_PRE, bool NORM>
struct Plan {
  using Tuned = Tuning<POST_PRE, NORM>;
  static constexpr int kTokens = Tuned::tokens;
  static constexpr int kTokensLog2 = kTokens == 16 ? 4 : 3;
  static constexpr int kStages = Tuned::stages;
  static constexpr int kSharedFragments = Tuned::fragments;
  // A stage: X as [stream, box, token, 64 channels], then y alike. Elsewhere its h_res and h_post.
  static constexpr int kBoxBytes = Tile<kTokens>::kBoxBytes;
  static constexpr int kStreamBytes = Tile<kTokens>::kPlaneBytes;
  static constexpr int kY = N * kStreamBytes;
  static constexpr int kStageBytes = POST_PRE ? kY + kStreamBytes : kY;
  static constexpr int kHPost = kTokens * N * N * 4;
  static constexpr int kMixingBytes = POST_PRE ? kHPost + kTokens * N * 4 : 0;

  // kColumns sums, the sum of squares, G, and padding to a multiple of 16 bytes.
  static constexpr int kSumsBytes = (NORM ? 36 : 28) * 4;
  static constexpr int kPartialBytes = kProjectWarps * kTokens * kSumsBytes;
  static constexpr int kOwnBytes = (kTokens < kMaxCluster ? kMaxCluster : kTokens) * kSumsBytes;

  static constexpr int kPartials = 1024;  // behind the barriers
  static constexpr int kOwn = kPartials + 2 * kPartialBytes;
  static constexpr int kHPre = kOwn + kStages * kOwnBytes;
  static constexpr int kFinish = kHPre + kStages * kTokens * N * 4;
  static constexpr int kMixing = kFinish + 2 * kBatch * kFinishRowBytes;
  static constexpr int kWeights = kMixing + kStages * kMixingBytes;  // norm_scale
  static constexpr int kWeightBytes = NORM ? SIZE * 4 : 0;
  static constexpr int kFragments = kWeights + kWeightBytes;
  static constexpr int kStage =
      (kFragments + kSharedFragments * kFragmentBytes + 1023) / 1024 * 1024;
  static constexpr int kBytes = kStage + kStages * kStageBytes;

  // On its way to registers phi lies where the last stages will be: rows of kColumns float32 by stream.
  static constexpr int kPhiRowBytes = kColumns * 4;
  static constexpr int kPhiBytes = SIZE * kPhiRowBytes;
  static constexpr int kPhi = kBytes - N * kPhiBytes;
  static constexpr int kFreeStages = (kPhi - kStage) / kStageBytes;
  static_assert(kPhi >= kStage, "phi lies in stages alone");
  static_assert(kBytes == Tuned::shared_bytes && kThreads == Tuned::threads, "kernels/tuning.rs");
  static_assert(kBytes <= 232448, "shared memory of a block");
  static_assert(2 * Tuned::project_registers + Tuned::apply_registers + Tuned::other_registers <=
                    512,
                "registers of a block");
};

// ---- a block ------------------------------------------------------------------------------------------

// The arguments of a kernel.
struct Args {
  const TensorMap* x_map;
  const float *phi, *alpha, *bias;
  Stream* u;
  float *h_pre, *h_post, *h_res, *m, *r;
  int tokens;
  const Settings* settings;
  // In post_pre alone.
  const TensorMap* y_map;
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
  kFinishFull = 68,    // m, r and rho of a batch of tokens; the owner
  kFinishEmpty = 70,   // these have been read; finish
  kPhiFull = 72,       // two streams of phi; the loader, with bytes
  kPhiEmpty = 74,      // phi is in registers; the warps of project
};

template <bool POST_PRE, bool NORM>
struct Block : Place<Plan<POST_PRE, NORM>::kTokens> {
  using P = Plan<POST_PRE, NORM>;
  using Place<P::kTokens>::shared, Place<P::kTokens>::rank, Place<P::kTokens>::ranks;
  using Place<P::kTokens>::hidden, Place<P::kTokens>::first_token;
  static_assert(P::kStages <= 16, "barriers");

  const Args& args;
  int owned, owned_log2;  // tokens of a tile that a block owns, if it owns any

  __device__ Block(const void* memory, const Args& args) : Place<P::kTokens>(memory), args(args) {
    // Powers of two: a division takes as long as the exchange between two blocks.
    const int ranks_log2 = __ffs(ranks) - 1;
    this->take_tiles(ranks_log2);
    owned_log2 = max(P::kTokensLog2 - ranks_log2, 0);
    owned = 1 << owned_log2;
  }

  __device__ u32 barrier(Barrier which, u32 index = 0) const {
    return shared + 8 * (which + index);
  }
  __device__ u32 stage(u32 slot) const { return shared + P::kStage + slot * P::kStageBytes; }
  __device__ u32 mixing(u32 slot) const { return shared + P::kMixing + slot * P::kMixingBytes; }
  __device__ bool has_tile(int i) const { return first_token(i) < args.tokens; }
  __device__ bool owns() const { return int(rank) * owned < P::kTokens; }

  // Asks for phi first: nothing can start without it.
  __device__ void init_barriers(int lane) const {
    if (lane == 0) {
      for (int pair = 0; pair < 2; ++pair) init_barrier(barrier(kPhiFull, pair), 1);
      publish_barriers();
      fence_for_copies();
      copy_phi();
    }
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
  __device__ void copy_phi() const;
  __device__ void load_tiles() const;
  __device__ void send_sums(int lane) const;
  __device__ void reply(int lane) const;
  __device__ void finish(int lane) const;
  __device__ void store_others(u32 row, size_t token, int lane) const;
};

// ---- loader ------------------------------------------------------------------------------------------

// By one lane.
template <bool POST_PRE, bool NORM>
__device__ inline void Block<POST_PRE, NORM>::copy_phi() const {
  for (int pair = 0; pair < 2; ++pair) {
    const u32 full = barrier(kPhiFull, pair);
    arrive_and_expect(full, 2 * P::kPhiBytes);
    for (int j = 2 * pair; j < 2 * pair + 2; ++j) {
      const float* from = args.phi + (size_t(j) * hidden() + rank * SIZE) * kColumns;
      copy_in(shared + P::kPhi + j * P::kPhiBytes, from, P::kPhiBytes, full);
    }
  }
  prefetch(*args.x_map);
  if constexpr (POST_PRE) prefetch(*args.y_map);
}

// By one lane. It has nothing to do with other blocks, and does not wait for them to start.
template <bool POST_PRE, bool NORM>
__device__ inline void Block<POST_PRE, NORM>::load_tiles() const {
  const u64 policy = evict_first();
  Ring<P::kStages> ring;
#pragma unroll 1
  for (int i = 0; has_tile(i); ++i, ring.next()) {
    if (i == P::kFreeStages) wait(barrier(kPhiEmpty), 0);
    wait(barrier(kEmpty, ring.slot), ring.parity ^ 1);
    // X' was written there, and not by the copy engine.
    if constexpr (POST_PRE) fence_for_copies();
    const u32 full = barrier(kFull, ring.slot), to = stage(ring.slot);
    const int first = first_token(i), count = min(P::kTokens, args.tokens - first);
    const int coefficients = POST_PRE ? count * (N * N + N) * 4 : 0;
    arrive_and_expect(full, P::kStageBytes + coefficients);
    copy_in(to, *args.x_map, first, rank * kBoxes, 0, full, policy);
    if constexpr (POST_PRE) {
      copy_in(to + P::kY, *args.y_map, first, rank * kBoxes, 0, full, policy);
      const u32 h_res = mixing(ring.slot);
      copy_in(h_res, args.h_res_in + size_t(first) * N * N, count * N * N * 4, full);
      copy_in(h_res + P::kHPost, args.h_post_in + size_t(first) * N, count * N * 4, full);
    }
  }
}

// ---- project ---------------------------------------------------------------------------------------

#include "one_pass/one_pass_fwd_project.cuh"

// ---- send ------------------------------------------------------------------------------------------

template <bool POST_PRE, bool NORM>
__device__ inline void Block<POST_PRE, NORM>::send_sums(int lane) const {
  // A lane has the same four sums of the same token in every tile.
  constexpr int kParts = P::kSumsBytes / 16;
  constexpr int kItems = P::kTokens * kParts, kRounds = (kItems + 31) / 32;
  u32 from[kRounds], to[kRounds], full[kRounds];
#pragma unroll
  for (int k = 0; k < kRounds; ++k) {
    const int item = lane + 32 * k, t = item / kParts, part = item % kParts;
    const u32 owner = t >> owned_log2, row = rank * owned + (t & (owned - 1));
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
        const float4 v = read_float4(at);
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
      }
      send(to[k] + ring.slot * P::kOwnBytes, sum, full[k] + 8 * ring.slot);
    }
    __syncwarp();
    if (lane == 0) arrive(barrier(kPartialEmpty, slot));
  }
}

// ---- owner -------------------------------------------------------------------------------------------

// Lane c has column c, and lane kColumns the sum of squares; lane k the entry k of G, too. All blocks wait for
// this warp: what they do not wait for is left to `finish`.
template <bool POST_PRE, bool NORM>
__device__ inline void Block<POST_PRE, NORM>::reply(int lane) const {
  if (!owns()) return;
  const Settings& settings = *args.settings;
  const int c = min(lane, kColumns);
  // The other lanes send alike, and what is not h_pre reaches nobody.
  const float alpha = args.alpha[0], bias = args.bias[c % N];
  const u32 stride = owned * P::kSumsBytes;
  // Of this lane's entry of G; what is not on the diagonal is there twice.
  const int k = min(lane % 16, kProducts - 1);
  const int row_of_g = k < N ? k : k < 7 ? 0 : k < 9 ? 1 : 2;
  const int column_of_g = k < N ? k : k < 7 ? k - 3 : k < 9 ? k - 5 : 3;
  const float weight_of_g = (k < N ? 1.f : 2.f) / hidden();
  const u32 h_pre_there = in_block(shared + P::kHPre, lane % kMaxCluster);
  const u32 h_full_there = in_block(barrier(kHFull), lane % kMaxCluster);
  int count = 0;
  Ring<P::kStages> ring;
#pragma unroll 1
  for (int i = 0; has_tile(i); ++i, ring.next()) {
    if (lane == 0) arrive_and_expect(barrier(kSumsFull, ring.slot), ranks * stride);
    wait_for_cluster(barrier(kSumsFull, ring.slot), ring.parity);
#pragma unroll 1
    for (int o = 0; o < owned; ++o, ++count) {
      const u32 from = shared + P::kOwn + ring.slot * P::kOwnBytes + o * P::kSumsBytes;
      const float sum = sum_of_blocks(from + 4 * c, stride, ranks);
      float g = 0.f;
      if constexpr (NORM) {
        // That of half of the blocks.
        const u32 entry = from + 4 * (kColumns + 1 + k) + lane / 16 * (ranks / 2) * stride;
        g = sum_of_blocks(entry, stride, ranks / 2);
      }
      const float r = inverse_norm(settings, __shfl_sync(kAllLanes, sum, kColumns), N * hidden());
      const float m = r * sum, h = sigmoid(alpha * m + bias) + settings.pre_eps;
      float4 h_pre = {__shfl_sync(kAllLanes, h, 0), __shfl_sync(kAllLanes, h, 1),
                      __shfl_sync(kAllLanes, h, 2), __shfl_sync(kAllLanes, h, 3)};
      float rho = 0.f;
      if constexpr (NORM) {
        const float h_row = __shfl_sync(kAllLanes, h, row_of_g);
        const float h_column = __shfl_sync(kAllLanes, h, column_of_g);
        const float mean =
            warp_sum(lane % 16 < kProducts ? g * (weight_of_g * h_row * h_column) : 0.f);
        // What is left of a sum of zero may be less than that; NaN stays.
        rho = inverse_root((mean < 0.f ? 0.f : mean) + args.norm_scale_eps);
        h_pre = {rho * h_pre.x, rho * h_pre.y, rho * h_pre.z, rho * h_pre.w};
      }
      if (lane < int(ranks)) {
        const u32 row = ring.slot * P::kTokens + rank * owned + o;
        send(h_pre_there + row * N * 4, h_pre, h_full_there + 8 * ring.slot);
      }

      const u32 batch = count / kBatch, slot = batch % 2, t = count % kBatch;
      if (t == 0) wait(barrier(kFinishEmpty, slot), (batch / 2 & 1) ^ 1);
      const u32 row = shared + P::kFinish + (slot * kBatch + t) * kFinishRowBytes;
      if (lane <= kColumns) write_float(row + 4 * lane, lane < kColumns ? m : r);
      if (NORM && lane == 0) write_float(row + 4 * (kColumns + 1), rho);
      __syncwarp();
      const bool is_last = t == kBatch - 1 || (o == owned - 1 && !has_tile(i + 1));
      if (is_last && lane == 0) arrive(barrier(kFinishFull, slot));
    }
  }
}

// ---- apply ------------------------------------------------------------------------------------------

template <bool POST_PRE, bool NORM>
__device__ inline void Block<POST_PRE, NORM>::apply(int thread) const {
  give_registers<P::Tuned::apply_registers>();
  cluster_wait();
  if constexpr (NORM) {
    // The first halves of all units, then the second ones: without conflicts.
    const float4* from = reinterpret_cast<const float4*>(args.norm_scale + rank * SIZE);
    if (thread < kUnits) {
      write_float4(shared + P::kWeights + 16 * thread, from[2 * thread]);
      write_float4(shared + P::kWeights + 16 * (kUnits + thread), from[2 * thread + 1]);
    }
    asm volatile("bar.sync 1, %0;" ::"n"(kApplyThreads) : "memory");
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
      Pack<bf16, 8> x[N];
      float sums[8] = {};
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const uint4 words = read4(at + j * P::kStreamBytes);
        x[j].words[0] = words.x, x[j].words[1] = words.y, x[j].words[2] = words.z;
        x[j].words[3] = words.w;
#pragma unroll
        for (int v = 0; v < 8; ++v) sums[v] += h[j] * x[j][v];
      }
      const long long to = first_token(i) + t;
      if (to >= args.tokens) continue;
      const int channel = rank * SIZE + unit * 8;
      if constexpr (POST_PRE) {
#pragma unroll
        for (int j = 0; j < N; ++j) {
          write_through(args.x_new + (to * N + j) * hidden() + channel,
                        {x[j].words[0], x[j].words[1], x[j].words[2], x[j].words[3]});
        }
      }
      if constexpr (NORM) {
#pragma unroll
        for (int v = 0; v < 8; v += 4) {
          const float4 w = read_float4(shared + P::kWeights + 16 * (v / 4 * kUnits + unit));
          sums[v] *= w.x, sums[v + 1] *= w.y, sums[v + 2] *= w.z, sums[v + 3] *= w.w;
        }
      }
      Pack<bf16, 8> u;
      u.set(sums);
      write_through(args.u + to * hidden() + channel,
                    {u.words[0], u.words[1], u.words[2], u.words[3]});
    }
    __syncwarp();
    if (thread % 32 == 0) arrive(barrier(kEmpty, ring.slot));
  }
}

// ---- finish ----------------------------------------------------------------------------------------

// What there is of a token besides H_res, by four lanes: m four columns at a time, and r. The first has h_pre
// among its columns, the second h_post.
template <bool POST_PRE, bool NORM>
__device__ inline void Block<POST_PRE, NORM>::store_others(u32 row, size_t token, int lane) const {
  float4* m = reinterpret_cast<float4*>(args.m + token * kColumns);
  float own[N];
  read_floats(own, row + lane * N * 4);
  m[lane] = {own[0], own[1], own[2], own[3]};
  if (lane >= 2) {
    m[lane + 2] = read_float4(row + (lane + 2) * N * 4);
    if (lane == 2) args.r[token] = read_float(row + 4 * kColumns);
    if (NORM && lane == 3) args.rho[token] = read_float(row + 4 * (kColumns + 1));
    return;
  }
  const bool is_pre = lane == 0;
  const Settings& settings = *args.settings;
  const float scale = is_pre ? 1.f : settings.post_scale, offset = is_pre ? settings.pre_eps : 0.f;
  float h[N];
#pragma unroll
  for (int k = 0; k < N; ++k) {
    h[k] = scale * sigmoid(args.alpha[lane] * own[k] + args.bias[lane * N + k]) + offset;
  }
  reinterpret_cast<float4*>(is_pre ? args.h_pre : args.h_post)[token] = {h[0], h[1], h[2], h[3]};
}

// Four lanes have a token.
template <bool POST_PRE, bool NORM>
__device__ inline void Block<POST_PRE, NORM>::finish(int lane) const {
  if (!owns()) return;
  const Settings& settings = *args.settings;
  const Sinkhorn<N> matrix{settings, N, lane % N};
  const int t = lane / N;
#pragma unroll 1
  for (int batch = 0; has_tile(batch * kBatch >> owned_log2); ++batch) {
    const u32 slot = batch % 2;
    wait(barrier(kFinishFull, slot), batch / 2 & 1);
    const u32 row = shared + P::kFinish + (slot * kBatch + t) * kFinishRowBytes;
    const int count = batch * kBatch + t, i = count >> owned_log2;
    const size_t at = size_t(first_token(i)) + rank * owned + (count & (owned - 1));
    const bool exists = at < args.tokens;
    Sinkhorn<N>::Matrix z, h_res;
    matrix.for_each([&](int k, int j) {
      const int c = 2 * N + matrix.at(k, j);
      h_res[k][j] = z[k][j] = args.alpha[2] * read_float(row + 4 * c) + args.bias[c];
    });
    if (settings.constraint == Constraint::kBirkhoff) matrix.forward(z, h_res, nullptr, 0);
    if (exists) {
      matrix.for_each(
          [&](int k, int j) { args.h_res[at * N * N + matrix.at(k, j)] = h_res[k][j]; });
      store_others(row, at, matrix.lane);
    }
    __syncwarp();
    if (lane == 0) arrive(barrier(kFinishEmpty, slot));
  }
}

// ---- kernels ------------------------------------------------------------------------------------------

template <bool POST_PRE, bool NORM>
__device__ inline void run(const Args& args) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const Block<POST_PRE, NORM> block(memory, args);
  // The same in all lanes, and by this the compiler knows it.
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (warp == 0) block.init_barriers(lane);
  // Every role begins with the wait for the other blocks.
  start_cluster();
  if (warp < kProjectWarps) {
    block.project(warp, lane);
  } else if (warp < kProjectWarps + kApplyWarps) {
    block.apply(threadIdx.x - 32 * kProjectWarps);
  } else {
    give_registers<Plan<POST_PRE, NORM>::Tuned::other_registers>();
    const int role = warp - kProjectWarps - kApplyWarps;
    if (role == 0 && lane == 0) block.load_tiles();
    __syncwarp();
    cluster_wait();
    switch (role) {
      case 1: block.send_sums(lane); break;
      case 2: block.reply(lane); break;
      case 3: block.finish(lane); break;
    }
  }
  // A block may go before the others: it has waited for all that they send to it.
}

KERNEL(pre_fwd_one_pass, kThreads, 1)
(const __grid_constant__ TensorMap x_map, const float* phi, const float* alpha, const float* bias,
 Stream* u, float* h_pre, float* h_post, float* h_res, float* m, float* r, int tokens,
 const __grid_constant__ Settings settings) {
  run<false, false>({&x_map, phi, alpha, bias, u, h_pre, h_post, h_res, m, r, tokens, &settings});
}

KERNEL(pre_norm_fwd_one_pass, kThreads, 1)
(const __grid_constant__ TensorMap x_map, const float* phi, const float* alpha, const float* bias,
 const float* norm_scale, Stream* u, float* h_pre, float* h_post, float* h_res, float* m, float* r,
 float* rho, float norm_scale_eps, int tokens, const __grid_constant__ Settings settings) {
  run<false, true>({&x_map, phi, alpha, bias, u, h_pre, h_post, h_res, m, r, tokens, &settings,
                    nullptr, nullptr, nullptr, nullptr, norm_scale, rho, norm_scale_eps});
}

KERNEL(post_pre_fwd_one_pass, kThreads, 1)
(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap y_map,
 const float* h_post_in, const float* h_res_in, const float* phi, const float* alpha,
 const float* bias, Stream* x_new, Stream* u, float* h_pre, float* h_post, float* h_res, float* m,
 float* r, int tokens, const __grid_constant__ Settings settings) {
  run<true, false>({&x_map, phi, alpha, bias, u, h_pre, h_post, h_res, m, r, tokens, &settings,
                    &y_map, h_post_in, h_res_in, x_new});
}

KERNEL(post_pre_norm_fwd_one_pass, kThreads, 1)
(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap y_map,
 const float* h_post_in, const float* h_res_in, const float* phi, const float* alpha,
 const float* bias, const float* norm_scale, Stream* x_new, Stream* u, float* h_pre, float* h_post,
 float* h_res, float* m, float* r, float* rho, float norm_scale_eps, int tokens,
 const __grid_constant__ Settings settings) {
  run<true, true>({&x_map, phi, alpha, bias, u, h_pre, h_post, h_res, m, r, tokens, &settings,
                   &y_map, h_post_in, h_res_in, x_new, norm_scale, rho, norm_scale_eps});
}
