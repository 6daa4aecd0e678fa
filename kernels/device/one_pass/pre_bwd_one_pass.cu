// The backward pass of pre in one pass over X, d_u and d_x_in, the cotangent of X that it adds to (n = 2 and 4):
//
//   d_h_pre[i] += <d_u, X[i]>
//   d_z         from d_h_pre; that of the other coefficients is there already (logits_bwd.cu), or from d_h_post where
//               there are no others
//   dm          = alpha d_z
//   d_x[j]      = sum over i of h_res[i, j] d_x_in[i] + h_pre[j] d_u + (r dm) phi^T - f X[j]
//   d_phi       = sum over tokens of vec(X)^T (r dm), where main warps have room for these sums (kSumsPhi); elsewhere
//                 r dm stays in memory, for d_phi of two_pass/d_phi.cuh
//
// The tasks of the warps, and the order in which a tile meets them:
//
//   loader        X and d_u to a buffer, and d_x_in to another one
//   dot warps     this block's partials of <d_u, X[i]>, to the block that owns the token; h_res as main warps want it
//   owner         the sum of these partials; r dm, h_pre and f, to all blocks
//   main warps    d_x in place of d_x_in, and the sums for d_phi, if any, which stay where they are until the end
//   loader        d_x to memory
//
// X may have more buffers than d_x_in, which is not wanted before the reply is there.
//
// Without columns of phi for H_res (kMixes) this is the unit matrix.
//
// Where the layer's input is normalised, d_u is the cotangent g of w rho u, with u = sum over i of h_pre[i] X[i] and
// w = norm_scale. In place of d_u stands then the cotangent of u (NORM):
//
//   v = w g      du = rho v - f u, f = rho^3 <v, u> / C      dw = sum over tokens of g rho u
//
// Neither u nor du is rounded or written anywhere: the dot warps have <v, X[i]> and <u, X[i]>, of which the owner makes
// <v, u> and so f; main warps add up u again.
//
// Whatever belongs to a token stays within it, so that one with no number in it does not spoil others.

#include "math/coefficients.cuh"
#include "one_pass/geometry.cuh"
#include "one_pass/owner.cuh"
#include "one_pass/phi.cuh"

// Main warps take turns at units of 16 channels of all streams. Where four units are left, two warps share one of
// them: two streams for each.
constexpr int kMainWarps = 8;
constexpr int kUnits = SIZE / 16, kTurns = kUnits / kMainWarps;
constexpr bool kShared = kUnits % kMainWarps > 0;
static_assert(kUnits % kMainWarps == 0 || (kUnits % kMainWarps * 2 == kMainWarps && N == 4));
// A fragment of phi or d_phi is what a unit has of a stream. Those of a main warp: of its turns, then what it shares.
constexpr int kFragments = N * kTurns + (kShared ? 2 : 0);

// Whether streams are mixed by H_res.
constexpr bool kMixes = kColumns > 2 * N;

using Tuned = tuning_pre_bwd_one_pass;
// Not every size has a kernel with the norm.
#ifdef HAS_pre_norm_bwd_one_pass
constexpr bool kHasNorm = true;
using NormTuned = tuning_pre_norm_bwd_one_pass;
#else
constexpr bool kHasNorm = false;
using NormTuned = Tuned;
#endif
// Buffers for X and d_u, and for d_x_in; fragments of phi that a main warp has in registers: the others are in shared
// memory.
constexpr int kStages = Tuned::stages, kDXInSlots = Tuned::d_x_in_slots, kHeld = Tuned::held;
static_assert(Tuned::tokens == kTileTokens && NormTuned::tokens == kTileTokens);
static_assert(NormTuned::stages == kStages && NormTuned::d_x_in_slots == kDXInSlots &&
              NormTuned::held == kHeld && NormTuned::sums == Tuned::sums);
// Two buffers are too few to hide how long memory takes. Then a tile goes to the L2 cache before there is room for it.
constexpr bool kPrefetch = kStages < 3;
// Whether d_phi is summed here; fragments of it whose sums a main warp has in shared memory, as 14 do not fit into its
// registers, and in registers.
constexpr bool kSumsPhi = Tuned::sums_phi;
constexpr int kSumsInShared = Tuned::sums, kSums = kSumsPhi ? kFragments - kSumsInShared : 0;
static_assert(NormTuned::sums_phi == kSumsPhi);

// Whether main warps have registers for their sums for the gradient of w.
constexpr bool kHoldsDW = NormTuned::holds_d_w;

// Registers go from warps to warps by groups of four warps. Two dot warps take longer than four, but leave more
// registers to the main warps: most of all where these have 24 columns of phi and of the sums for d_phi in float32.
constexpr bool kIsFloat32 = sizeof(Stream) == 4;
template <bool NORM>
struct Warps {
  static constexpr int kDot = NORM ? NormTuned::dot_warps : Tuned::dot_warps;
  static constexpr bool kLent = !NORM && (kMixes || !kIsFloat32);
  static constexpr bool kLentByFour = kOctets == 4 && Tuned::sums_phi;
  static constexpr int kMainRegisters = kDot == 4 ? kLentByFour ? 208 : 200 : kLent ? 224 : 216;
  static constexpr int kOtherRegisters = kDot == 4 ? kLentByFour ? 56 : 64 : kLent ? 56 : 72;
  static constexpr int kDotRegisters = kDot == 4 ? kOtherRegisters - 16 : kOtherRegisters;
  static constexpr int kLoader = kMainWarps + kDot, kOwner = kLoader + 1;
  // Owners are all that are left in a group: each takes longer for a token than the others for its part of a tile.
  static constexpr int kWarps = kMainWarps + (kDot + 2 + 3) / 4 * 4, kOwners = kWarps - kOwner;
  static constexpr int kThreads = 32 * kWarps;
  // The partials of the dot products of one token from one block: a float4 a dot warp, with zeros for streams that are
  // not there, and as much again where u is normalised.
  static constexpr u32 kPartialBytes = kDot * 16, kKinds = NORM ? 2 : 1;
};
// Room for them, and for so many at once.
constexpr u32 kPartialBytes = kIsFloat32 ? Warps<false>::kPartialBytes : 64,
              kPartialRows = Tuned::partials;
static_assert(Warps<false>::kPartialBytes <= kPartialBytes &&
              (!kHasNorm || 2 * Warps<true>::kPartialBytes <= kPartialBytes) &&
              NormTuned::partials == kPartialRows);

// ---- shared memory ----------------------------------------------------------------------------------

// A plane a stream: X and d_u; d_x_in.
constexpr u32 kPlaneBytes = Tile<kTileTokens>::kPlaneBytes;
constexpr u32 kBoxBytes = Tile<kTileTokens>::kBoxBytes;
constexpr u32 kDU = N * kPlaneBytes, kStageBytes = kDU + kPlaneBytes;
constexpr u32 kDXInBytes = N * kPlaneBytes;
constexpr u32 kBoxUnits = kBoxChannels / 16, kUnitBytes = 16 * sizeof(Stream);
// Of one fragment of phi (f16, beside float32 streams f32), and of d_phi.
constexpr u32 kFragmentBytes = kPhiFragmentBytes * (kIsFloat32 ? 2 : 1),
              kSumsBytes = 32 * 16 * kOctets;
constexpr u32 kPhiBytes = kMainWarps * (kFragments - kHeld) * kFragmentBytes;
// What main warps want to know of a tile, a row a token: r dm and what r dm lost by rounding (bf16, or r dm in float32),
// h_pre, -f and the unit of r dm (`half_unit`), rho and -f of the norm of u, all of these from the owner; h_res (beside
// bf16 its transpose). An odd number of 16 bytes keeps the rows in different banks.
constexpr u32 kHPre = 4 * kColumns, kMinusF = kHPre + 16, kUnit = kMinusF + 4, kRho = kUnit + 4;
constexpr u32 kHRes = kHPre + 32;
constexpr u32 kReplyRow = (kHRes + (kMixes ? N * N * sizeof(float) : 0)) | 16;
constexpr u32 kRepliesBytes = kTileTokens * kReplyRow;
// The most tokens whose partials may be there: those of all stages, if a block owns them all.
constexpr u32 kMaxPartials = kStages * kTileTokens;

// As many buffers for d_x_in as for X lie among these: one address is enough.
constexpr u32 kDXIn = kStages * kStageBytes;
constexpr u32 kPhi = kDXIn + kDXInSlots * kDXInBytes;
constexpr u32 kSumsAt = kPhi + kPhiBytes;
constexpr u32 kReplies = kSumsAt + kMainWarps * kSumsInShared * kSumsBytes;
constexpr u32 kPartials = kReplies + kStages * kRepliesBytes;
constexpr u32 kBarriers = kPartials + kPartialRows * kPartialBytes;
// Barriers, of 8 bytes each, of every buffer but the last: what is there once a phase is over, and who arrives for that
// (`Block::init_barriers` has the numbers). Copies and other blocks arrive with bytes, which one warp here announces.
constexpr u32 kFull = kBarriers;                      // X and d_u; the loader, with bytes
constexpr u32 kDone = kFull + 8 * kStages;            // d_x in the place of d_x_in; the main warps
constexpr u32 kReplyFull = kDone + 8 * kStages;       // the owners' replies; the loader, with bytes
constexpr u32 kTableFull = kReplyFull + 8 * kStages;  // h_res beside the replies; the dot warps
constexpr u32 kPartialsFull =
    kTableFull + 8 * kStages;  // all blocks' partials for a token; the owner, with bytes
constexpr u32 kDXInFull = kPartialsFull + 8 * kMaxPartials;  // d_x_in; the loader, with bytes
constexpr u32 kPhiRead = kDXInFull + 8 * kDXInSlots;  // phi is where it stays; the main warps
// Of phi in a main warp's fragments (`half_unit`); beside float32 streams the tiles of a main warp.
constexpr u32 kPhiUnits = kPhiRead + 8;
constexpr u32 kSharedBytes = kPhiUnits + kMainWarps * sizeof(float);
static_assert(kSharedBytes == Tuned::shared_bytes && kSharedBytes == NormTuned::shared_bytes);
static_assert(Warps<false>::kThreads == Tuned::threads &&
              Warps<true>::kThreads == NormTuned::threads);
static_assert(Warps<false>::kOwners == Tuned::owner_warps &&
              Warps<true>::kOwners == NormTuned::owner_warps);

extern __shared__ __align__(1024) unsigned char shared[];

// What all warps of a block know.
struct Block : Place<kTileTokens> {
  int num_tiles;  // of this cluster

  __device__ Block(const void* memory, int hidden, int tokens) : Place(memory, hidden) {
    // r dm is read by the tile of `Fragments`: zeros behind the last token.
    constexpr int kAtOnce = kSumsPhi ? kTileTokens : kTile;
    num_tiles = share_of((tokens + kAtOnce - 1) / kAtOnce * (kAtOnce / int(kTileTokens)));
  }

  __device__ u32 stage(u32 slot) const {
    return shared + slot * (kStages == kDXInSlots ? kStageBytes + kDXInBytes : kStageBytes);
  }
  __device__ u32 d_x_in_at(u32 slot) const {
    return kStages == kDXInSlots ? stage(slot) + kStageBytes : shared + kDXIn + slot * kDXInBytes;
  }
  __device__ u32 replies(u32 slot) const { return shared + kReplies + slot * kRepliesBytes; }
  __device__ u32 barrier(u32 which, u32 slot) const { return shared + which + 8 * slot; }
  // By one thread.
  __device__ void init_barriers(u32 dot_warps) const {
    for (int s = 0; s < kStages; ++s) {
      init_barrier(barrier(kFull, s), 1);
      init_barrier(barrier(kDone, s), kMainWarps);
      init_barrier(barrier(kReplyFull, s), 1);
      init_barrier(barrier(kTableFull, s), dot_warps);
    }
    for (int s = 0; s < int(kMaxPartials); ++s) init_barrier(barrier(kPartialsFull, s), 1);
    for (int s = 0; s < kDXInSlots; ++s) init_barrier(barrier(kDXInFull, s), 1);
    init_barrier(barrier(kPhiRead, 0), kMainWarps);
    publish_barriers();
  }
};

// The buffers for partials of the dot products. Token i of a cluster's tiles is owned by block i % ranks, whose tokens
// take its buffers in turn, of which it has enough for all stages. A buffer has the partials of the blocks, one kind
// after the other.
template <bool NORM>
struct PartialsRing {
  u32 slots, kind_bytes;

  __device__ PartialsRing(const Block& block)
      : slots((kMaxPartials + block.ranks - 1) / block.ranks),
        kind_bytes(block.ranks * Warps<NORM>::kPartialBytes) {}
  __device__ u32 slot_bytes() const { return Warps<NORM>::kKinds * kind_bytes; }
  __device__ u32 at(const Block& block, u32 slot) const {
    return block.shared + kPartials + slot * slot_bytes();
  }
};

// The arguments of a kernel.
struct Args {
  const BlockMaps &x, &d_u, &d_x_in, &d_x;  // d_x may be d_x_in
  const float *phi, *alpha, *bias, *m, *r, *h_res, *d_h_pre;
  // Of the logits z [tokens, kColumns], of which those of h_pre are not read; without H_res d_h_post [tokens, N].
  const float* d_z;
  // [clusters, n, padded(C), kColumns], for sum_gradients; or r dm, the columns of `Fragments`
  void* d_phi;
  float* gate_sums;  // [blocks * owners, kColumns + 3], for sum_gradients
  int tokens, hidden, deferred;
  const Settings& settings;
  // With a layer norm alone.
  const float *norm_scale, *rho;
  float* d_norm_scale_partials;  // [clusters, blocks of a cluster, SIZE], for sum_norm_scale
};

// The same sum in four neighbouring lanes.
__device__ inline float sum_of_four(float v) {
  v += __shfl_xor_sync(kAllLanes, v, 1);
  return v + __shfl_xor_sync(kAllLanes, v, 2);
}

// ---- loader -----------------------------------------------------------------------------------------

__device__ inline void load_tiles(const Block& block, const Args& args) {
  const u64 policy = evict_first();
  const auto lines = block.lines();
  const auto load = [&](int tile, u32 slot) {
    if (tile >= block.num_tiles) return;
    const u32 stage = block.stage(slot), full = block.barrier(kFull, slot);
    const int token = block.first_token(tile);
    arrive_and_expect(full, kStageBytes);
    lines.copy_in<N>(stage, args.x, token, full, policy);
    lines.copy_in<1>(stage + kDU, args.d_u, token, full, policy);
    arrive_and_expect(block.barrier(kReplyFull, slot), kTileTokens * kHRes);
    if (kPrefetch && tile + kStages < block.num_tiles) {
      const int later = block.first_token(tile + kStages);
      lines.prefetch<N>(args.x, later);
      lines.prefetch<1>(args.d_u, later);
    }
  };
  const auto load_d_x_in = [&](int tile, u32 slot) {
    if (tile >= block.num_tiles) return;
    const u32 full = block.barrier(kDXInFull, slot);
    arrive_and_expect(full, kDXInBytes);
    lines.copy_in<N>(block.d_x_in_at(slot), args.d_x_in, block.first_token(tile), full, policy);
    if (kPrefetch && tile + kDXInSlots < block.num_tiles) {
      lines.prefetch<N>(args.d_x_in, block.first_token(tile + kDXInSlots));
    }
  };
  load(0, 0);
  // phi comes next: everybody waits for it.
  wait(block.barrier(kPhiRead, 0), 0);
  load_d_x_in(0, 0);
#pragma unroll 1
  for (int tile = 1; tile < kStages; ++tile) {
    load(tile, tile);
    if (tile < kDXInSlots) load_d_x_in(tile, tile);
  }
  Ring<kStages> ring;
  Ring<kDXInSlots> d_x_in_slots;
#pragma unroll 1
  for (int tile = 0; tile < block.num_tiles; ++tile, ring.next(), d_x_in_slots.next()) {
    wait(block.barrier(kDone, ring.slot), ring.parity);
    load(tile + kStages, ring.slot);
    lines.copy_out<N>(args.d_x, block.first_token(tile), block.d_x_in_at(d_x_in_slots.slot));
    commit_copies();
    wait_for_reads<0>();
    load_d_x_in(tile + kDXInSlots, d_x_in_slots.slot);
  }
  finish_copies();
}

// ---- dot warps --------------------------------------------------------------------------------------

// <d_u, X[i]> of token lane / 4 in float32 streams, of the boxes of a warp; the same in four neighbouring lanes.
template <int WARPS>
__device__ inline void multiply_boxes(float (&dots)[4], u32 stage, int warp) {
  // Neighbouring rows begin in different halves, for all banks to be read at once. The halves have sums of their own,
  // which are the same in either order. The place is asked for again for each tile.
  float halves[2][N] = {};
  const u32 lane = lane_id(), row = lane / 4, at = swizzled(row, lane % 4 + row % 2 * 4);
#pragma unroll 1
  for (int box = 0; box < kBoxes / WARPS; ++box) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const u32 from = stage + (box * WARPS + warp) * kBoxBytes + (at ^ half * 64);
      float d_u[4];
      read_floats(d_u, from + kDU);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        float x[4];
        read_floats(x, from + i * kPlaneBytes);
#pragma unroll
        for (int e = 0; e < 4; ++e) halves[half][i] += d_u[e] * x[e];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) dots[i] = sum_of_four(halves[0][i] + halves[1][i]);
}

// <d_u, X[i]> is the diagonal of the product of both tiles. A dot warp has some units of every box, and h_res of some
// tokens: its transpose, or the unit matrix where d_x_in is not deferred.
template <bool NORM>
__device__ inline void multiply_tiles(const Block& block, const Args& args, bool deferred, int warp,
                                      int lane) {
  constexpr int kWarps = Warps<NORM>::kDot;
  cluster_wait();
  const u32 matrix = lane / 8, row = lane % 8;
  const u32 first_unit = warp * (kBoxUnits / kWarps);
  const u32 x_at = matrix % 2 * kPlaneBytes + swizzled(row, 2 * first_unit + matrix / 2);
  const u32 d_u_at = kDU + swizzled(row, 2 * first_unit + matrix % 2);
  // The token whose diagonal element this lane has, if any.
  const u32 token = lane / 4;
  const bool on_diagonal = kIsFloat32 ? lane % 4 == 0 : token / 2 == lane % 4;
  // Its owner and the buffer there.
  const PartialsRing<NORM> partials(block);
  u32 owner = token % block.ranks, slot = token / block.ranks;
  const u32 owner_step = kTileTokens % block.ranks, slot_step = kTileTokens / block.ranks;
  const u32 part = block.rank * Warps<NORM>::kPartialBytes + warp * 16;

  // Neighbours in row j of h_res or its transpose; there may be fewer of them than lanes.
  constexpr int kAll = N * N * int(kTileTokens),
                kOwn = kAll < 32 * kWarps ? 1 : kAll / (32 * kWarps);
  const int first = (warp * 32 + lane) * kOwn, h_token = first / (N * N), j = first / N % N,
            i = first % N;
  const bool has_h = 32 * kWarps <= kAll || first < kAll;
  float h[kOwn];
  const auto load_h = [&](int tile) {
    if (!kMixes) return;
    const long long of = block.first_token(tile) + h_token;
    const bool mixes = deferred && has_h && tile < block.num_tiles && of < args.tokens;
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      const int row = kIsFloat32 ? j : i + k, column = kIsFloat32 ? i + k : j;
      h[k] = mixes ? args.h_res[(of * N + row) * N + column] : float(row == column);
    }
  };
  load_h(0);
  // For h_pre of this lane's token and of stream lane % N.
  const auto load_m = [&](int tile) {
    const long long of = block.first_token(tile) + int(token);
    return tile < block.num_tiles && of < args.tokens ? args.m[of * kColumns + lane % N] : 0.f;
  };
  float m = NORM ? load_m(0) : 0.f;

  // w of this lane's channels of the next unit.
  constexpr int kWarpUnits = kBoxUnits / kWarps;
  const float* w_at = args.norm_scale + block.first_channel() + first_unit * 16 + lane % 4 * 2;
  const int w_channels = block.channels() - int(first_unit) * 16;
  float2 next_w[2];
  const auto load_w = [&](int unit) {
    const int next = unit % (kUnits / kWarps), box = next / kWarpUnits;
    const int channel = box * kBoxChannels + next % kWarpUnits * 16;
    next_w[0] = channel < w_channels ? load_pair(w_at + channel) : float2{};
    next_w[1] = channel + 8 < w_channels ? load_pair(w_at + channel + 8) : float2{};
  };
  if constexpr (NORM) load_w(0);

  Ring<kStages> ring;
#pragma unroll 1
  for (int tile = 0; tile < block.num_tiles; ++tile, ring.next()) {
    wait(block.barrier(kFull, ring.slot), ring.parity);
    const u32 stage = block.stage(ring.slot);
    float dots[N / 2][4] = {};
    // <v, X[i]> and <u, X[i]> of this lane's channels.
    float v_sums[N] = {}, u_sums[N] = {};
    float h_pre[N];
    if constexpr (NORM) {
      const float own = sigmoid(args.alpha[0] * m + args.bias[lane % N]) + args.settings.pre_eps;
      m = load_m(tile + 1);
#pragma unroll
      for (int i = 0; i < N; ++i) h_pre[i] = __shfl_sync(kAllLanes, own, i, N);
    }
    float v[4] = {};
    if constexpr (kIsFloat32) multiply_boxes<kWarps>(v, stage, warp);
    // Beside float16 streams, which take longer to widen, there are no registers for all at once.
    constexpr int kBoxesAtOnce = NORM && kStreamParts<Stream> == 2 ? 2 : kBoxes;
#pragma unroll kBoxesAtOnce
    for (int box = 0; box < (kIsFloat32 ? 0 : kBoxes); ++box) {
#pragma unroll
      for (int unit = 0; unit < kBoxUnits / kWarps; ++unit) {
        // Swizzling is an exclusive or.
        const u32 from = stage + box * kBoxBytes, flip = unit * kUnitBytes;
        u32 d_u[2];
        read_matrices(d_u, from + (d_u_at ^ flip));
        if constexpr (NORM) {
          u32 x[2][4];
          read_matrices(x[0], from + (x_at ^ flip));
          read_matrices(x[1], from + (x_at ^ flip) + 2 * kPlaneBytes);
          const float2 w[2] = {next_w[0], next_w[1]};
          load_w(box * kWarpUnits + unit + 1);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float2 scale = w[half];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const auto of = [&](u32 v) {
                return e == 0 ? low_of<Stream>(v) : high_of<Stream>(v);
              };
              const float v = (e == 0 ? scale.x : scale.y) * of(d_u[half]);
              float u = 0.f;
#pragma unroll
              for (int i = 0; i < N; ++i) u += h_pre[i] * of(x[i / 2][half * 2 + i % 2]);
#pragma unroll
              for (int i = 0; i < N; ++i) {
                const float value = of(x[i / 2][half * 2 + i % 2]);
                v_sums[i] += v * value;
                u_sums[i] += u * value;
              }
            }
          }
        } else {
#pragma unroll
          for (int pair = 0; pair < N / 2; ++pair) {
            u32 x[4];
            read_matrices(x, from + (x_at ^ flip) + 2 * pair * kPlaneBytes);
            mma_of<Stream>(dots[pair], {x[0], x[1], x[2], x[3]}, {d_u[0], d_u[1]});
          }
        }
      }
    }
    // The buffers for partials and replies are free: whoever fills this stage again has seen the reply to what was in
    // it.
    const u32 there = in_block(partials.at(block, slot) + part, owner);
    const u32 full = in_block(block.barrier(kPartialsFull, slot), owner);
    if constexpr (NORM) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        v_sums[i] = sum_of_four(v_sums[i]);
        u_sums[i] = sum_of_four(u_sums[i]);
      }
      if (lane % 4 == 0) send(there, {v_sums[0], v_sums[1], v_sums[2], v_sums[3]}, full);
      if (lane % 4 == 1)
        send(there + partials.kind_bytes, {u_sums[0], u_sums[1], u_sums[2], u_sums[3]}, full);
    } else if (on_diagonal) {
      const bool odd = token % 2;
#pragma unroll
      for (int i = 0; i < (kIsFloat32 ? 0 : N); ++i) {
        const float (&pair)[4] = dots[i / 2];
        v[i] = odd ? pair[i % 2 * 2 + 1] : pair[i % 2 * 2];
      }
      send(there, {v[0], v[1], v[2], v[3]}, full);
    }
    if constexpr (kMixes) {
      const u32 at =
          block.replies(ring.slot) + h_token * kReplyRow + kHRes + (j * N + i) * sizeof(float);
#pragma unroll
      for (int k = 0; k < kOwn; ++k) {
        if (has_h) write_float(at + k * sizeof(float), h[k]);
      }
      load_h(tile + 1);
      __syncwarp();
      if (lane == 0) arrive(block.barrier(kTableFull, ring.slot));
    }
    owner += owner_step, slot += slot_step;
    if (owner >= block.ranks) owner -= block.ranks, ++slot;
    if (slot >= partials.slots) slot -= partials.slots;
  }
}

// ---- owners -----------------------------------------------------------------------------------------

// What a token's lanes have beforehand, zero where there is none: of their columns m and d_z (but for those of h_pre),
// or without H_res d_h_post; of their stream d_h_pre.
struct OwnToken {
  float m[kOctets], d_z[kOctets], d_h_pre, r, rho;
};

// The tokens of a block, those of a tile at once (owner.cuh): from the partials of a token to its reply, and the sums of
// the gates.
//
//   d_h_pre[i] += <d_u, X[i]>
//   d_z         = d_h_pre sigmoid'(z),  dm = alpha d_z,  f = <dm, m> times the slope of r
//
// The owners of a block take its tiles in turn, which are those that it owns tokens of. In larger clusters than a tile
// has tokens it has one of as many tokens as blocks.
template <bool NORM>
struct Owner {
  static constexpr int kDot = Warps<NORM>::kDot;
  // Of a reply.
  static constexpr u32 kParts = kHRes / 16;
  // Whether what is known of the next tokens comes behind the reply: there are too few registers for it before.
  static constexpr bool kLoadsLate = kOctets == 4 || Warps<NORM>::kOtherRegisters < 72;

  // Where the tokens of some of a block's turns lie: in a row of `tokens_of_turn` tokens of the cluster, `first` of them
  // before the block's first one, whose partials have a buffer that was used `uses` times.
  struct Turns {
    u32 begin, first, slot, uses;
  };

  const Block& block;
  const Args& args;
  const int lane;
  const PartialsRing<NORM> partials;
  const u32 owners;        // that take turns
  float alpha, alpha_res;  // of this lane's column of the first octet, and of those of the others
  GateSums sums[kOctets];

  // With fewer buffers than owners one of them could be two uses of a buffer ahead of another.
  static_assert(Warps<NORM>::kOwners <= kStages);
  __device__ Owner(const Block& block, const Args& args, int lane)
      : block(block),
        args(args),
        lane(lane),
        partials(block),
        owners(min(Warps<NORM>::kOwners, partials.slots)) {
    alpha = args.alpha[gate_of(lane % 8)];
    alpha_res = kOctets > 1 ? args.alpha[2] : 0.f;
  }

  // A block never owns more tokens of a turn than a warp has at once. The order in which copies share sums depends on
  // the number of blocks alone, lest results depend on the other tokens.
  __device__ u32 tokens_of_turn() const {
    return block.ranks == 1 ? 4 : max(kTileTokens, block.ranks);
  }
  __device__ u32 copies_shift() const { return block.ranks < 4 ? 0 : block.ranks < 8 ? 1 : 2; }
  __device__ u32 copy() const { return lane_id() / 8 & ((1 << copies_shift()) - 1); }
  // Which of the tokens at once this lane has, and its place among the cluster's; whether there is one.
  __device__ u32 which() const { return lane_id() / 8 >> copies_shift(); }
  __device__ u32 token_of(const Turns& turns) const {
    return turns.begin + turns.first + which() * block.ranks;
  }
  __device__ u32 num_tokens() const { return block.num_tiles * kTileTokens; }
  __device__ bool has_token(const Turns& turns) const {
    return turns.first + which() * block.ranks < tokens_of_turn() && token_of(turns) < num_tokens();
  }

  // The first turn of an owner.
  __device__ Turns turn_of(u32 owner) const {
    const u32 begin = owner < owners ? owner * tokens_of_turn() : num_tokens();
    const u32 over = begin % block.ranks;
    const u32 first = block.rank < over ? block.rank + block.ranks - over : block.rank - over;
    return {begin, first, (begin + first) / block.ranks, 0};
  }
  // That owner's next one.
  __device__ void advance(Turns& turns) const {
    const u32 step = owners * tokens_of_turn(), over = step % block.ranks;
    turns.begin += step;
    turns.slot += step / block.ranks;
    if (turns.first < over) turns.first += block.ranks, ++turns.slot;
    turns.first -= over;
    if (turns.slot >= partials.slots) turns.slot -= partials.slots, ++turns.uses;
  }

  __device__ OwnToken load(const Turns& turns) const {
    OwnToken token = {};
    const u32 i = token_of(turns);
    const long long at = block.first_token(i / kTileTokens) + i % kTileTokens;
    if (!has_token(turns) || at >= args.tokens) return token;
    const int e = lane_id() % 8;
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
      const long long column = at * kColumns + octet * 8 + e;
      token.m[octet] = __ldg(args.m + column);
      if (octet > 0 || e >= N)
        token.d_z[octet] = __ldg(args.d_z + (kMixes ? column : at * N + e - N));
    }
    token.d_h_pre = __ldg(args.d_h_pre + at * N + e % N);
    token.r = __ldg(args.r + at);
    if (NORM) token.rho = __ldg(args.rho + at);
    return token;
  }

  // The sum over all that sent of the kind's numbers of a token at `from`, of stream e % N.
  __device__ float sum_partials(u32 from, bool exists) const {
    const u32 lanes = 8 << copies_shift(), num_partials = block.ranks * kDot;
    float4 v = {};
    // As many as a lane may have.
#pragma unroll
    for (u32 k = 0; k < kDot / 2; ++k) {
      const u32 p = lane_id() % lanes + k * lanes;
      if (!exists || p >= num_partials) continue;
      const float4 part = read_float4(from + p * 16);
      v = {v.x + part.x, v.y + part.y, v.z + part.z, v.w + part.w};
    }
    // Of eight lanes two get one of the four numbers.
    const bool upper = lane & 4, odd = lane & 2;
    float a = upper ? v.z : v.x, b = upper ? v.w : v.y;
    a += __shfl_xor_sync(kAllLanes, upper ? v.x : v.z, 4);
    b += __shfl_xor_sync(kAllLanes, upper ? v.y : v.w, 4);
    float sum = (odd ? b : a) + __shfl_xor_sync(kAllLanes, odd ? a : b, 2);
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum = sum_copies(sum, copies_shift());
    return of_stream(sum, 2);
  }
  // What the lane e % N of a token has, or that of e % N times `step`.
  __device__ float of_stream(float v, int step = 1) const {
    return __shfl_sync(kAllLanes, v, (lane & ~7) + lane % N * step);
  }

  // What a reply has in the place of a column of r dm: in float32 itself; else the even one of two neighbouring lanes
  // has the high parts of both, the odd one the low parts. Parts for d_phi of another kernel go to memory.
  __device__ u32 word_of_column(float rdm, int column, long long token, bool counts) const {
    if constexpr (kIsFloat32) return __float_as_uint(rdm);
    u32 parts[2];
    split(rdm, 0.f, parts);
    if constexpr (!kSumsPhi) {
      const Fragments r_dm{nullptr, static_cast<u32*>(args.d_phi), kColumns};
      if (counts) r_dm.set_column(token, column, parts);
    }
    const u32 both = __byte_perm(parts[0], parts[1], 0x5410);
    const u32 other = __shfl_xor_sync(kAllLanes, both, 1);
    return lane % 2 ? __byte_perm(other, both, 0x7632) : __byte_perm(both, other, 0x5410);
  }

  // `ahead`: what the tokens' lanes have, and then the next ones'.
  __device__ void reply(Turns& turns, OwnToken& ahead) {
    const OwnToken token = ahead;
    const int e = lane_id() % 8;
    const bool is_pre = e < N, exists = has_token(turns), counts = exists && copy() == 0;
    // One past the last where there is no token.
    const u32 i = exists ? token_of(turns) : num_tokens();
    const bool is_again = turns.slot + which() >= partials.slots;
    const u32 partials_slot = turns.slot + which() - (is_again ? partials.slots : 0);
    const u32 uses = turns.uses + is_again;
    const u32 full = block.barrier(kPartialsFull, partials_slot);
    if (counts && e == 0) {
      // Another owner may still wait for what was in this buffer before.
      if (Warps<NORM>::kOwners > 1 && uses > 0) wait_for_cluster(full, (uses & 1) ^ 1);
      arrive_and_expect(full, partials.slot_bytes());
    }
    __syncwarp();
    advance(turns);
    if constexpr (!kLoadsLate) ahead = load(turns);

    const float z = alpha * token.m[0] + load_single(args.bias + e), h = sigmoid(z);
    const float d_sigmoid = h * sigmoid(-z);
    const float h_pre = of_stream(h + args.settings.pre_eps);
    const float slope = r_slope(args.settings, token.r, N * args.hidden);
    // r dm, of which that of h_pre's columns is still zero.
    const long long row = block.first_token(i / kTileTokens) + i % kTileTokens;
    const float d_z_post =
        kMixes ? token.d_z[0] : token.d_z[0] * args.settings.post_scale * d_sigmoid;
    float others = 0.f, rdm = 0.f;
    u32 largest = 0, words[kOctets];
#pragma unroll
    for (int octet = kOctets - 1; octet >= 0; --octet) {
      const float dm = octet > 0 ? alpha_res * token.d_z[octet] : is_pre ? 0.f : alpha * d_z_post;
      others += dm * token.m[octet];
      rdm = token.r * dm;
      largest = max(largest, magnitude(rdm));
      if (octet > 0) {
        words[octet] = word_of_column(rdm, octet * 8 + e, row, counts);
        if (counts) {
          // alpha has one gate for all of these columns.
          sums[octet].d_z += token.d_z[octet];
          sums[1].d_z_m += token.d_z[octet] * token.m[octet];
        }
      }
    }
#pragma unroll
    for (u32 step = 1; step < 8; step *= 2) {
      others += __shfl_xor_sync(kAllLanes, others, step);
      largest = max(largest, __shfl_xor_sync(kAllLanes, largest, step));
    }
    // All this belongs before the wait.
    pin(d_sigmoid, slope, others, __uint_as_float(largest));

    if (exists) wait_for_cluster(full, uses & 1);
    __syncwarp();
    const u32 from = partials.at(block, partials_slot);
    float dot = sum_partials(from, exists), f_of_u = 0.f;
    if constexpr (NORM) {
      // <v, u>, then <du, X[i]>
      float dot_of_u = h_pre * dot;
#pragma unroll
      for (u32 step = 1; step < N; step *= 2)
        dot_of_u += __shfl_xor_sync(kAllLanes, dot_of_u, step);
      const float rho = token.rho;
      f_of_u = rho * rho * rho * (dot_of_u * reciprocal(args.hidden));
      dot = rho * dot - f_of_u * sum_partials(from + partials.kind_bytes, exists);
    }
    const float d_z = is_pre ? (dot + token.d_h_pre) * d_sigmoid : d_z_post;
    // Before lanes without a part of the reply go another way: of the seam's kernel ptxas of CUDA 12 chose what counts
    // behind them, by a register that they had not set.
    float counted = counts ? d_z : 0.f;
    keep(counted);
    sums[0].add(counted, token.m[0]);
    const float dm = is_pre ? alpha * d_z : 0.f;
    float dm_dot_m = dm * token.m[0];
    if (is_pre) rdm = token.r * dm;
    u32 largest_pre = magnitude(rdm);
    words[0] = word_of_column(rdm, e, row, counts);
#pragma unroll
    for (u32 step = 1; step < N; step *= 2) {
      dm_dot_m += __shfl_xor_sync(kAllLanes, dm_dot_m, step);
      largest_pre = max(largest_pre, __shfl_xor_sync(kAllLanes, largest_pre, step));
    }

    // The reply is put together where the block's own main warps read it: those of the stage's last tile are done, or
    // there were no dots of this one. The replies' ring is that of the tiles.
    const u32 stage = i / kTileTokens % kStages;
    const u32 at = block.replies(stage) + i % kTileTokens * kReplyRow;
    if (counts) {
#pragma unroll
      for (u32 octet = 0; octet < kOctets; ++octet) {
        const u32 place =
            kIsFloat32 ? octet * 32 + e * 4 : octet * 16 + e / 2 * 4 + e % 2 * (2 * kColumns);
        write1(at + place, words[octet]);
      }
      if (e < 4) write_float(at + kHPre + e * 4, h_pre);
      if (e == 0) {
        const float f = slope * (dm_dot_m + others);
        const float unit = kIsFloat32 ? 1.f : half_unit(max(largest, largest_pre));
        write_float4(at + kMinusF, {-f, unit, token.rho, -f_of_u});
      }
    }
    __syncwarp();
    if (exists) send_reply(at, block.barrier(kReplyFull, stage));
    __syncwarp();
    if constexpr (kLoadsLate) ahead = load(turns);
  }

  // To all blocks.
  __device__ void send_reply(u32 at, u32 full) const {
#pragma unroll
    for (u32 first = 0; first < kParts; first += 8) {
      const u32 part = first + lane_id() % 8;
      if (part >= kParts) break;
      const float4 v = read_float4(at + part * 16);
      Turn turn(at + part * 16, copy(), copies_shift());
#pragma unroll 1
      for (u32 k = 0; k < 4; ++k, turn.next(0)) {
        if (turn.from < block.ranks)
          send(in_block(turn.at, turn.from), v, in_block(full, turn.from));
      }
    }
  }

  __device__ void run(u32 owner) {
    Turns turns = turn_of(owner);
    OwnToken ahead = load(turns);
#pragma unroll 1
    while (turns.begin < num_tokens()) reply(turns, ahead);
    // Of all tokens, to the row of this warp. Then lane c has column c.
    GateSums of_column;
#pragma unroll
    for (u32 octet = 0; octet < kOctets; ++octet) {
      sums[octet].sum_tokens();
      if (lane_id() / 8 == octet) of_column = sums[octet];
    }
    const long long row = blockIdx.x * (long long)Warps<NORM>::kOwners + owner;
    of_column.store(args.gate_sums + row * (kColumns + 3), lane);
  }
};

// ---- main warps -------------------------------------------------------------------------------------

// 1 for f32; any other name is unknown and so 0.
#define IS_FLOAT32_f32 1
#if CONCAT(IS_FLOAT32_, STREAM)
#include "one_pass/pre_bwd_main_f32.cuh"
#else
#include "one_pass/pre_bwd_main.cuh"
#endif

// ---- kernel -----------------------------------------------------------------------------------------

template <bool NORM>
__device__ inline void run(const Args args) {
  using Roles = Warps<NORM>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Block block(shared, args.hidden, args.tokens);

  if (threadIdx.x == 0) block.init_barriers(Roles::kDot);
  start_cluster();

  // Each task asks for its block again, so that none keeps in registers what only others want.
  if (warp < kMainWarps) {
    take_registers<Roles::kMainRegisters>();
    const Block block(shared, args.hidden, args.tokens);
    differentiate_tiles<NORM>(block, args, warp, lane);
  } else {
    // The dot warps may be a group of their own.
    if (Roles::kDot % 4 == 0 && warp < Roles::kLoader) {
      give_registers<Roles::kDotRegisters>();
      const Block block(shared, args.hidden, args.tokens);
      multiply_tiles<NORM>(block, args, args.deferred, warp - kMainWarps, lane_id());
    } else {
      give_registers<Roles::kOtherRegisters>();
      const Block block(shared, args.hidden, args.tokens);
      if (warp < Roles::kLoader) {
        multiply_tiles<NORM>(block, args, args.deferred, warp - kMainWarps, lane_id());
      } else {
        cluster_wait();
      }
      if (warp >= Roles::kOwner) {
        Owner<NORM>(block, args, lane).run(warp - Roles::kOwner);
      } else if (warp == Roles::kLoader && lane == 0) {
        load_tiles(block, args);
      }
    }
  }
  end_cluster();
}

KERNEL(pre_bwd_one_pass, Warps<false>::kThreads, 1)
(const __grid_constant__ BlockMaps x, const __grid_constant__ BlockMaps d_u,
 const __grid_constant__ BlockMaps d_x_in, const __grid_constant__ BlockMaps d_x, const float* phi,
 const float* alpha, const float* bias, const float* m, const float* r, const float* h_res,
 const float* d_h_pre, const float* d_z, void* d_phi, float* gate_sums, int tokens, int hidden,
 int deferred, Settings settings) {
  run<false>({x,      d_u,    d_x_in,   d_x,      phi,     alpha,   bias,
              m,      r,      h_res,    d_h_pre,  d_z,     d_phi,   gate_sums,
              tokens, hidden, deferred, settings, nullptr, nullptr, nullptr});
}

// The same where the layer's input is normalised.
#ifdef HAS_pre_norm_bwd_one_pass
KERNEL(pre_norm_bwd_one_pass, Warps<true>::kThreads, 1)
(const __grid_constant__ BlockMaps x, const __grid_constant__ BlockMaps d_u,
 const __grid_constant__ BlockMaps d_x_in, const __grid_constant__ BlockMaps d_x, const float* phi,
 const float* alpha, const float* bias, const float* m, const float* r, const float* h_res,
 const float* d_h_pre, const float* d_z, void* d_phi, float* gate_sums, int tokens, int hidden,
 int deferred, Settings settings, const float* norm_scale, const float* rho,
 float* d_norm_scale_partials) {
  run<true>({x,      d_u,    d_x_in,   d_x,      phi,        alpha, bias,
             m,      r,      h_res,    d_h_pre,  d_z,        d_phi, gate_sums,
             tokens, hidden, deferred, settings, norm_scale, rho,   d_norm_scale_partials});
}
#endif
