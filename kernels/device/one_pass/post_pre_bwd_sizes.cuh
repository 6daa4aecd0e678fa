// Sizes that post_pre_bwd_one_pass.cu and given/post_given_bwd.cu share: warps and their tasks, what lies in shared memory
// for a token and for a tile, how main warps divide the channels. They include this behind `Tuned`, their row of tuning.rs.

#pragma once

#include "math/coefficients.cuh"
#include "one_pass/geometry.cuh"
#include "one_pass/owner.cuh"
#include "one_pass/phi.cuh"

static_assert(Tuned::tokens == kTileTokens);
constexpr int kStages = Tuned::stages;  // of X, y and d_u
constexpr int kGradients =
    Tuned::gradients;  // slots of d_X'_in, which is not wanted before the replies are there
static_assert(kGradients <= kStages, "");
// H_res_new is I: the gradients of the streams are added as they are.
constexpr bool kIdentity = kColumns == 2 * N;
static_assert(N == 4 || (N == 2 && kColumns == N * (N + 2)), "");
// Where the sums for d_phi have no room, phi_bwd.cu computes d_phi, from r dm and another pass over X and y.
constexpr bool kSumsPhi = Tuned::sums_phi;

constexpr bool kIsFloat32 = sizeof(Stream) == 4;

// Warps and their tasks. Beside float32 streams the same warps have both kinds of dots, and the loader is the finisher, too
// (post_pre_bwd_others_f32.cuh).
constexpr int kMainWarps = 8;
constexpr int kDotWarps = 2;
constexpr int kInputDots = kMainWarps;
constexpr int kStreamDots = kInputDots + (kIsFloat32 ? 0 : kDotWarps);
constexpr int kLoader = kStreamDots + kDotWarps;
constexpr int kFinisher = kLoader + (kIsFloat32 ? 0 : 1);
constexpr int kMainRegisters = kIsFloat32 ? 216 : 184;
constexpr int kOtherRegisters = 72;

// ---- shared memory ----------------------------------------------------------------------------------

// Replies are what main warps multiply a token by: r dm as bfloat16, the rest of it as bfloat16, and in words h_pre, -f, the
// unit of r dm (`half_unit`). Beside float32 streams all numbers are float32, r dm in the room of both of its parts.
// Rows are read as matrices: an odd number of 16 bytes keeps them apart.
constexpr u32 kReplyLow = kColumns * 2;
constexpr u32 kReplyGates = 2 * kReplyLow;
constexpr u32 kReplyFactor = kReplyGates + N * 4;
constexpr u32 kReplyUnit = kReplyFactor + 4;
constexpr u32 kReplyBytes = (kReplyUnit + 4 + 15) / 16 * 16;
constexpr u32 kReplyStride = kReplyBytes | 16;

// A word of r dm: of two neighbouring columns the even lane has the high parts, the odd one the low parts. Beside float32
// streams that of the lane's column.
__device__ inline u32 word_of_pair(float own) {
  if constexpr (kIsFloat32) return __float_as_uint(own);
  const float other = __shfl_xor_sync(kAllLanes, own, 1);
  const bool odd = lane_id() % 2;
  u32 parts[2];
  split(odd ? other : own, odd ? own : other, parts);
  return odd ? parts[1] : parts[0];
}
// Where that word of octet 0 is in a reply, for the lane of column e, and how far from it that of the next one.
constexpr u32 kNextOctet = kIsFloat32 ? 32 : 16;
__device__ inline u32 place_of_word(u32 e) {
  return kIsFloat32 ? e * 4 : e / 2 * 4 + e % 2 * kReplyLow;
}
// Other numbers of a reply.
__device__ inline u32 word_of_other(float v) {
  return kIsFloat32 ? __float_as_uint(v) : word_of(v);
}

// Of a tile H_res and the transposed H_res_new (`Tables`), h_post, with zeros for streams that are not there, and the units
// of each token's matrices. Beside four float16 streams these are float16, too, whose range is too small without units:
// powers of two, by the largest number (`half_unit`).
constexpr bool kHasUnits = N > 2 && kStreamParts<Stream> == 2;
constexpr u32 kTableBytes = kTileTokens * N * N * 4;
constexpr u32 kHPost = (kIdentity ? 1 : 2) * kTableBytes;
constexpr u32 kHPostBytes = 16;
// Beside float32 streams a row a token: H_res transposed, H_res_new, h_post. The rows of every second token are in different
// banks.
constexpr u32 kTableNew = N * N * 4, kTableHPost = (kIdentity ? 1 : 2) * kTableNew;
constexpr u32 kTableRow = kTableHPost + 16;
constexpr u32 kTableUnits = kHPost + kTileTokens * kHPostBytes;
constexpr u32 kTableUnitsBytes = 8;
constexpr u32 kTablesBytes = kIsFloat32
                                 ? kTileTokens * kTableRow
                                 : kTableUnits + (kHasUnits ? kTileTokens * kTableUnitsBytes : 0);

// A main warp has units of 16 channels of all streams.
constexpr int kUnits = (SIZE / 16 + kMainWarps - 1) / kMainWarps;
// The main warps have phi of their last units in registers, of as many as 96 registers hold together with the sums for
// d_phi, which leaves shared memory to the stages. phi of the first units lies there.
constexpr int kSumsOfWarp = kSumsPhi ? kUnits * N * kOctets * 4 : 0;
constexpr int kUnitsOfPhi = (96 - kSumsOfWarp) / (N * kPhiWords);
constexpr int kHeldUnits = kIsFloat32 ? 0 : kUnitsOfPhi < kUnits ? kUnitsOfPhi : kUnits;
constexpr int kSharedUnits = kUnits - kHeldUnits;
// Beside float32 streams they have as many pairs of words of its float16 parts as 134 registers have room for.
constexpr int kPhiPairs = 2 * kUnits * N * kOctets, kMostHeld = (134 - kSumsOfWarp) / 2;
constexpr int kHeld = kMostHeld < kPhiPairs ? kMostHeld : kPhiPairs;
// Units whose X' is there before the replies are: with those of all, 448 channels would take too many registers.
constexpr int kAhead = Tuned::ahead;
// Whether what units share of the replies is read once for all of them: where there are registers for it.
constexpr bool kKeepsReply = kOctets < 4 || kAhead > 1;
// phi of 16 channels of a stream, and of all channels of the block.
constexpr u32 kPhiBytes = kPhiFragmentBytes;
constexpr u32 kPhiPairBytes = kMainWarps * 32 * 8;  // of all main warps
constexpr u32 kAllPhiBytes =
    kIsFloat32 ? (kPhiPairs - kHeld) * kPhiPairBytes : SIZE / 16 * N * kPhiBytes;
// The part of it that stays in shared memory.
constexpr u32 kSharedPhiBytes =
    kSharedUnits == kUnits ? kAllPhiBytes : kSharedUnits * kMainWarps * N * kPhiBytes;

constexpr u32 kBox = Tile<kTileTokens>::kBoxBytes;
constexpr u32 kPlane = Tile<kTileTokens>::kPlaneBytes;
// Parts that are copied at once: in a stage half of the streams of X, those with an even or those with an odd number, and y and
// d_u, a pair; in a slot the same half of d_X'_in. Two neighbouring streams are read at once: half a swizzled box between
// them keeps those in different banks.
constexpr u32 kHalf = N / 2 * kPlane;
constexpr u32 kPair = 2 * kPlane;
constexpr u32 kOddShift = kIsFloat32 ? 0 : 512;
constexpr u32 kOddSwizzle = kOddShift / kRowBytes;

// Behind the barriers two numbers of each main warp, beside float32 streams.
constexpr u32 kOfMainWarps = 448;
