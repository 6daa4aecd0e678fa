// The backward pass of post_pre in one pass over X, y, d_u and d_X'_in, the cotangent of X' that it adds to (n = 2 and
// 4):
//
//   X'          = H_res X + h_post y, again
//   d_h_pre[i] += <d_u, X'[i]>, from <d_u, X[j]> and <d_u, y>
//   d_z          from d_h_pre; that of the other coefficients is there already (logits_bwd.cu)
//   dm           = alpha d_z
//   d_X'[j]      = sum over i of H_res_new[i, j] d_X'_in[i] + h_pre[j] d_u + (r dm) phi^T - f X'[j]
//   d_y          = sum over i of h_post[i] d_X'[i]
//   d_h_post[i]  = <d_X'[i], y>,  d_H_res[i, j] = <d_X'[i], X[j]>
//   d_phi        = sum over tokens of vec(X')^T (r dm)
//
// The tasks of the warps, and the order in which a tile meets them:
//
//   loader           all that comes in, to a stage
//   input dots       this block's part of <d_u, X[j]> and <d_u, y>, to the block that owns the token
//   owners           the sum of these parts; r dm, h_pre and f, to all blocks
//   main warps       X'; d_X' in place of d_X'_in, d_y in place of d_u, and the sums for d_phi, which stay in
//                    registers until the end, or phi itself (`kSumsPhi`)
//   stream dots      this block's part of d_h_post and d_H_res, to the owner, who adds them some tiles later
//   finisher         d_X' and d_y to memory; what the main warps mix streams with, for the tile after the next
//
// Shared memory is the limit: its bandwidth by the main warps, its size by what is on the way. Hence fragments
// that are read once, tables without their zeros, and stages that are used in place.
//
// The products that mix four streams take four tokens at once and multiply those of the other three by zero: an
// infinity or NaN in the streams of a token, or in their cotangents, reaches the gradients of its neighbours. Two
// streams, and those in float32, are mixed without such products, and a token keeps it to itself.

#include "base/common.cuh"

using Tuned = tuning_post_pre_bwd_one_pass;

#include "one_pass/post_pre_bwd_sizes.cuh"

// Owners are warps behind those that both such kernels have.
constexpr int kFirstOwner = kFinisher + 1;
constexpr int kOwnerWarps = Tuned::owner_warps;
constexpr int kThreads = 32 * (kFirstOwner + kOwnerWarps);

// ---- shared memory ----------------------------------------------------------------------------------

// Slots for dots of d_u, of which a block owns every one or every second: an even number, at least as many as stages,
// and so many that two owners have none in common.
constexpr int kDotsSlots = kStages > 2 * kOwnerWarps ? (kStages + 1) / 2 * 2 : 2 * kOwnerWarps;

// Barriers, of 8 bytes each: what is there once a phase is over, and who arrives for that, a warp once. Copies and
// other blocks arrive with bytes, which one warp here announces.
enum Barrier : u32 {
  kInputFull = 0,                        // x, y and d_u of a stage; the loader, with bytes
  kGradientFull = kInputFull + kStages,  // d_X'_in of a slot; the loader, with bytes
  // nobody needs a tile any more, whose stage and slot are free; stream dots and the finisher
  kEmpty = kGradientFull + kGradients,
  kDotsFull = kEmpty + kStages,  // all blocks' dots of d_u, at the owner; the owner, with bytes
  kRepliesFull = kDotsFull + kDotsSlots,  // the owners' replies; the first main warp, with bytes
  kDone = kRepliesFull + kStages,  // d_X' and d_y, in the place of d_X'_in and d_u; the main warps
  kSumsFull = kDone + kStages,     // all blocks' dots of d_X', at the owner; the owner, with bytes
  kTablesFull = kSumsFull + 8,     // tables of the mixing; the finisher
  kPhiThere = kTablesFull + 2,     // phi is in registers, or in its own place; the main warps
  kNumBarriers,
};

// To the owner of a token from each of a block's warps that has some of its channels: <d_u, X[j]>, <d_u, y>, and zero
// beside those of two streams.
constexpr int kDotParts = kIsFloat32 ? 1 : kDotWarps;
constexpr u32 kDotsBytes = N == 4 ? 32 : 16;
constexpr u32 kDotsSent = N == 4 ? 5 * 4 : 4 * 4;
// To the owner again: the block's parts of d_H_res and d_h_post, in the order in which `StreamDots` sends them.
constexpr u32 kSumsBytes = N == 4 ? 96 : 32;
constexpr u32 kSumsSent = N == 4 && !kIsFloat32 ? kSumsBytes : (N * N + N) * 4;
// Of a block: what comes in for the tokens that it owns, in the worst case: dots of one token each from 15 blocks,
// and sums of 8 tokens (see `Block`).
constexpr u32 kDotsRing = kDotsSlots * 15 * kDotParts * kDotsBytes;
constexpr u32 kSumsSlots = kStages > 2 || kOwnerWarps > 1 ? 8 : 4;
constexpr u32 kSumsRing = kSumsSlots * kTileTokens * kSumsBytes;

constexpr u32 kDots = 512;
constexpr u32 kReplies = kDots + kDotsRing;
constexpr u32 kSums = kReplies + kStages * kTileTokens * kReplyStride;
constexpr u32 kTableSlots = kSums + kSumsRing;

#include "one_pass/post_pre_bwd_stages.cuh"

static_assert(kSharedBytes == Tuned::shared_bytes && kThreads == Tuned::threads, "");
static_assert(8 * kNumBarriers <= kOfMainWarps && kOfMainWarps + 8 * kMainWarps <= kDots, "");

// ---- what all warps know ----------------------------------------------------------------------------

// Arguments of the kernel beside the maps and its settings: with either in one struct the compiler orders the whole
// kernel anew.
struct Args {
  const float *h_post, *h_res, *phi, *alpha, *bias, *m, *r, *h_res_new, *d_h_pre;
  const float* d_z;  // [tokens, kColumns], of which those of h_pre are not read
  float *d_h_post, *d_h_res;
  // Where kSumsPhi: [clusters, n, padded(C), kColumns], for sum_gradients; elsewhere r dm in two bfloat16 parts,
  // [tokens, 2, kColumns], for phi_bwd.
  void* for_phi;
  float* gate_sums;  // [2 * blocks, kColumns + 3], for sum_gradients
  int tokens, deferred;
};

struct Block : Stages {
  int num_tiles;  // of this cluster
  // Blocks own up to `share` tokens of a tile one after the other, as far as there are tokens: the last owner may have
  // fewer, and blocks behind it have none. Of twice as many blocks as tokens every second one owns, in turns: that
  // changes 2^turns_shift times.
  u32 share, turns_shift;

  __device__ Block(const void* memory, int hidden, int tokens) : Stages(memory, hidden) {
    num_tiles = share_of((tokens + kTileTokens - 1) / kTileTokens);
    share = (kTileTokens + ranks - 1) / ranks;
    turns_shift = ranks == 2 * kTileTokens;
  }
  __device__ u32 turns() const { return 1 << turns_shift; }
  // The first token that the block owns, and how many.
  __device__ u32 first_owned() const { return (rank >> turns_shift) * share; }
  __device__ int num_owned() const {
    return max(0, min(int(share), int(kTileTokens) - int(first_owned())));
  }

  __device__ u32 barrier(Barrier first, u32 slot) const { return shared + 8 * (first + slot); }
  __device__ void init_barriers() const {
    for (u32 slot = 0; slot < 8; ++slot) init_barrier(barrier(kSumsFull, slot), 1);
    for (u32 slot = 0; slot < kDotsSlots; ++slot) init_barrier(barrier(kDotsFull, slot), 1);
    for (u32 slot = 0; slot < kStages; ++slot) {
      init_barrier(barrier(kInputFull, slot), 1);
      init_barrier(barrier(kEmpty, slot), kDotWarps + 1);
      init_barrier(barrier(kRepliesFull, slot), 1);
      init_barrier(barrier(kDone, slot), kMainWarps);
    }
    for (u32 slot = 0; slot < kGradients; ++slot) init_barrier(barrier(kGradientFull, slot), 1);
    for (u32 slot = 0; slot < 2; ++slot) init_barrier(barrier(kTablesFull, slot), 1);
    init_barrier(barrier(kPhiThere, 0), kMainWarps);
    publish_barriers();
  }
  // Until other blocks have their barriers.
  __device__ void wait_for_start() const { cluster_wait(); }
  // By the first main warp, that owners may send replies.
  __device__ void expect_replies(u32 stage) const {
    arrive_and_expect(barrier(kRepliesFull, stage), kTileTokens * kReplyBytes);
  }
  __device__ void wait_for_replies(u32 stage, u32 parity) const {
    wait_for_cluster(barrier(kRepliesFull, stage), parity);
  }

  // At the owner, of its token t: what comes from a warp of a block, and from a block.
  __device__ u32 dots(u32 slot, u32 t, u32 from) const {
    const u32 row = ((slot >> turns_shift) * share + t) * ranks * kDotParts + from;
    return shared + kDots + row * kDotsBytes;
  }
  __device__ u32 sums_slots() const {
    return share * cluster_size() > kTileTokens ? kSumsSlots / 2 : kSumsSlots;
  }
  __device__ u32 sums(u32 slot, u32 t, u32 from) const {
    return shared + kSums + ((slot * share + t) * ranks + from) * kSumsBytes;
  }
};

// A token of a tile at its owner, as those who send to it see it.
struct Addressee {
  u32 of, t;  // which of the owners; which of that one's tokens
  __device__ Addressee(const Block& block, u32 token)
      : of(token / block.share), t(token - of * block.share) {}
  // The rank of the owner.
  __device__ u32 rank(const Block& block, int tile) const {
    return (of << block.turns_shift) + (tile & (block.turns() - 1));
  }
};

// ---- owners -----------------------------------------------------------------------------------------

// A row of H_res.
__device__ inline void load_floats(float (&values)[4], const float* from) {
  const float4 v = __ldg(reinterpret_cast<const float4*>(from));
  values[0] = v.x, values[1] = v.y, values[2] = v.z, values[3] = v.w;
}
__device__ inline void load_floats(float (&values)[2], const float* from) {
  const float2 v = __ldg(reinterpret_cast<const float2*>(from));
  values[0] = v.x, values[1] = v.y;
}

// What lane e of a token has of the sums of `StreamDots`, to the token's results: of four streams (i, j) and (i + 1, j)
// of d_H_res, and one of d_h_post; of two streams one of either. Beside float32 streams sums are in the order of the results.
__device__ inline void store_sums(const Args& args, long long token, int e,
                                  const float (&entries)[3]) {
  if constexpr (kIsFloat32) {
    args.d_h_res[token * N * N + e] = entries[0], args.d_h_res[token * N * N + 8 + e] = entries[1];
    if (e < N) args.d_h_post[token * N + e] = entries[2];
    return;
  }
  float* const d_h_res = args.d_h_res + token * N * N + e % 4 / 2 * 2 * N + e % 2 * 2 + e / 4;
  d_h_res[0] = entries[0], d_h_res[N] = entries[1];
  if (e % 4 < 2) args.d_h_post[token * N + e % 4 * 2 + e / 4] = entries[2];
}
__device__ inline void store_sums(const Args& args, long long token, int e,
                                  const float (&entries)[1]) {
  if (e < N * N) {
    args.d_h_res[token * N * N + e] = entries[0];
  } else if (e < N * N + N) {
    args.d_h_post[token * N + e - N * N] = entries[0];
  }
}

// The tokens of a block, those of a tile at once: from the dots of d_u to r dm, and the sums of the dots of d_X'.
//
//   d_h_pre[i] += sum over j of H_res[i, j] <d_u, X[j]> + h_post[i] <d_u, y>
//   d_z         = d_h_pre sigmoid'(z),  dm = alpha d_z,  f = <dm, m> times the slope of r
struct Owner {
  static constexpr int kAtOnce = 4;

  const Block& block;
  const Args& args;
  const Settings& settings;
  const int which;
  const int lane;
  const int count;         // tokens of a tile that the block owns
  const u32 copy;          // which this lane is in
  const int t;             // which token of those at once
  float alpha, alpha_res;  // of this lane's column of the first octet, and of those of the others
  GateSums sums[kOctets];

  // What a token's lanes have, zero where there is none: of their columns m and d_z (but for those of h_pre), of their
  // stream the others.
  struct Token {
    float m[kOctets], d_z[kOctets], r, d_h_pre, h_post, h_res[N];
  };

  __device__ Owner(const Block& block, const Args& args, const Settings& settings, int which,
                   int lane)
      : block(block),
        args(args),
        settings(settings),
        which(which),
        lane(lane),
        count(block.num_owned()),
        copy(lane / 8 & ((1 << copies_shift()) - 1)),
        t(lane / 8 >> copies_shift()) {
    const int e = lane % 8;
    alpha = args.alpha[gate_of(e)];
    alpha_res = kOctets > 1 ? args.alpha[2] : 0.f;
  }

  // How many copies of a token there are, as a power of two.
  __device__ u32 copies_shift() const { return count > 2 ? 0 : count == 2 ? 1 : 2; }

  // Where some of the block's tokens stand: in which of the tiles of which it owns some, and the first of them.
  struct Own {
    int turn, first;
    // The next of this warp.
    __device__ void advance(int count) {
      first += kAtOnce;
      if (first < count) return;
      first = 0;
      turn += kOwnerWarps;
    }
    __device__ Own before(int turns) const { return {turn - turns, first}; }
  };
  __device__ int tile(Own own) const {
    return (own.turn << block.turns_shift) + (block.rank & (block.turns() - 1));
  }
  // Whether this lane has a token of the block; which one of the tile.
  __device__ bool has_token(Own own) const { return own.first + t < count; }
  __device__ u32 in_tile(Own own) const { return block.first_owned() + own.first + t; }

  __device__ Token load(Own own) const {
    Token token = {};
    const long long at = block.first_token(tile(own)) + in_tile(own);
    if (!has_token(own) || tile(own) >= block.num_tiles || at >= args.tokens) return token;
    const int e = lane % 8, i = e % N;
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
      const long long column = at * kColumns + octet * 8 + e;
      token.m[octet] = __ldg(args.m + column);
      if (octet > 0 || e >= N) token.d_z[octet] = __ldg(args.d_z + column);
    }
    token.r = __ldg(args.r + at);
    token.d_h_pre = __ldg(args.d_h_pre + at * N + i);
    token.h_post = __ldg(args.h_post + at * N + i);
    load_floats(token.h_res, args.h_res + (at * N + i) * N);
    return token;
  }

  // Dot e of the token over all that sent.
  __device__ float sum_dots(u32 slot, Own own) const {
    float sum = 0.f;
    constexpr int kWords = kDotsBytes / 4;  // lanes behind these have the same again
    Turn turn(block.dots(slot, own.first + t, copy) + lane % kWords * 4, copy, copies_shift());
    // Without branches all reads are under way at once; those behind the last block's are for nothing.
#pragma unroll
    for (u32 k = 0; k < 4 * kDotParts; ++k, turn.next(kDotsBytes)) {
      const float v = read_float(turn.at);
      sum += turn.from < block.ranks * kDotParts ? v : 0.f;
    }
    return sum_copies(sum, copies_shift());
  }

  // `ahead`: what the tokens' lanes have, and then the next ones'.
  __device__ void reply(Own own, Own next, Token& ahead) {
    const Token token = ahead;
    const int tile = this->tile(own);
    const u32 slot = tile % kDotsSlots, dots_full = block.barrier(kDotsFull, slot);
    if (own.first == 0 && lane == 0) {
      arrive_and_expect(dots_full, count * cluster_size() * kDotParts * kDotsSent);
    }
    const u32 e = lane_id() % 8;
    const bool is_pre = e < N;
    const float z = alpha * token.m[0] + load_single(args.bias + e), s = sigmoid(z);
    const float d_sigmoid = s * sigmoid(-z);
    const float slope = r_slope(settings, token.r, N * block.hidden);
    // r dm, of which that of h_pre's columns is still zero.
    float others = 0.f, scaled = 0.f;
    u32 largest = 0, words[kOctets];
#pragma unroll
    for (int octet = kOctets - 1; octet >= 0; --octet) {
      const float dm = (octet > 0 ? alpha_res : alpha) * token.d_z[octet];
      others += dm * token.m[octet];
      scaled = token.r * dm;
      largest = max(largest, magnitude(scaled));
      if (octet > 0) words[octet] = word_of_pair(scaled);
    }
#pragma unroll
    for (u32 step = 1; step < 8; step *= 2) {
      others += __shfl_xor_sync(kAllLanes, others, step);
      largest = max(largest, __shfl_xor_sync(kAllLanes, largest, step));
    }

    const bool counts = has_token(own) && copy == 0;
#pragma unroll
    for (int octet = 1; octet < kOctets; ++octet) {
      if (counts) sums[octet].add(token.d_z[octet], token.m[octet]);
    }

    // All this belongs before the wait.
    pin(d_sigmoid, slope, others, __uint_as_float(largest));
    // As early as there are registers for it.
    if constexpr (kOctets < 4) ahead = load(next);
    wait_for_cluster(dots_full, tile / kDotsSlots % 2);
    const float dot = sum_dots(slot, own);
    // d_h_pre[i] += <d_u, X'[i]>
    const u32 of_token = lane_id() & ~7;
    float d_h = token.d_h_pre + token.h_post * __shfl_sync(kAllLanes, dot, of_token + N);
#pragma unroll
    for (int j = 0; j < N; ++j)
      d_h = fmaf(token.h_res[j], __shfl_sync(kAllLanes, dot, of_token + j), d_h);
    const float d_z = is_pre ? d_h * d_sigmoid : token.d_z[0];
    // Chosen here, and added once the reply is on its way: ptxas of CUDA 12 chose it there by a register that lanes without
    // a part of the reply had not set (256 channels and 8 columns).
    float counted = counts ? d_z : 0.f;
    keep(counted);

    const float dm = is_pre ? alpha * d_z : 0.f;
    float dm_dot_m = dm * token.m[0];
    if (is_pre) scaled = token.r * dm;
    u32 largest_pre = magnitude(scaled);
    words[0] = word_of_pair(scaled);
#pragma unroll
    for (u32 step = 1; step < N; step *= 2) {
      dm_dot_m += __shfl_xor_sync(kAllLanes, dm_dot_m, step);
      largest_pre = max(largest_pre, __shfl_xor_sync(kAllLanes, largest_pre, step));
    }

    // The reply is put together where the block's own main warps read it: those of the stage's last tile are done, or
    // there were no dots of this one.
    const u32 stage = tile % kStages, at = block.reply(stage, in_tile(own));
    if (counts) {
#pragma unroll
      for (u32 octet = 0; octet < kOctets; ++octet)
        write1(at + octet * kNextOctet + place_of_word(e), words[octet]);
      if (is_pre) write1(at + kReplyGates + e * 4, word_of_other(s + settings.pre_eps));
      if (e == 0) {
        const float unit = half_unit(max(largest, largest_pre));
        const u32 factor = word_of_other(-slope * (dm_dot_m + others));
        if constexpr (N == 4) {
          write4(at + kReplyFactor, {factor, word_of_other(unit), 0, 0});
        } else {
          write2(at + kReplyFactor, {factor, word_of_other(unit)});
        }
      }
    }
    __syncwarp();
    if (has_token(own)) send_reply(own, at, block.barrier(kRepliesFull, stage));
    __syncwarp();
    sums[0].add(counted, token.m[0]);
    if constexpr (kOctets == 4) ahead = load(next);
  }

  // To all blocks, and the part of it that phi_bwd reads to memory.
  __device__ void send_reply(Own own, u32 at, u32 barrier) const {
    constexpr u32 kParts = kReplyBytes / 16, kDmParts = kReplyGates / 16;
#pragma unroll
    for (u32 first = 0; first < kParts; first += 8) {
      const u32 part = first + lane_id() % 8;
      if (part >= kParts) break;
      const float4 v = read_float4(at + part * 16);
      Turn turn(at + part * 16, copy, copies_shift());
#pragma unroll
      for (u32 k = 0; k < 4; ++k, turn.next(0)) {
        if (turn.from < block.ranks)
          send(in_block(turn.at, turn.from), v, in_block(barrier, turn.from));
      }
      if constexpr (!kSumsPhi) {
        const long long row = block.first_token(tile(own)) + in_tile(own);
        if (part < kDmParts && copy == 0 && row < args.tokens)
          static_cast<float4*>(args.for_phi)[row * kDmParts + part] = v;
      }
    }
  }

  // d_H_res and d_h_post of tokens, once all blocks have sent their parts.
  __device__ void collect(Own own) const {
    const u32 slots = block.sums_slots(), slot = own.turn & (slots - 1);
    const u32 barrier = block.barrier(kSumsFull, slot);
    if (own.first == 0 && lane_id() == 0) {
      arrive_and_expect(barrier, count * cluster_size() * kSumsSent);
    }
    wait_for_cluster(barrier, (own.turn & slots) != 0);
    // The lanes have every eighth entry of `StreamDots`.
    const int e = lane_id() % 8;
    float entries[kSumsBytes / 32] = {};
    Turn turn(block.sums(slot, own.first + t, copy) + e * 4, copy, copies_shift());
#pragma unroll
    for (u32 k = 0; k < 4; ++k, turn.next(kSumsBytes)) {
#pragma unroll
      for (u32 word = 0; word < kSumsBytes / 32; ++word) {
        const float v = read_float(turn.at + word * 32);
        entries[word] += turn.from < block.ranks ? v : 0.f;
      }
    }
#pragma unroll
    for (float& entry : entries) entry = sum_copies(entry, copies_shift());
    const long long token = block.first_token(tile(own)) + in_tile(own);
    if (has_token(own) && copy == 0 && token < args.tokens) {
      store_sums(args, token, e, entries);
    }
    __syncwarp();
  }

  // The warps have the tiles in turn of which the block owns tokens.
  __device__ void own_tokens() {
    // A tile's sums come long after its reply. Whoever has the replies of a tile may send its sums: by then this warp
    // has collected what was in their place before.
    const int later = block.sums_slots() - kOwnerWarps;
    Own next{which, 0};
    Token ahead = load(next);
#pragma unroll 1
    while (tile(next.before(later)) < block.num_tiles) {
      const Own own = next;
      next.advance(count);
      if (tile(own) < block.num_tiles) reply(own, next, ahead);
      if (own.turn >= later) collect(own.before(later));
    }
  }

  __device__ void run() {
    if (count > 0) own_tokens();
    // Of all tokens, to the row of this warp. Then lane c has column c.
    GateSums of_column;
#pragma unroll
    for (u32 octet = 0; octet < kOctets; ++octet) {
      sums[octet].sum_tokens();
      if (lane_id() / 8 == octet) of_column = sums[octet];
    }
    of_column.store(args.gate_sums + (blockIdx.x * kOwnerWarps + which) * (kColumns + 3), lane);
  }
};

// ---- all other warps -----------------------------------------------------------------------------------

// 1 for f32; any other name is unknown and so 0.
#define IS_FLOAT32_f32 1
#define IS_FLOAT32 CONCAT(IS_FLOAT32_, STREAM)
#if IS_FLOAT32
#include "one_pass/post_pre_bwd_main_f32.cuh"
#include "one_pass/post_pre_bwd_others_f32.cuh"
#else
#include "one_pass/post_pre_bwd_tiles.cuh"

// Dots of d_u, to the owner.
__device__ inline void send_input_dots(const Block& block, int half, int lane) {
  const u32 g = lane / 4;
  const Addressee owner(block, g);
  input_dots<false>(
      block, half, lane,
      [&](int tile, Ring<kStages> ring, const float (&x01)[4], float (&x23)[4],
          const float (&y)[4]) {
        const u32 slot = ring.slot;
        // The owner has read what was here before once its reply is there.
        if (tile >= kStages) wait_for_cluster(block.barrier(kRepliesFull, slot), ring.parity ^ 1);
        if (lane % 4 == g / 2) {
          const bool b = g % 2;
          const u32 rank = owner.rank(block, tile), dots_slot = tile % kDotsSlots;
          const u32 to =
              in_block(block.dots(dots_slot, owner.t, block.rank * kDotWarps + half), rank);
          const u32 barrier = in_block(block.barrier(kDotsFull, dots_slot), rank);
          if constexpr (N == 2) x23[0] = y[0], x23[1] = y[1];
          send(to,
               {b ? x01[1] : x01[0], b ? x01[3] : x01[2], b ? x23[1] : x23[0], b ? x23[3] : x23[2]},
               barrier);
          if constexpr (N > 2) send(to + 16, b ? y[1] : y[0], barrier);
        }
      });
}

// Dots of d_X', to the owner, who adds them up some tiles later.
__device__ inline void send_stream_dots(const Block& block, int half, int lane) {
  const Addressee owner(block, 4 * half + lane / 4 % 4);
  stream_dots(block, half, lane, [&](int tile, u32 g, u32 q, const StreamDots<N>::Sums& sums) {
    const u32 rank = owner.rank(block, tile);
    const u32 sums_slot = (tile >> block.turns_shift) & (block.sums_slots() - 1);
    const u32 to = in_block(block.sums(sums_slot, owner.t, block.rank), rank);
    const u32 barrier = in_block(block.barrier(kSumsFull, sums_slot), rank);
    using Entry = StreamDots<N>::Entry;
    StreamDots<N>::for_entries(sums, g, q,
                               [&](u32 place, Entry v) { send(to + place, v, barrier); });
  });
}
#endif

// ---- kernel -----------------------------------------------------------------------------------------

KERNEL(post_pre_bwd_one_pass, kThreads, 1)
(const __grid_constant__ BlockMaps x_even, const __grid_constant__ BlockMaps x_odd,
 const __grid_constant__ BlockMaps y, const __grid_constant__ BlockMaps d_u,
 const __grid_constant__ BlockMaps d_x_new_in_even,
 const __grid_constant__ BlockMaps d_x_new_in_odd, const __grid_constant__ BlockMaps d_x_new_even,
 const __grid_constant__ BlockMaps d_x_new_odd, const __grid_constant__ BlockMaps d_y,
 const float* h_post, const float* h_res, const float* phi, const float* alpha, const float* bias,
 const float* m, const float* r, const float* h_res_new, const float* d_h_pre, const float* d_z,
 float* d_h_post, float* d_h_res, void* for_phi, float* gate_sums, int tokens, int hidden,
 int deferred, Settings settings) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Args args{h_post,  h_res, phi,      alpha,   bias,    m,         r,      h_res_new,
                  d_h_pre, d_z,   d_h_post, d_h_res, for_phi, gate_sums, tokens, deferred};
  const Maps maps{x_even,         x_odd,        y,           d_u, d_x_new_in_even,
                  d_x_new_in_odd, d_x_new_even, d_x_new_odd, d_y};
  if (threadIdx.x == 0) Block(memory, hidden, tokens).init_barriers();
  start_cluster();

  // Each task asks for its block again, so that none keeps in registers what only others want.
  if (warp < kMainWarps) {
    take_registers<kMainRegisters>();
    const Block block(memory, hidden, tokens);
    main_warps(block, args, warp, lane);
  } else {
    give_registers<kOtherRegisters>();
    cluster_wait();
    const Block block(memory, hidden, tokens);
#if IS_FLOAT32
    if (warp < kLoader) {
      dot_warps(block, warp - kInputDots, lane);
    } else if (warp == kLoader) {
      block.lines().has_rest ? move_tiles<true>(block, args, maps, lane)
                             : move_tiles<false>(block, args, maps, lane);
    } else {
      Owner(block, args, settings, warp - kFirstOwner, lane).run();
    }
#else
    const bool has_rest = block.lines().has_rest;
    if (warp < kStreamDots) {
      send_input_dots(block, warp - kInputDots, lane);
    } else if (warp < kLoader) {
      send_stream_dots(block, warp - kStreamDots, lane);
    } else if (warp == kLoader) {
      if (lane == 0) has_rest ? load_tiles<true>(block, maps) : load_tiles<false>(block, maps);
    } else if (warp == kFinisher) {
      has_rest ? finish_tiles<true>(block, args, maps, lane)
               : finish_tiles<false>(block, args, maps, lane);
    } else {
      Owner(block, args, settings, warp - kFirstOwner, lane).run();
    }
#endif
  }
  end_cluster();
}
