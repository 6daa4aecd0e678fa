// The backward pass of post_pre where u is the sum over the streams of X' with given weights, in one pass over X, y, d_u and
// d_X'_in, the cotangent of X' that it adds to (n = 2 and 4):
//
//   X'          = H_res X + h_post y, again
//   dm          = alpha d_z;  d_z of h_pre's columns from d_h_pre, that of the others is there already (logits_bwd.cu)
//   d_X'[j]     = sum over i of H_res_new[i, j] d_X'_in[i] + h_given[j] d_u + (r dm) phi^T - f X'[j]
//   d_y         = sum over i of h_post[i] d_X'[i]
//   d_h_post[i] = <d_X'[i], y>,  d_H_res[i, j] = <d_X'[i], X[j]>,  d_h_given[i] = <d_u, X'[i]>
//   d_phi       = sum over tokens of vec(X')^T (r dm)
//
// All cotangents of the new coefficients are there beforehand. So r dm and f wait for no sum over the channels, and a block,
// which has SIZE channels of all streams and every gridDim.y-th tile of tokens, has nothing to hear from others: there are no
// clusters, and every multiprocessor is busy. The tasks of the warps are those of post_pre_bwd_one_pass.cu, but that owners
// are replaced by warps that make the replies to their own block's main warps ahead, and that dots go to memory, from where
// `sum_given` adds up those of all blocks.

#include "base/common.cuh"

using Tuned = tuning_post_given_bwd;

#include "one_pass/post_pre_bwd_sizes.cuh"
#include "one_pass/sum_gradients.cuh"

static_assert(kSumsPhi, "nothing else computes d_phi");

// Warps that make replies, and have as many tokens of a tile each: a lane for every column of an octet of some at once, and
// those in turns.
constexpr int kFirstReplier = kFinisher + 1;
constexpr int kRepliers = Tuned::repliers;
constexpr int kReplierTokens = kTileTokens / kRepliers;
constexpr int kTokensAtOnce = 32 / 8, kTurns = kReplierTokens / kTokensAtOnce;
static_assert(kTurns * kTokensAtOnce == kReplierTokens);
// Tiles whose numbers for replies are on their way at once: those of 32 columns take the registers of two.
constexpr int kTilesAhead = kOctets < 4 ? 2 : 1;
constexpr int kThreads = 32 * (kFirstReplier + kRepliers);

// ---- shared memory ----------------------------------------------------------------------------------

// Barriers, of 8 bytes each: what is there once a phase is over, and who arrives for that, a warp once.
enum Barrier : u32 {
  kInputFull = 0,                        // x, y and d_u of a stage; the loader, with bytes
  kGradientFull = kInputFull + kStages,  // d_X'_in of a slot; the loader, with bytes
  // nobody needs a tile any more, whose stage and slot are free; stream dots and the finisher
  kEmpty = kGradientFull + kGradients,
  // replies, and d_y may take the place of d_u; repliers and input dots
  kRepliesFull = kEmpty + kStages,
  kDone = kRepliesFull + kStages,  // d_X' and d_y, in the place of d_X'_in and d_u; the main warps
  kTablesFull = kDone + kStages,   // tables of the mixing; the finisher
  kPhiThere = kTablesFull + 2,     // phi is in registers, or in its own place; the main warps
  kNumBarriers,
};

// Warps with dots of d_u in a tile: beside float32 streams one has four tokens, elsewhere the two take turns.
constexpr int kInputDotsOfTile = kIsFloat32 ? kDotWarps : 1;

constexpr u32 kReplies = 512;
constexpr u32 kTableSlots = kReplies + kStages * kTileTokens * kReplyStride;

#include "one_pass/post_pre_bwd_stages.cuh"

static_assert(kSharedBytes == Tuned::shared_bytes && kThreads == Tuned::threads, "");
static_assert(8 * kNumBarriers <= kOfMainWarps && kOfMainWarps + 8 * kMainWarps <= kReplies, "");

// ---- what all warps know ----------------------------------------------------------------------------

// Arguments of the kernel beside the maps and its settings.
struct Args {
  const float *h_post, *h_res, *phi, *alpha, *bias, *m, *r, *h_res_new, *h_given, *d_h_pre;
  const float* d_z;  // [tokens, kColumns], of which those of h_pre are not read
  float* dots;       // [tokens, gridDim.x, kDotsRow], of whole tiles, for sum_given
  void* for_phi;     // floats [gridDim.y, n, padded(C), kColumns], for sum_given
  float* gate_sums;  // [kRepliers * gridDim.y, kColumns + 3], alike
  int tokens, deferred;
};

struct Block : Stages {
  int num_tiles;

  // `rank` is which slice of the channels the block has.
  __device__ Block(const void* memory, int hidden, int tokens) : Stages(memory, hidden) {
    rank = blockIdx.x, ranks = gridDim.x;
    first_tile = blockIdx.y, tile_step = gridDim.y;
    num_tiles = share_of((tokens + kTileTokens - 1) / kTileTokens);
  }

  __device__ u32 barrier(Barrier first, u32 slot) const { return shared + 8 * (first + slot); }
  __device__ void init_barriers() const {
    for (u32 slot = 0; slot < kStages; ++slot) {
      init_barrier(barrier(kInputFull, slot), 1);
      init_barrier(barrier(kEmpty, slot), kDotWarps + 1);
      init_barrier(barrier(kRepliesFull, slot), kInputDotsOfTile + kRepliers);
      init_barrier(barrier(kDone, slot), kMainWarps);
    }
    for (u32 slot = 0; slot < kGradients; ++slot) init_barrier(barrier(kGradientFull, slot), 1);
    for (u32 slot = 0; slot < 2; ++slot) init_barrier(barrier(kTablesFull, slot), 1);
    init_barrier(barrier(kPhiThere, 0), kMainWarps);
    publish_barriers();
  }
  // Nobody has to be there but this block's warps, which all arrive for replies.
  __device__ void wait_for_start() const {}
  __device__ void expect_replies(u32) const {}
  __device__ void wait_for_replies(u32 stage, u32 parity) const {
    wait(barrier(kRepliesFull, stage), parity);
  }
};

// ---- replies ------------------------------------------------------------------------------------------

// Makes the replies for some tokens of each tile ahead of the main warps. A token has eight lanes, lane e column e of each
// octet.
//
//   d_z = d_h_pre sigmoid'(z) for the columns of h_pre,  dm = alpha d_z,  f = <dm, m> times the slope of r
struct Replier {
  const Block& block;
  const Args& args;
  const Settings& settings;
  const int which, lane;
  const bool is_pre;
  // Gates of this lane's column of the first octet and of those of the others; the bias of h_pre's columns.
  float alpha, alpha_res, bias;
  GateSums sums[kOctets];

  // Values of the lanes of a token: zeros behind the last one.
  struct Token {
    float m[kOctets], d_z[kOctets], r, h_given;
  };

  __device__ Replier(const Block& block, const Args& args, const Settings& settings, int which,
                     int lane)
      : block(block),
        args(args),
        settings(settings),
        which(which),
        lane(lane),
        is_pre(lane % 8 < N) {
    const int e = lane % 8;
    alpha = args.alpha[gate_of(e)];
    alpha_res = kOctets > 1 ? args.alpha[2] : 0.f;
    bias = is_pre ? args.bias[e] : 0.f;
  }

  // Which token of a tile this lane has in a turn.
  __device__ u32 in_tile(int turn) const {
    return which * kReplierTokens + turn * kTokensAtOnce + lane / 8;
  }

  // d_z of h_pre's columns is still d_h_pre. No number is read into the register of another, which would have to be there
  // first.
  __device__ Token load(int tile, int turn) const {
    Token token = {};
    const long long at = block.first_token(tile) + in_tile(turn);
    if (tile >= block.num_tiles || at >= args.tokens) return token;
    const int e = lane % 8;
    const long long own = at * N + e;
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
      const long long column = at * kColumns + octet * 8 + e;
      const bool is_d_h_pre = octet == 0 && is_pre;
      token.m[octet] = __ldg(args.m + column);
      token.d_z[octet] = __ldg(is_d_h_pre ? args.d_h_pre + own : args.d_z + column);
    }
    if (is_pre) token.h_given = __ldg(args.h_given + own);
    token.r = __ldg(args.r + at);
    return token;
  }

  __device__ void reply(Token token, u32 at) {
    const u32 e = lane % 8;
    if (is_pre) {
      const float z = alpha * token.m[0] + bias;
      token.d_z[0] *= sigmoid(z) * sigmoid(-z);
    }
    float dm_dot_m = 0.f;
    u32 largest = 0;
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
      sums[octet].add(token.d_z[octet], token.m[octet]);
      const float dm = (octet > 0 ? alpha_res : alpha) * token.d_z[octet];
      dm_dot_m += dm * token.m[octet];
      const float scaled = token.r * dm;
      largest = max(largest, magnitude(scaled));
      write1(at + octet * kNextOctet + place_of_word(e), word_of_pair(scaled));
    }
#pragma unroll
    for (u32 step = 1; step < 8; step *= 2) {
      dm_dot_m += __shfl_xor_sync(kAllLanes, dm_dot_m, step);
      largest = max(largest, __shfl_xor_sync(kAllLanes, largest, step));
    }
    if (is_pre) write1(at + kReplyGates + e * 4, word_of_other(token.h_given));
    if (e == 0) {
      const float slope = r_slope(settings, token.r, N * block.hidden);
      const u32 factor = word_of_other(-slope * dm_dot_m), unit = word_of_other(half_unit(largest));
      // Main warps multiply the two numbers behind these of four streams by zero.
      if constexpr (N == 4) {
        write4(at + kReplyFactor, {factor, unit, 0, 0});
      } else {
        write2(at + kReplyFactor, {factor, unit});
      }
    }
  }

  __device__ void run() {
    Token ahead[kTilesAhead][kTurns];
#pragma unroll
    for (int k = 0; k < kTilesAhead; ++k) {
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) ahead[k][turn] = load(k, turn);
    }
    Ring<kStages> ring;
#pragma unroll 1
    for (int first = 0; first < block.num_tiles; first += kTilesAhead) {
#pragma unroll
      for (int k = 0; k < kTilesAhead; ++k, ring.next()) {
        const int tile = first + k;
        if (tile >= block.num_tiles) break;
        // The numbers of two turns leave no registers for the next ones before they are used.
        constexpr bool kLoadsEarly = kTurns == 1;
        Token tokens[kTurns];
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) {
          tokens[turn] = ahead[k][turn];
          if (kLoadsEarly) ahead[k][turn] = load(tile + kTilesAhead, turn);
        }
        wait(block.barrier(kEmpty, ring.slot), ring.parity ^ 1);
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn)
          reply(tokens[turn], block.reply(ring.slot, in_tile(turn)));
        __syncwarp();
        if (lane == 0) arrive(block.barrier(kRepliesFull, ring.slot));
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) {
          if (!kLoadsEarly) ahead[k][turn] = load(tile + kTilesAhead, turn);
        }
      }
    }
    // Blocks of other channels have the same again.
    if (block.rank > 0) return;
    // Sums of all tokens, to the row of this warp. Then lane c has column c.
    GateSums of_column;
#pragma unroll
    for (u32 octet = 0; octet < kOctets; ++octet) {
      sums[octet].sum_tokens();
      if (lane_id() / 8 == octet) of_column = sums[octet];
    }
    of_column.store(args.gate_sums + (blockIdx.y * kRepliers + which) * (kColumns + 3), lane);
  }
};

// ---- dots of a block ----------------------------------------------------------------------------------

// Sums of a token and a block: entries of d_H_res, then those of d_h_post, both in the order of `StreamDots`, and <d_u, X[j]> and
// <d_u, y>. Rows are whole pieces of 16 bytes.
constexpr u32 kOfPost = N * N, kOfX = N == 4 ? 20 : 8, kOfY = kOfX + N;
constexpr u32 kDotsRow = (kOfY + 4) / 4 * 4;
static_assert(kDotsRow == Tuned::dots && kDotsRow == tuning_sum_given::dots, "");
// Which entry of d_H_res or d_h_post a word is.
constexpr bool kInOrder = N == 2 || kIsFloat32;
__device__ inline u32 entry_of_post(u32 word) { return kInOrder ? word : word / 2 + word % 2 * 2; }
__device__ inline u32 entry_of_res(u32 word) {
  const u32 a = word / 4, c = word % 4;
  return kInOrder ? word : (a / 2 + c / 2 * 2) * N + a % 2 + c % 2 * 2;
}

__device__ inline float* row_of_dots(const Block& block, const Args& args, int tile, u32 token) {
  const long long row = block.first_token(tile) + token;
  return args.dots + (row * block.ranks + block.rank) * kDotsRow;
}

#if IS_FLOAT32
#include "one_pass/post_pre_bwd_main_f32.cuh"
#include "one_pass/post_pre_bwd_others_f32.cuh"

__device__ inline u32 own_slice() { return blockIdx.x; }
__device__ inline u32 own_range() { return blockIdx.y; }

__device__ inline void store_dots(const Block& block, const Args& args, u32 half, u32 lane) {
  const DotWarp dots(block, half, lane);
  const u32 token = 4 * half + lane / 8;
  const auto of_input = [&](int tile, const float (&sums)[N + 1]) {
    __syncwarp();
    if (lane == 0) arrive(block.barrier(kRepliesFull, tile % kStages));
    float* const row = row_of_dots(block, args, tile, token);
    if (lane % 8 == 0)
      *reinterpret_cast<float4*>(row + kOfX) = {sums[0], sums[1], sums[2], sums[3]};
    if (lane % 8 == 1) row[kOfY] = sums[N];
  };
  const auto of_streams = [&](int tile, u32 i, const float (&of_row)[N + 1]) {
    float* const row = row_of_dots(block, args, tile, token);
    if (lane % 2 == 0) {
      *reinterpret_cast<float4*>(row + i * N) = {of_row[0], of_row[1], of_row[2], of_row[3]};
    } else {
      row[kOfPost + i] = of_row[N];
    }
  };
  dots.run(of_input, of_streams);
}
#else
#include "one_pass/post_pre_bwd_tiles.cuh"

__device__ inline void store_input_dots(const Block& block, const Args& args, int which, int lane) {
  const u32 g = lane / 4;
  const bool b = g % 2;
  input_dots<true>(block, which, lane,
                   [&](int tile, Ring<kStages> ring, const float (&x01)[4], const float (&x23)[4],
                       const float (&y)[4]) {
                     __syncwarp();
                     if (lane == 0) arrive(block.barrier(kRepliesFull, ring.slot));
                     if (lane % 4 != g / 2) return;
                     float* const row = row_of_dots(block, args, tile, g);
                     const float own_y = b ? y[1] : y[0];
                     const float third = N == 4 ? b ? x23[1] : x23[0] : own_y;
                     *reinterpret_cast<float4*>(row + kOfX) = {
                         b ? x01[1] : x01[0], b ? x01[3] : x01[2], third, b ? x23[3] : x23[2]};
                     if constexpr (N == 4) row[kOfY] = own_y;
                   });
}

__device__ inline void store_entry(float* row, u32 place, float4 v) {
  if (place / 4 < kOfPost) {
    *reinterpret_cast<float4*>(row + place / 4) = v;
  } else {
    *reinterpret_cast<float2*>(row + kOfPost + (place / 4 - kOfPost) / 2) = {v.x, v.y};
  }
}
__device__ inline void store_entry(float* row, u32 place, float v) { row[place / 4] = v; }

__device__ inline void store_stream_dots(const Block& block, const Args& args, int half, int lane) {
  stream_dots(block, half, lane, [&](int tile, u32 g, u32 q, const StreamDots<N>::Sums& sums) {
    float* const row = row_of_dots(block, args, tile, 4 * half + g % 4);
    using Entry = StreamDots<N>::Entry;
    StreamDots<N>::for_entries(sums, g, q, [&](u32 place, Entry v) { store_entry(row, place, v); });
  });
}
#endif

// ---- the pass -----------------------------------------------------------------------------------------

// The maps have boxes of kTileTokens tokens and SIZE channels; gridDim.x is C / SIZE, rounded up.
KERNEL(post_given_bwd, kThreads, 1)
(const __grid_constant__ BlockMaps x_even, const __grid_constant__ BlockMaps x_odd,
 const __grid_constant__ BlockMaps y, const __grid_constant__ BlockMaps d_u,
 const __grid_constant__ BlockMaps d_x_new_in_even,
 const __grid_constant__ BlockMaps d_x_new_in_odd, const __grid_constant__ BlockMaps d_x_new_even,
 const __grid_constant__ BlockMaps d_x_new_odd, const __grid_constant__ BlockMaps d_y,
 const float* h_post, const float* h_res, const float* phi, const float* alpha, const float* bias,
 const float* m, const float* r, const float* h_res_new, const float* h_given, const float* d_h_pre,
 const float* d_z, float* dots, void* d_phi, float* gate_sums, int tokens, int hidden, int deferred,
 Settings settings) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Args args{h_post,  h_res,   phi, alpha, bias,  m,         r,      h_res_new,
                  h_given, d_h_pre, d_z, dots,  d_phi, gate_sums, tokens, deferred};
  const Maps maps{x_even,         x_odd,        y,           d_u, d_x_new_in_even,
                  d_x_new_in_odd, d_x_new_even, d_x_new_odd, d_y};
  if (threadIdx.x == 0) Block(memory, hidden, tokens).init_barriers();
  __syncthreads();

  // Each task asks for its block again, so that none keeps in registers what only others want.
  if (warp < kMainWarps) {
    take_registers<kMainRegisters>();
    const Block block(memory, hidden, tokens);
    main_warps(block, args, warp, lane);
  } else {
    give_registers<kOtherRegisters>();
    const Block block(memory, hidden, tokens);
#if IS_FLOAT32
    if (warp < kLoader) {
      store_dots(block, args, warp - kInputDots, lane);
    } else if (warp == kLoader) {
      block.lines().has_rest ? move_tiles<true>(block, args, maps, lane)
                             : move_tiles<false>(block, args, maps, lane);
    } else {
      Replier(block, args, settings, warp - kFirstReplier, lane).run();
    }
#else
    const bool has_rest = block.lines().has_rest;
    if (warp < kStreamDots) {
      store_input_dots(block, args, warp - kInputDots, lane);
    } else if (warp < kLoader) {
      store_stream_dots(block, args, warp - kStreamDots, lane);
    } else if (warp == kLoader) {
      if (lane == 0) has_rest ? load_tiles<true>(block, maps) : load_tiles<false>(block, maps);
    } else if (warp == kFinisher) {
      has_rest ? finish_tiles<true>(block, args, maps, lane)
               : finish_tiles<false>(block, args, maps, lane);
    } else {
      Replier(block, args, settings, warp - kFirstReplier, lane).run();
    }
#endif
  }
}

// ---- sums of all blocks -------------------------------------------------------------------------------

constexpr int kSumThreads = tuning_sum_given::threads, kSumWarps = kSumThreads / 32;
// Tokens that a warp has at once, and a block; a lane has a word of a token's rows.
constexpr int kWarpTokens = 32 / kDotsRow, kSumTokens = kSumWarps * kWarpTokens;

//   d_h_given[i] = <d_u, X'[i]> = sum over j of H_res[i, j] <d_u, X[j]> + h_post[i] <d_u, y>
//
// d_h_post and d_H_res from dots [tokens, slices, kDotsRow], those of a warp's tokens.
__device__ inline void sum_dots(const float* dots, const float* h_post, const float* h_res,
                                float* d_h_post, float* d_h_res, float* d_h_given, int tokens,
                                int slices, int block) {
  const u32 lane = threadIdx.x % 32, of_warp = lane / kDotsRow;
  const int own = block * kSumTokens + threadIdx.x / 32 * kWarpTokens + of_warp;
  const bool exists = of_warp < kWarpTokens && own < tokens;
  // Lanes without a token repeat the last one.
  const long long token = min(own, tokens - 1);
  const u32 word = lane % kDotsRow, first = lane - word;
  const float* from = dots + token * slices * kDotsRow + word;
  float sum = 0.f;
#pragma unroll 8
  for (int slice = 0; slice < slices; ++slice) sum += __ldg(from + slice * kDotsRow);
  const u32 i = word % N;
  float d_h = __ldg(h_post + token * N + i) * __shfl_sync(kAllLanes, sum, first + kOfY);
#pragma unroll
  for (u32 j = 0; j < N; ++j) {
    const float h = __ldg(h_res + (token * N + i) * N + j);
    d_h = fmaf(h, __shfl_sync(kAllLanes, sum, first + kOfX + j), d_h);
  }
  if (!exists) return;
  if (word < N) d_h_given[token * N + i] = d_h;
  if (word < kOfPost) {
    d_h_res[token * N * N + entry_of_res(word)] = sum;
  } else if (word < kOfPost + N) {
    d_h_post[token * N + entry_of_post(word - kOfPost)] = sum;
  }
}

// The first `phi_blocks` blocks have d_phi, the next one the gradients of alpha and bias, all others tokens.
KERNEL(sum_given, kSumThreads)
(const float4* d_phi_partial, const float* gate_sums, const float* dots, const float* h_post,
 const float* h_res, float4* d_phi, float* d_bias, float* d_alpha, float* d_h_post, float* d_h_res,
 float* d_h_given, int phi_blocks, int ranges, int size, int of_stream, int padded, int num_gates,
 int tokens, int slices) {
  const int block = blockIdx.x - phi_blocks;
  if (block < 0) {
    const int at = blockIdx.x * kSumThreads + threadIdx.x;
    sum_phi(d_phi_partial, d_phi, ranges, size, of_stream, padded, at);
  } else if (block == 0) {
    sum_gates<kSumThreads>(gate_sums, d_bias, d_alpha, kRepliers * ranges, kColumns, num_gates);
  } else {
    sum_dots(dots, h_post, h_res, d_h_post, d_h_res, d_h_given, tokens, slices, block - 1);
  }
}
