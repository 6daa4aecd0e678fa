// The backward pass of post_pre where u is the sum over the streams of X' with given weights, in one pass over X, y, d_u and
// d_X'_in, the cotangent of X' that it adds to (n = 2 and 4):
//
//   X'          = H_res X + h_post y, again
//   d_X'[j]     = sum over i of H_res_new[i, j] d_X'_in[i] + h_given[j] d_u + (r dm) phi^T - f X'[j]
//   d_y         = sum over i of h_post[i] d_X'[i]
//   d_h_post[i] = <d_X'[i], y>,  d_H_res[i, j] = <d_X'[i], X[j]>,  d_h_given[i] = <d_u, X'[i]>
//   d_phi       = sum over tokens of vec(X')^T (r dm)
//
// All cotangents of the new coefficients are there beforehand: so r dm and f wait for no sum over the channels, and blocks
// have nothing to tell each other. Three kernels, behind logits_bwd.cu and before sum_gradients.cu:
//
//   given_replies   r dm, h_given and f of each token, which in post_pre_bwd_one_pass.cu its owner replies with
//   post_given_bwd  the pass: a block has SIZE channels of all streams, and every gridDim.y-th tile of tokens
//   sum_given_dots  the sums over the channels, from those of each block
//
// The warps of the pass are those of post_pre_bwd_one_pass.cu without its owners. <d_u, X'[i]> is summed up as <d_u, X[j]>
// and <d_u, y>.

#include "base/common.cuh"

using Tuned = tuning_post_given_bwd;

#include "one_pass/post_pre_bwd_sizes.cuh"

static_assert(kSumsPhi, "nothing else computes d_phi");

// setmaxnreg is for groups of four warps.
constexpr int kThreads = 32 * ((kFinisher + 4) / 4 * 4);

// ---- replies ----------------------------------------------------------------------------------------

constexpr int kReplyThreads = tuning_given_replies::threads, kReplyWarps = kReplyThreads / 32;
// Of each warp the sums of its columns.
static_assert(tuning_given_replies::shared_bytes == kReplyWarps * 32 * 8, "");

// The sums of a block's warps, lane c having column c, to the first one.
__device__ inline GateSums sum_warps(u32 shared, GateSums own) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  write2(shared + threadIdx.x * 8, {__float_as_uint(own.d_z), __float_as_uint(own.d_z_m)});
  __syncthreads();
  GateSums sums;
  for (int w = 0; warp == 0 && w < kReplyWarps; ++w) {
    const uint2 v = read2(shared + (w * 32 + lane) * 8);
    sums.d_z += __uint_as_float(v.x), sums.d_z_m += __uint_as_float(v.y);
  }
  return sums;
}

//   d_z = d_h_pre sigmoid'(z) for the columns of h_pre,  dm = alpha d_z,  f = <dm, m> times the slope of r
//
// d_z: [tokens, kColumns], of which those columns are not read. replies: [tokens, kReplyStride bytes], of whole tiles.
// gate_sums: [blocks, kColumns + 3], for sum_gradients. A token has eight lanes, lane e column e of each octet.
KERNEL(given_replies, kReplyThreads)
(const float* alpha, const float* bias, const float* m, const float* r, const float* h_given,
 const float* d_h_pre, const float* d_z, u32* replies, float* gate_sums, int tokens, int hidden,
 Settings settings) {
  extern __shared__ __align__(1024) unsigned char memory[];
  constexpr int kTokens = kReplyThreads / 8;
  const int e = threadIdx.x % 8, end = (tokens + kTileTokens - 1) / kTileTokens * kTileTokens;
  const bool is_pre = e < N;
  GateSums sums[kOctets];
  for (int first = blockIdx.x * kTokens; first < end; first += gridDim.x * kTokens) {
    // Behind the last token, of which nothing is read, replies are zero.
    const long long token = first + int(threadIdx.x) / 8;
    const bool exists = token < tokens;
    const float token_r = exists ? __ldg(r + token) : 0.f;
    float own_m[kOctets], scaled[kOctets], dm_dot_m = 0.f;
    u32 largest = 0;
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
      const int c = octet * 8 + e;
      const float gate = __ldg(alpha + gate_of(c));
      own_m[octet] = exists ? __ldg(m + token * kColumns + c) : 0.f;
      float own_d_z = 0.f;
      if (c >= N) {
        own_d_z = exists ? __ldg(d_z + token * kColumns + c) : 0.f;
      } else if (exists) {
        const float z = gate * own_m[octet] + __ldg(bias + c);
        own_d_z = __ldg(d_h_pre + token * N + c) * sigmoid(z) * sigmoid(-z);
      }
      sums[octet].add(own_d_z, own_m[octet]);
      const float dm = gate * own_d_z;
      dm_dot_m += dm * own_m[octet];
      scaled[octet] = token_r * dm;
      largest = max(largest, magnitude(scaled[octet]));
    }
#pragma unroll
    for (u32 step = 1; step < 8; step *= 2) {
      dm_dot_m += __shfl_xor_sync(kAllLanes, dm_dot_m, step);
      largest = max(largest, __shfl_xor_sync(kAllLanes, largest, step));
    }
    u32* const reply = replies + token * (kReplyStride / 4);
#pragma unroll
    for (u32 octet = 0; octet < kOctets; ++octet) {
      const u32 word = word_of_pair(scaled[octet]);
      if (token < end) reply[(octet * kNextOctet + place_of_word(e)) / 4] = word;
    }
    if (token >= end) continue;
    const float own = exists && is_pre ? __ldg(h_given + token * N + e) : 0.f;
    if (is_pre) reply[kReplyGates / 4 + e] = word_of_other(own);
    if (e == 0) {
      const float slope = exists ? r_slope(settings, token_r, N * hidden) : 0.f;
      const u32 factor = word_of_other(-slope * dm_dot_m), unit = word_of_other(half_unit(largest));
      // Zeros where main warps multiply what lies there by zero.
      if constexpr (N == 4) {
        *reinterpret_cast<uint4*>(reply + kReplyFactor / 4) = {factor, unit, 0, 0};
      } else {
        *reinterpret_cast<uint2*>(reply + kReplyFactor / 4) = {factor, unit};
      }
    }
  }
  // Then lane c has column c.
  GateSums of_column;
#pragma unroll
  for (u32 octet = 0; octet < kOctets; ++octet) {
    sums[octet].sum_tokens();
    if (threadIdx.x % 32 / 8 == octet) of_column = sums[octet];
  }
  of_column = sum_warps(shared_address(memory), of_column);
  if (threadIdx.x < 32) of_column.store(gate_sums + blockIdx.x * (kColumns + 3), threadIdx.x);
}

// ---- shared memory ----------------------------------------------------------------------------------

// Barriers, of 8 bytes each: what is there once a phase is over, and who arrives for that, a warp once.
enum Barrier : u32 {
  kInputFull = 0,                        // x, y and d_u of a stage; the loader, with bytes
  kGradientFull = kInputFull + kStages,  // d_X'_in of a slot; the loader, with bytes
  // nobody needs a tile any more, whose stage and slot are free; stream dots and the finisher
  kEmpty = kGradientFull + kGradients,
  // replies, and d_y may take the place of d_u; the loader, with bytes, and input dots
  kRepliesFull = kEmpty + kStages,
  kDone = kRepliesFull + kStages,  // d_X' and d_y, in the place of d_X'_in and d_u; the main warps
  kTablesFull = kDone + kStages,   // tables of the mixing; the finisher
  kPhiThere = kTablesFull + 2,     // phi is in registers, or in its own place; the main warps
  kNumBarriers,
};

constexpr u32 kTileReplyBytes = kTileTokens * kReplyStride;
constexpr u32 kReplies = 512;
constexpr u32 kTableSlots = kReplies + kStages * kTileReplyBytes;

#include "one_pass/post_pre_bwd_stages.cuh"

static_assert(kSharedBytes == Tuned::shared_bytes && kThreads == Tuned::threads, "");
static_assert(8 * kNumBarriers <= kOfMainWarps && kOfMainWarps + 8 * kMainWarps <= kReplies, "");

// ---- what all warps know ----------------------------------------------------------------------------

// Arguments of the kernel beside the maps.
struct Args {
  const float *h_post, *h_res, *phi, *h_res_new;
  float* dots;    // [tokens, gridDim.x, kDotsRow], of whole tiles, for sum_given_dots
  void* for_phi;  // floats [gridDim.y, n C, kColumns], for sum_gradients
  int tokens, deferred;
};

struct Block : Stages {
  const u32* replies;
  int num_tiles;

  // `rank` is which of the slices of the channels the block has.
  __device__ Block(const void* memory, const u32* replies, int hidden, int tokens)
      : Stages(memory, hidden), replies(replies) {
    rank = blockIdx.x, ranks = gridDim.x;
    first_tile = blockIdx.y, tile_step = gridDim.y;
    num_tiles = share_of((tokens + kTileTokens - 1) / kTileTokens);
  }

  __device__ u32 barrier(Barrier first, u32 slot) const { return shared + 8 * (first + slot); }
  __device__ void init_barriers() const {
    for (u32 slot = 0; slot < kStages; ++slot) {
      init_barrier(barrier(kInputFull, slot), 1);
      init_barrier(barrier(kEmpty, slot), kDotWarps + 1);
      init_barrier(barrier(kRepliesFull, slot), kDotWarps + 1);
      init_barrier(barrier(kDone, slot), kMainWarps);
    }
    for (u32 slot = 0; slot < kGradients; ++slot) init_barrier(barrier(kGradientFull, slot), 1);
    for (u32 slot = 0; slot < 2; ++slot) init_barrier(barrier(kTablesFull, slot), 1);
    init_barrier(barrier(kPhiThere, 0), kMainWarps);
    publish_barriers();
  }
  // Blocks do not wait for each other, and the loader expects the replies.
  __device__ void wait_for_start() const {}
  __device__ void expect_replies(u32) const {}
  __device__ void copy_replies(int tile, u32 stage) const {
    const u32 full = barrier(kRepliesFull, stage);
    arrive_and_expect(full, kTileReplyBytes);
    copy_in(reply(stage, 0), replies + (long long)first_token(tile) * (kReplyStride / 4),
            kTileReplyBytes, full);
  }
};

// ---- dots of a block ----------------------------------------------------------------------------------

// Of a token and a block: entries of d_H_res, then those of d_h_post, both in the order of `StreamDots`, and from each half
// of the channels <d_u, X[j]> and <d_u, y>.
constexpr u32 kDotsRow = N == 4 ? 32 : 16;
constexpr u32 kOfPost = N * N;
__device__ constexpr u32 of_d_u(u32 half) { return N == 4 ? 20 + 4 * half : 8 + 4 * half; }
__device__ constexpr u32 of_y(u32 half) { return N == 4 ? 28 + half : of_d_u(half) + N; }
// Which entry of d_H_res or d_h_post a word is.
__device__ inline u32 entry_of_post(u32 word) { return N == 4 ? word / 2 + word % 2 * 2 : word; }
__device__ inline u32 entry_of_res(u32 word) {
  const u32 a = word / 4, c = word % 4;
  return N == 4 ? (a / 2 + c / 2 * 2) * N + a % 2 + c % 2 * 2 : word;
}

__device__ inline float* row_of_dots(const Block& block, const Args& args, int tile, u32 token) {
  const long long row = block.first_token(tile) + token;
  return args.dots + (row * block.ranks + block.rank) * kDotsRow;
}

#include "one_pass/post_pre_bwd_tiles.cuh"

__device__ inline void store_input_dots(const Block& block, const Args& args, int half, int lane) {
  const u32 g = lane / 4;
  const bool b = g % 2;
  input_dots(block, half, lane,
             [&](int tile, Ring<kStages> ring, const float (&x01)[4], const float (&x23)[4],
                 const float (&y)[4]) {
               __syncwarp();
               if (lane == 0) arrive(block.barrier(kRepliesFull, ring.slot));
               if (lane % 4 != g / 2) return;
               float* const row = row_of_dots(block, args, tile, g);
               const float of_y_here = b ? y[1] : y[0];
               const float third = N == 4 ? b ? x23[1] : x23[0] : of_y_here;
               *reinterpret_cast<float4*>(row + of_d_u(half)) = {
                   b ? x01[1] : x01[0], b ? x01[3] : x01[2], third, b ? x23[3] : x23[2]};
               if constexpr (N == 4) row[of_y(half)] = of_y_here;
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

// ---- the pass -----------------------------------------------------------------------------------------

// The maps have boxes of kTileTokens tokens and SIZE channels; gridDim.x is C / SIZE, rounded up.
KERNEL(post_given_bwd, kThreads, 1)
(const __grid_constant__ TensorMap x_even, const __grid_constant__ TensorMap x_odd,
 const __grid_constant__ TensorMap y, const __grid_constant__ TensorMap d_u,
 const __grid_constant__ TensorMap d_x_new_in_even,
 const __grid_constant__ TensorMap d_x_new_in_odd, const __grid_constant__ TensorMap d_x_new_even,
 const __grid_constant__ TensorMap d_x_new_odd, const __grid_constant__ TensorMap d_y,
 const float* h_post, const float* h_res, const float* phi, const float* h_res_new,
 const u32* replies, float* dots, void* d_phi, int tokens, int hidden, int deferred) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Args args{h_post, h_res, phi, h_res_new, dots, d_phi, tokens, deferred};
  const Maps maps{x_even,         x_odd,        y,           d_u, d_x_new_in_even,
                  d_x_new_in_odd, d_x_new_even, d_x_new_odd, d_y};
  if (threadIdx.x == 0) Block(memory, replies, hidden, tokens).init_barriers();
  __syncthreads();

  // Each task asks for its block again, so that none keeps in registers what only others want.
  if (warp < kMainWarps) {
    take_registers<kMainRegisters>();
    const Block block(memory, replies, hidden, tokens);
    main_warps(block, args, warp, lane);
  } else {
    give_registers<kOtherRegisters>();
    const Block block(memory, replies, hidden, tokens);
    if (warp < kStreamDots) {
      store_input_dots(block, args, warp - kInputDots, lane);
    } else if (warp < kLoader) {
      store_stream_dots(block, args, warp - kStreamDots, lane);
    } else if (warp == kLoader) {
      if (lane == 0) load_tiles(block, maps);
    } else if (warp == kFinisher) {
      finish_tiles(block, args, maps, lane);
    }
  }
}

// ---- sums of all blocks -------------------------------------------------------------------------------

constexpr int kSumThreads = tuning_sum_given_dots::threads;

// d_h_post, d_H_res and
//
//   d_h_given[i] = <d_u, X'[i]> = sum over j of H_res[i, j] <d_u, X[j]> + h_post[i] <d_u, y>
//
// from dots [tokens, slices, kDotsRow]. A lane has a word of a token's rows.
KERNEL(sum_given_dots, kSumThreads)
(const float* dots, const float* h_post, const float* h_res, float* d_h_post, float* d_h_res,
 float* d_h_given, int tokens, int slices) {
  const long long own = ((long long)blockIdx.x * kSumThreads + threadIdx.x) / kDotsRow;
  // Lanes without a token repeat the last one.
  const long long token = min(own, (long long)tokens - 1);
  const u32 lane = threadIdx.x % 32, word = lane % kDotsRow, first = lane - word;
  const float* from = dots + token * slices * kDotsRow + word;
  float sum = 0.f;
#pragma unroll 8
  for (int slice = 0; slice < slices; ++slice) sum += __ldg(from + slice * kDotsRow);
  const auto sum_of = [&](u32 of_first, u32 of_second) {
    return __shfl_sync(kAllLanes, sum, first + of_first) +
           __shfl_sync(kAllLanes, sum, first + of_second);
  };
  const u32 i = word % N;
  float d_h = __ldg(h_post + token * N + i) * sum_of(of_y(0), of_y(1));
#pragma unroll
  for (u32 j = 0; j < N; ++j) {
    const float h = __ldg(h_res + (token * N + i) * N + j);
    d_h = fmaf(h, sum_of(of_d_u(0) + j, of_d_u(1) + j), d_h);
  }
  if (own >= tokens) return;
  if (word < N) d_h_given[token * N + i] = d_h;
  if (word < kOfPost) d_h_res[token * N * N + entry_of_res(word)] = sum;
  if (word >= kOfPost && word < kOfPost + N)
    d_h_post[token * N + entry_of_post(word - kOfPost)] = sum;
}
