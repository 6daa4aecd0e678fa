// The backward pass of pre in one pass over X, d_u and the cotangent of the X that was handed on (n = 4):
//
//   d_h_pre[i] += <d_u, X[i]>
//   d_z         from d_h_pre; that of the other coefficients is there already (logits_bwd.cu)
//   dm          = alpha d_z
//   d_x[j]      = sum over i of h_res[i, j] d_x_in[i] + h_pre[j] d_u + (r dm) phi^T - f X[j]
//   d_phi       = sum over tokens of vec(X)^T (r dm)
//
// The tasks of the warps, and the order in which a tile meets them:
//
//   loader        X and d_u to a buffer, and d_x_in to another one
//   dot warps     this block's part of <d_u, X[i]>, to the block that owns the token; h_res as main warps want it
//   owner         the sum of these parts; r dm, h_pre and f, to all blocks
//   main warps    d_x in place of d_x_in, and the sums for d_phi, which stay where they are until the end
//   loader        d_x to memory
//
// X may have more buffers than d_x_in, which is not wanted before the reply is there.
//
// Where the layer's input is normalised, d_u is the cotangent g of w rho u, with u = sum over i of h_pre[i] X[i]. In place
// of d_u stands then the cotangent of u (NORM):
//
//   v = w g      du = rho v - f u, f = rho^3 <v, u> / C      dw = sum over tokens of g rho u
//
// Neither u nor du is rounded or written anywhere: the dot warps have <v, X[i]> and <X[i], X[j]>, of which the owner makes
// <u, X[i]>, <v, u> and so f; main warps add up u again.
//
// Whatever belongs to a token stays within it, so that one with no number in it does not spoil others.

#include "math/coefficients.cuh"
#include "one_pass/geometry.cuh"
#include "one_pass/owner.cuh"

// Main warps take turns at units of 16 channels of all streams. Where four units are left, two warps share one of
// them: two streams for each.
constexpr int kMainWarps = 8;
constexpr int kUnits = SIZE / 16, kTurns = kUnits / kMainWarps;
constexpr bool kShared = kUnits % kMainWarps > 0;
static_assert(kUnits % kMainWarps == 0 || kUnits % kMainWarps * 2 == kMainWarps);
// A fragment of phi or d_phi is what a unit has of a stream. Those of a main warp: of its turns, then what it shares.
constexpr int kFragments = N * kTurns + (kShared ? 2 : 0);

struct Plan {
  // Buffers for X and d_u, and for d_x_in.
  int stages, d_x_in_slots;
  // Fragments of phi that a main warp has in registers; the others are in shared memory.
  int held;
};
constexpr Plan kPlan = SIZE == 256   ? Plan{5, 5, 4}
                       : SIZE == 320 ? Plan{3, 3, 0}
                       : SIZE == 384 ? Plan{3, 2, 0}
                                     : Plan{2, 2, 0};
constexpr int kStages = kPlan.stages, kDXInSlots = kPlan.d_x_in_slots, kHeld = kPlan.held;
// Two buffers are too few to hide how long memory takes. Then a tile goes to the L2 cache before there is room for it.
constexpr bool kPrefetch = kStages < 3;
// Fragments of d_phi whose sums a main warp has in shared memory, as 14 do not fit into its registers.
constexpr int kSumsInShared = SIZE == 448 ? 1 : 0, kSums = kFragments - kSumsInShared;

// Whether main warps have registers for their sums for the gradient of w.
constexpr bool kHoldsDW = SIZE <= 320;

// Registers are handed on by groups of four warps. Two dot warps take longer than four, but leave more registers to
// the main warps.
template <bool NORM>
struct Warps {
  static constexpr int kDot = SIZE == 256 && !NORM ? 4 : 2;
  static constexpr int kMainRegisters = kDot == 2 ? 216 : 200;
  static constexpr int kDotRegisters = kDot == 2 ? 72 : 48, kOtherRegisters = kDot == 2 ? 72 : 64;
  static constexpr int kLoader = kMainWarps + kDot, kOwner = kLoader + 1;
  static constexpr int kThreads = 32 * (kMainWarps + (kDot + 2 + 3) / 4 * 4);
  // The parts of the dot products of one token from one block: a float4 a dot warp, and as much again where u is
  // normalised.
  static constexpr u32 kPartBytes = kDot * 16;
};
// Room for them.
constexpr u32 kPartBytes = 64;
static_assert(Warps<false>::kPartBytes <= kPartBytes && 2 * Warps<true>::kPartBytes <= kPartBytes);

// ---- shared memory ----------------------------------------------------------------------------------

// A plane a stream: X and d_u; d_x_in.
constexpr u32 kPlaneBytes = Tile<kTileTokens>::kPlaneBytes;
constexpr u32 kBoxBytes = Tile<kTileTokens>::kBoxBytes;
constexpr u32 kDU = N * kPlaneBytes, kStageBytes = kDU + kPlaneBytes;
constexpr u32 kDXInBytes = N * kPlaneBytes;
constexpr u32 kBoxUnits = kBoxChannels / 16, kUnitBytes = 32;
// Of one fragment of phi (f16), and of d_phi.
constexpr u32 kFragmentBytes = 32 * 24, kSumsBytes = 32 * 48;
constexpr u32 kPhiBytes = kMainWarps * (kFragments - kHeld) * kFragmentBytes;
// What main warps want to know of a tile, a row a token: r dm, what r dm lost by rounding (bf16, 24 each), h_pre, -f
// and the unit of r dm (`half_unit`), rho and -f of the norm of u, all of these from the owner; the transpose of h_res. The
// padding keeps the rows in different banks.
constexpr u32 kHPre = 96, kMinusF = 112, kUnit = kMinusF + 4, kRho = kUnit + 4, kHRes = 128;
constexpr u32 kReplyRow = kHRes + N * N * sizeof(float) + 16;
constexpr u32 kRepliesBytes = kTileTokens * kReplyRow;
// Clusters of 16 have owners for two tiles, so that half as many buffers do.
constexpr u32 kPartsBytes = (kStages + 1) / 2 * 16 * kPartBytes;

// As many buffers for d_x_in as for X lie among these: one address is enough.
constexpr u32 kDXIn = kStages * kStageBytes;
constexpr u32 kPhi = kDXIn + kDXInSlots * kDXInBytes;
constexpr u32 kSumsAt = kPhi + kPhiBytes;
constexpr u32 kReplies = kSumsAt + kMainWarps * kSumsInShared * kSumsBytes;
constexpr u32 kParts = kReplies + kStages * kRepliesBytes;
constexpr u32 kBarriers = kParts + kPartsBytes;
// Barriers: of each buffer, and that phi has been read.
constexpr u32 kFull = kBarriers, kDone = kFull + 8 * kStages, kPartsFull = kDone + 8 * kStages,
              kReplyFull = kPartsFull + 8 * kStages, kTableFull = kReplyFull + 8 * kStages,
              kDXInFull = kTableFull + 8 * kStages, kPhiRead = kDXInFull + 8 * kDXInSlots;
// Of phi in a main warp's fragments (`half_unit`).
constexpr u32 kPhiUnits = kPhiRead + 8;
constexpr u32 kSharedBytes = kPhiUnits + kMainWarps * sizeof(float);
// The plan of a call (one_pass/pre_bwd.rs) has the same numbers.
static_assert(SIZE != 256 || kSharedBytes == 220568);
static_assert(SIZE != 320 || kSharedBytes == 206904);
static_assert(SIZE != 384 || kSharedBytes == 222256);
static_assert(SIZE != 448 || kSharedBytes == 231816);
static_assert(SIZE != 256 || Warps<false>::kThreads == 512);
static_assert(SIZE == 256 || Warps<false>::kThreads == 384);
static_assert(Warps<true>::kThreads == 384);

extern __shared__ __align__(1024) unsigned char shared[];

// What all warps of a block know.
struct Block : Place<kTileTokens> {
  int num_tiles;  // of this cluster

  __device__ Block(const void* memory, int tokens) : Place(memory) {
    // With shifts, as powers of two allow, pre_norm_bwd_one_pass would spill registers on sm_100f.
    first_tile = blockIdx.x / ranks;
    tile_step = gridDim.x / ranks;
    num_tiles = share_of((tokens + int(kTileTokens) - 1) / int(kTileTokens));
  }

  __device__ u32 stage(u32 slot) const {
    return shared + slot * (kStages == kDXInSlots ? kStageBytes + kDXInBytes : kStageBytes);
  }
  __device__ u32 d_x_in_at(u32 slot) const {
    return kStages == kDXInSlots ? stage(slot) + kStageBytes : shared + kDXIn + slot * kDXInBytes;
  }
  __device__ u32 replies(u32 slot) const { return shared + kReplies + slot * kRepliesBytes; }
  __device__ u32 barrier(u32 which, u32 slot) const { return shared + which + 8 * slot; }

  // Token t of a tile is owned by block t % ranks; of clusters of 16 the blocks 0 to 7 own those of even tiles and
  // the others those of odd ones.
  __device__ u32 owned() const { return ranks < kTileTokens ? kTileTokens / ranks : 1; }
  __device__ int owner_groups() const { return ranks > kTileTokens ? ranks / kTileTokens : 1; }
};

// The ring of buffers for parts of the dot products. A buffer has them one kind after the other.
template <bool NORM>
struct PartsRing {
  u32 slots, kind_bytes, slot_bytes;
  u32 slot = 0, parity = 0;

  __device__ PartsRing(const Block& block)
      : slots(block.owner_groups() > 1 ? (kStages + 1) / 2 : kStages),
        kind_bytes(block.owned() * block.ranks * Warps<NORM>::kPartBytes),
        slot_bytes(NORM ? 2 * kind_bytes : kind_bytes) {}
  __device__ u32 at(const Block& block) const { return block.shared + kParts + slot * slot_bytes; }
  __device__ void next() {
    if (++slot == slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

struct Gates {
  const float *alpha, *bias, *m, *r, *d_h_pre, *d_z;
  // [blocks, kColumns + 3], for sum_gradients
  float* sums;
};

// Of the norm of u, where there is one.
struct InputNorm {
  const float *w, *rho;
  // [clusters, C], for sum_norm_scale
  float* d_w;
};

// The same sum in four neighbouring lanes.
__device__ inline float sum_of_four(float v) {
  v += __shfl_xor_sync(kAllLanes, v, 1);
  return v + __shfl_xor_sync(kAllLanes, v, 2);
}

// w of neighbours. It stays in the L1 cache, so that it need not be kept in registers: hence volatile.
__device__ inline float2 load_pair(const float* from) {
  float2 v;
  asm volatile("ld.global.nc.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(from));
  return v;
}
__device__ inline float load_single(const float* from) {
  float v;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(from));
  return v;
}

// ---- loader -----------------------------------------------------------------------------------------

__device__ inline void copy_tiles(const Block& block, const TensorMap& x, const TensorMap& d_u,
                                  const TensorMap& d_x_in, const TensorMap& d_x) {
  const u64 policy = evict_first();
  const int box = block.first_box();
  const auto load = [&](int tile, u32 slot) {
    if (tile >= block.num_tiles) return;
    const u32 stage = block.stage(slot), full = block.barrier(kFull, slot);
    const int token = block.first_token(tile);
    arrive_and_expect(full, kStageBytes);
    copy_in(stage, x, token, box, 0, full, policy);
    copy_in(stage + kDU, d_u, token, box, 0, full, policy);
    if (kPrefetch && tile + kStages < block.num_tiles) {
      const int later = block.first_token(tile + kStages);
      prefetch(x, later, box, 0);
      prefetch(d_u, later, box, 0);
    }
  };
  const auto load_d_x_in = [&](int tile, u32 slot) {
    if (tile >= block.num_tiles) return;
    const u32 full = block.barrier(kDXInFull, slot);
    arrive_and_expect(full, kDXInBytes);
    copy_in(block.d_x_in_at(slot), d_x_in, block.first_token(tile), box, 0, full, policy);
    if (kPrefetch && tile + kDXInSlots < block.num_tiles) {
      prefetch(d_x_in, block.first_token(tile + kDXInSlots), box, 0);
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
    copy_out(d_x, block.first_token(tile), box, 0, block.d_x_in_at(d_x_in_slots.slot));
    commit_copies();
    wait_for_reads<0>();
    load_d_x_in(tile + kDXInSlots, d_x_in_slots.slot);
  }
  finish_copies();
}

// ---- dot warps --------------------------------------------------------------------------------------

// <d_u, X[i]> is the diagonal of the product of both tiles. A dot warp has some units of every box, and h_res of some
// tokens: its transpose, or the unit matrix where d_x_in is not to be mixed.
template <bool NORM>
__device__ inline void multiply_tiles(const Block& block, const float* h_res, const Gates& gates,
                                      const InputNorm& norm, int tokens, bool deferred, float pre_eps,
                                      int warp, int lane) {
  constexpr int kWarps = Warps<NORM>::kDot;
  cluster_wait();
  const u32 matrix = lane / 8, row = lane % 8;
  const u32 first_unit = warp * (kBoxUnits / kWarps);
  const u32 x_at = matrix % 2 * kPlaneBytes + swizzled(row, 2 * first_unit + matrix / 2);
  const u32 d_u_at = kDU + swizzled(row, 2 * first_unit + matrix % 2);
  // The token whose diagonal element this lane has, if any.
  const u32 token = lane / 4;
  const bool on_diagonal = token / 2 == lane % 4;
  const u32 owner = token % block.ranks;
  const u32 part = (token / block.ranks * block.ranks + block.rank) * Warps<NORM>::kPartBytes + warp * 16;

  // Neighbours in row j of the transpose.
  constexpr int kOwn = N * N * int(kTileTokens) / (32 * kWarps);
  const int first = (warp * 32 + lane) * kOwn, h_token = first / (N * N), j = first / N % N, i = first % N;
  float h[kOwn];
  const auto load_h = [&](int tile) {
    const long long of = block.first_token(tile) + h_token;
    const bool mixes = deferred && tile < block.num_tiles && of < tokens;
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      h[k] = mixes ? h_res[(of * N + i + k) * N + j] : float(i + k == j);
    }
  };
  load_h(0);
  // For h_pre of this lane's token and of stream lane % N.
  const auto load_m = [&](int tile) {
    const long long of = block.first_token(tile) + int(token);
    return tile < block.num_tiles && of < tokens ? gates.m[of * kColumns + lane % N] : 0.f;
  };
  float m = NORM ? load_m(0) : 0.f;

  // w of this lane's channels of the next unit.
  constexpr int kWarpUnits = kBoxUnits / kWarps;
  const float* w_at = norm.w + block.first_channel() + first_unit * 16 + lane % 4 * 2;
  float2 next_w[2];
  const auto load_w = [&](int unit) {
    const int next = unit % (kUnits / kWarps);
    const float* at = w_at + next / kWarpUnits * kBoxChannels + next % kWarpUnits * 16;
    next_w[0] = load_pair(at);
    next_w[1] = load_pair(at + 8);
  };
  if constexpr (NORM) load_w(0);

  Ring<kStages> ring;
  PartsRing<NORM> parts(block);
  int group = 0;
#pragma unroll 1
  for (int tile = 0; tile < block.num_tiles; ++tile, ring.next()) {
    wait(block.barrier(kFull, ring.slot), ring.parity);
    const u32 stage = block.stage(ring.slot);
    float dots[2][4] = {};
    // <v, X[i]> and <u, X[i]> of this lane's channels.
    float v_sums[N] = {}, u_sums[N] = {};
    float h_pre[N];
    if constexpr (NORM) {
      const float own = sigmoid(gates.alpha[0] * m + gates.bias[lane % N]) + pre_eps;
      m = load_m(tile + 1);
#pragma unroll
      for (int i = 0; i < N; ++i) h_pre[i] = __shfl_sync(kAllLanes, own, i, N);
    }
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) {
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
              const auto of = [&](u32 v) { return e == 0 ? low_half(v) : high_half(v); };
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
          for (int pair = 0; pair < 2; ++pair) {
            u32 x[4];
            read_matrices(x, from + (x_at ^ flip) + 2 * pair * kPlaneBytes);
            mma(dots[pair], x[0], x[1], x[2], x[3], {d_u[0], d_u[1]});
          }
        }
      }
    }
    // The buffers for parts and replies are free: whoever fills this stage again has seen the reply to what was in it.
    const u32 to = owner + group * kTileTokens;
    const u32 there = in_block(parts.at(block) + part, to);
    const u32 full = in_block(block.barrier(kPartsFull, parts.slot), to);
    if constexpr (NORM) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        v_sums[i] = sum_of_four(v_sums[i]);
        u_sums[i] = sum_of_four(u_sums[i]);
      }
      if (lane % 4 == 0) send(there, {v_sums[0], v_sums[1], v_sums[2], v_sums[3]}, full);
      if (lane % 4 == 1) send(there + parts.kind_bytes, {u_sums[0], u_sums[1], u_sums[2], u_sums[3]}, full);
    } else if (on_diagonal) {
      const bool odd = token % 2;
      const float4 v = {odd ? dots[0][1] : dots[0][0], odd ? dots[0][3] : dots[0][2],
                        odd ? dots[1][1] : dots[1][0], odd ? dots[1][3] : dots[1][2]};
      send(there, v, full);
    }
    const u32 at = block.replies(ring.slot) + h_token * kReplyRow + kHRes + (j * N + i) * sizeof(float);
#pragma unroll
    for (int k = 0; k < kOwn; ++k) write_float(at + k * sizeof(float), h[k]);
    load_h(tile + 1);
    __syncwarp();
    if (lane == 0) arrive(block.barrier(kTableFull, ring.slot));
    if (++group == block.owner_groups()) {
      group = 0;
      parts.next();
    }
  }
}

// ---- owner ------------------------------------------------------------------------------------------

// A sum of float4 over the lanes: x in the lanes 0 to 7, y in 8 to 15 and so on.
__device__ inline float sum_components(float4 v, int lane) {
  const bool upper = lane & 16, odd = lane & 8;
  float a = upper ? v.z : v.x, b = upper ? v.w : v.y;
  a += __shfl_xor_sync(kAllLanes, upper ? v.x : v.z, 16);
  b += __shfl_xor_sync(kAllLanes, upper ? v.y : v.w, 16);
  float sum = (odd ? b : a) + __shfl_xor_sync(kAllLanes, odd ? a : b, 8);
#pragma unroll
  for (int step = 4; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  return sum;
}

// What is known of a token beforehand; lane c has column c.
struct OwnToken {
  float m, r, rho, given;

  __device__ OwnToken(const Gates& gates, const float* rhos, long long token, bool exists, int lane) {
    rho = rhos && exists ? rhos[token] : 0.f;
    m = exists && lane < kColumns ? gates.m[token * kColumns + lane] : 0.f;
    r = exists ? gates.r[token] : 0.f;
    given = 0.f;
    if (exists && lane < N) given = gates.d_h_pre[token * N + lane];
    if (exists && lane >= N && lane < kColumns) given = gates.d_z[token * kColumns + lane];
  }
};

template <bool NORM>
__device__ inline void reply(const Block& block, const Gates& gates, const InputNorm& norm_of_u,
                              int tokens, int hidden, const Settings& settings, int lane) {
  const int gate = (lane >= N) + (lane >= 2 * N);
  const float alpha = lane < kColumns ? gates.alpha[gate] : 0.f;
  const float bias = lane < N ? gates.bias[lane] : 0.f;
  const float over_hidden = reciprocal(hidden);
  const int groups = block.owner_groups(), owned = block.owned();
  const int own_first = block.rank % kTileTokens, own_group = block.rank / kTileTokens;
  // Lane w makes word w of a reply. Words 0 to 23 are pairs of columns.
  const int pair = lane % 12 * 2;
  GateSums sums;

  const auto load = [&](int tile, int k) {
    const long long token = block.first_token(tile) + own_first + k * int(block.ranks);
    const bool exists = tile < block.num_tiles && token < tokens;
    return OwnToken(gates, NORM ? norm_of_u.rho : nullptr, token, exists, lane);
  };
  PartsRing<NORM> parts(block);
  OwnToken next = load(own_group, 0);
#pragma unroll 1
  for (int tile = own_group; tile < block.num_tiles; tile += groups, parts.next()) {
    const u32 full = block.barrier(kPartsFull, parts.slot);
    if (lane == 0) arrive_and_expect(full, parts.slot_bytes);
#pragma unroll 1
    for (int k = 0; k < owned; ++k) {
      const OwnToken own = next;
      const bool last = k + 1 == owned;
      next = load(last ? tile + groups : tile, last ? 0 : k + 1);
      const float z = alpha * own.m + bias;
      const float h = sigmoid(z);
      const float slope = h * sigmoid(-z);
      const float factor = r_factor(settings, own.r, N * hidden);

      if (k == 0) wait_for_cluster(full, parts.parity);
      // Of stream lane % N.
      const auto sum_parts = [&](u32 kind) {
        float4 dots = {};
        const int num_parts = block.ranks * Warps<NORM>::kDot;
#pragma unroll 1
        for (int p = lane; p < num_parts; p += 32) {
          const float4 v = read_float4(parts.at(block) + kind * parts.kind_bytes + (k * num_parts + p) * 16);
          dots = {dots.x + v.x, dots.y + v.y, dots.z + v.z, dots.w + v.w};
        }
        return __shfl_sync(kAllLanes, sum_components(dots, lane), lane % N * 8);
      };
      const float h_pre = __shfl_sync(kAllLanes, h + settings.pre_eps, lane % N);
      float dot = sum_parts(0), f_of_u = 0.f;
      if constexpr (NORM) {
        // <v, u>, then <du, X[i]>
        f_of_u = own.rho * own.rho * own.rho * (sum_of_four(h_pre * dot) * over_hidden);
        dot = own.rho * dot - f_of_u * sum_parts(1);
      }
      const float d_z = lane < N ? (dot + own.given) * slope : own.given;
      const float dm = alpha * d_z;
      const float f = factor * warp_sum(dm * own.m);
      sums.add(d_z, own.m);

      // r dm and what it lost by rounding, in one word, then as pairs of columns.
      const float rdm = own.r * dm;
      const float unit = half_unit(__reduce_max_sync(kAllLanes, magnitude(rdm)));
      u32 rounded[2];
      split(rdm, 0.f, rounded);
      const u32 both = __byte_perm(rounded[0], rounded[1], 0x5410);
      const u32 left = __shfl_sync(kAllLanes, both, pair);
      const u32 right = __shfl_sync(kAllLanes, both, pair + 1);
      u32 word = __byte_perm(left, right, lane < 12 ? 0x5410 : 0x7632);
      if (lane >= 24) word = __float_as_uint(lane < 28 ? h_pre : lane == 28 ? -f : unit);
      if (NORM && lane >= 30) word = __float_as_uint(lane == 30 ? own.rho : -f_of_u);
      float words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        words[w] = __uint_as_float(__shfl_sync(kAllLanes, word, lane % 8 * 4 + w));
      }
      // The replies' ring is that of the tiles.
      const u32 slot = tile % kStages;
      const u32 at = block.replies(slot) + (own_first + k * block.ranks) * kReplyRow + lane % 8 * 16;
#pragma unroll 1
      for (u32 to = lane / 8; to < block.ranks; to += 4) {
        send(in_block(at, to), {words[0], words[1], words[2], words[3]},
             in_block(block.barrier(kReplyFull, slot), to));
      }
    }
  }

  sums.store(gates.sums + (long long)blockIdx.x * (kColumns + 3), lane, [&](int) { return gate; });
}

// ---- main warps -------------------------------------------------------------------------------------

// A fragment of phi: 16 channels and 24 columns, as A of the products. In float16 one part of phi and one of r dm are
// as near as d_x in bfloat16 wants them, and bfloat16 would take two of each.
struct PhiFragment {
  u32 words[6];

  // This lane's elements, from the first on.
  __device__ static void load(float2 (&values)[6], const float* first) {
#pragma unroll
    for (int w = 0; w < 6; ++w) {
      values[w] = *reinterpret_cast<const float2*>(first + w % 2 * 8 * kColumns + w / 2 * 8);
    }
  }
  __device__ void set(const float2 (&values)[6], float scale) {
#pragma unroll
    for (int w = 0; w < 6; ++w) words[w] = half_pair(values[w].x * scale, values[w].y * scale);
  }
  __device__ void write(u32 at) const {
#pragma unroll
    for (int w = 0; w < 6; w += 2) write2(at + w * 128, {words[w], words[w + 1]});
  }
  __device__ void read(u32 at) {
#pragma unroll
    for (int w = 0; w < 6; w += 2) {
      const uint2 v = read2(at + w * 128);
      words[w] = v.x, words[w + 1] = v.y;
    }
  }
};

// The first channel of this thread in a turn; it has the eighth from there on, too. Asks for its place, so that it need not
// be kept in registers meanwhile.
__device__ inline int channel_at(int turn) {
  const u32 thread = thread_id();
  const int warp = thread / 32;
  const int unit = turn * kMainWarps + (turn < kTurns ? warp : warp / 2);
  return cluster_rank() * SIZE + unit * 16 + thread % 32 / 4;
}

// Where this thread's elements of fragment f of phi or d_phi begin; asks for its place, too.
__device__ inline int fragment_at(int f, int hidden) {
  const u32 thread = thread_id();
  const int warp = thread / 32, turn = f / N;
  const int stream = f % N + (turn < kTurns ? 0 : warp % 2 * 2);
  return (stream * hidden + channel_at(turn)) * kColumns + thread % 4 * 2;
}

// A main warp. Lane 4 g + q has the channels g and g + 8 of a unit, and the tokens 2 q and 2 q + 1.
template <bool NORM>
struct Differentiation {
  // Fragments of phi; from this warp's first one in shared memory on.
  PhiFragment held[kHeld > 0 ? kHeld : 1];
  u32 phi_at;
  float d_phi[kSums][3][4];
  InputNorm norm;
  int hidden;
  // Sums for the gradient of w, where there are registers for them: lane 4 g + q has channel g + q % 2 * 8 of one of two
  // turns each.
  float d_w[(kTurns + kShared + 1) / 2];
  // Places of the tile: of X and d_u, and of d_x_in; of the replies from matrix rows of this lane on, and from its
  // first token on.
  u32 stage, d_x_in_at, row_replies, own_replies;

  // A unit, or two streams of it from `first` on, whose fragments are those from F on. `at`: of this lane's matrix
  // row in a pair of streams; where only one is read, of a lane whose row is wanted it is in the first.
  template <int F, int STREAMS>
  __device__ void differentiate(u32 at, int first) {
    // d_u of channels g and g + 8, and where it is normalised the cotangent of u.
    u32 d_u[2] = {};
    float du[2][2];
    if constexpr (NORM) {
      u32 x[2][4];
      read_transposed(x[0], stage + at);
      read_transposed(x[1], stage + 2 * kPlaneBytes + at);
      read_transposed(d_u, stage + kDU + at);
      float d_scale[2] = {};
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float scale = load_single(norm.w + channel_at(F / N) + 8 * c);
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          const auto of = [&](u32 v) { return t == 0 ? low_half(v) : high_half(v); };
          const float4 h = read_float4(own_replies + t * kReplyRow + kHPre);
          const uint2 factors = read2(own_replies + t * kReplyRow + kRho);
          const float rho = __uint_as_float(factors.x), minus_f = __uint_as_float(factors.y), g = of(d_u[c]);
          const float u = h.x * of(x[0][c]) + h.y * of(x[0][2 + c]) + h.z * of(x[1][c]) + h.w * of(x[1][2 + c]);
          d_scale[c] += g * (rho * u);
          du[c][t] = rho * (scale * g) + minus_f * u;
        }
      }
      const u32 q = lane_id() % 4;
      float sum = q % 2 ? d_scale[1] : d_scale[0];
      sum += __shfl_xor_sync(kAllLanes, q % 2 ? d_scale[0] : d_scale[1], 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      constexpr int kTurn = F / N;
      if constexpr (kHoldsDW) {
        if (q / 2 == kTurn % 2) d_w[kTurn / 2] += sum;
      } else if (q < 2 && first == 0) {
        // Of two warps that share a unit the first.
        *d_w_at(kTurn) += sum;
      }
    }
    const auto cotangent = [&](int c, int t) {
      if constexpr (NORM) {
        return du[c][t];
      } else {
        return t == 0 ? low_half(d_u[c]) : high_half(d_u[c]);
      }
    };
    // r dm and the rest of it; and both in one as B of phi dm: k is a column.
    u32 dm[4], more_dm[2];
    read_matrices(dm, row_replies);
    read_matrices(more_dm, row_replies + 64);
    const u32 column_replies = own_replies + (lane_id() / 4 - lane_id() % 4 * 2) * kReplyRow;
    const float scale = inverse_of_unit(read_float(column_replies + kUnit));
    const u32 half_dm[3] = {half_pair(dm[0], dm[3], scale), half_pair(dm[1], more_dm[0], scale),
                            half_pair(dm[2], more_dm[1], scale)};
    const float unit_of_phi = read_float(phi_unit());
    u32 d_x_in[2][4];
    if constexpr (!NORM) read_transposed(d_u, stage + kDU + at);
    read_transposed(d_x_in[0], d_x_in_at + at);
    read_transposed(d_x_in[1], d_x_in_at + 2 * kPlaneBytes + at);
    // The other warp of a shared unit writes what this one reads.
    if constexpr (STREAMS < N) wait_for_partner();
    const u32 first_at = at + first * kPlaneBytes;
    const u32 first_replies = own_replies + first * sizeof(float), first_h = own_replies + kHRes + first * 16;
#pragma unroll
    for (int s = 0; s < STREAMS; s += 2) {
      u32 x[4], d_x[4];
      read_transposed(x, stage + first_at + s * kPlaneBytes);
#pragma unroll
      for (int j = s; j < s + 2; ++j) {
        const u32 x0 = x[j % 2 * 2], x1 = x[j % 2 * 2 + 1];
        PhiFragment p;
        if (F + j < kHeld) {
          p = held[F + j < kHeld ? F + j : 0];
        } else {
          p.read(phi() + (F + j - kHeld) * kMainWarps * kFragmentBytes);
        }
        float sums[4] = {};
        mma_half(sums, p.words, half_dm);
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          const auto of = [&](u32 v) { return t == 0 ? low_half(v) : high_half(v); };
          const float h_pre = read_float(first_replies + t * kReplyRow + kHPre + 4 * j);
          const uint2 factors = read2(own_replies + t * kReplyRow + kMinusF);
          const float minus_f = __uint_as_float(factors.x), unit = unit_of_phi * __uint_as_float(factors.y);
          const float4 h = read_float4(first_h + t * kReplyRow + j * 16);
          sums[t] = unit * sums[t] + h_pre * cotangent(0, t) + minus_f * of(x0);
          sums[2 + t] = unit * sums[2 + t] + h_pre * cotangent(1, t) + minus_f * of(x1);
          const float hs[N] = {h.x, h.y, h.z, h.w};
#pragma unroll
          for (int i = 0; i < N; ++i) {
            sums[t] += hs[i] * of(d_x_in[i / 2][i % 2 * 2]);
            sums[2 + t] += hs[i] * of(d_x_in[i / 2][i % 2 * 2 + 1]);
          }
        }
        d_x[j % 2 * 2] = pair(sums[0], sums[1]);
        d_x[j % 2 * 2 + 1] = pair(sums[2], sums[3]);
      }
      write_transposed(d_x_in_at + first_at + s * kPlaneBytes, d_x);
    }
    // The same as B of X^T dm: k is a token. X is read again, which takes fewer registers.
    read_transposed(dm, row_replies);
    read_transposed(more_dm, row_replies + 64);
#pragma unroll
    for (int s = 0; s < STREAMS; s += 2) {
      u32 x[4];
      read_transposed(x, stage + first_at + s * kPlaneBytes);
#pragma unroll
      for (int j = s; j < s + 2; ++j) {
        const u32 x0 = x[j % 2 * 2], x1 = x[j % 2 * 2 + 1];
        const auto add = [&](float(&sums)[3][4]) {
          mma(sums[0], x0, x1, x0, x1, {dm[0], dm[3]});
          mma(sums[1], x0, x1, x0, x1, {dm[1], more_dm[0]});
          mma(sums[2], x0, x1, x0, x1, {dm[2], more_dm[1]});
        };
        if (F + j < kSums) {
          add(d_phi[F + j < kSums ? F + j : 0]);
        } else {
          float sums[3][4];
          read_sums(sums);
          add(sums);
          write_sums(sums);
        }
      }
    }
  }

  // What of `norm.d_w` lane 4 g + q, q < 2, adds up in a turn.
  __device__ float* d_w_at(int turn) const {
    return norm.d_w + (cluster_id() * u32(hidden) + u32(channel_at(turn)) + lane_id() % 2 * 8);
  }

  __device__ void write_d_w(int lane) const {
#pragma unroll
    for (int turn = 0; turn < kTurns + kShared; ++turn) {
      // Both warps of a shared unit write the same.
      if (lane % 4 / 2 == turn % 2) *d_w_at(turn) = d_w[turn / 2];
    }
  }

  // The same as phi_at; asked for again where the norm leaves no register for it.
  __device__ u32 phi() const {
    if constexpr (!NORM || kHoldsDW) return phi_at;
    const u32 thread = thread_id();
    return shared_address(shared) + kPhi + thread / 32 * kFragmentBytes + thread % 32 * 8;
  }

  // Asks for its place like `fragment_at`.
  __device__ static u32 phi_unit() {
    const u32 thread = thread_id();
    return shared_address(shared) + kPhiUnits + thread / 32 * sizeof(float);
  }

  // Asks for its place like `fragment_at`.
  __device__ static u32 sums_at() {
    const u32 thread = thread_id();
    return shared_address(shared) + kSumsAt + thread / 32 * kSumsBytes + thread % 32 * 16;
  }
  __device__ static void read_sums(float (&sums)[3][4]) {
    const u32 at = sums_at();
#pragma unroll
    for (int octet = 0; octet < 3; ++octet) {
      const float4 v = read_float4(at + octet * 512);
      sums[octet][0] = v.x, sums[octet][1] = v.y, sums[octet][2] = v.z, sums[octet][3] = v.w;
    }
  }
  __device__ static void write_sums(const float (&sums)[3][4]) {
    const u32 at = sums_at();
#pragma unroll
    for (int octet = 0; octet < 3; ++octet) {
      const float(&s)[4] = sums[octet];
      write_float4(at + octet * 512, {s[0], s[1], s[2], s[3]});
    }
  }

  __device__ static void wait_for_partner() {
    asm volatile("bar.sync %0, 64;" ::"r"(1 + threadIdx.x / 64) : "memory");
  }

  template <int TURN>
  __device__ void take_turns(u32 at) {
    constexpr u32 kTurnBytes = kMainWarps / kBoxUnits * kBoxBytes;
    if constexpr (TURN < kTurns) {
      differentiate<TURN * N, N>(at + TURN * kTurnBytes, 0);
      take_turns<TURN + 1>(at);
    }
  }
};

template <bool NORM>
__device__ inline void differentiate_tiles(const Block& block, const float* phi, float* d_phi_partial,
                                           const InputNorm& norm, int hidden, int warp, int lane) {
  Differentiation<NORM> main;
  main.phi_at = block.shared + kPhi + warp * kFragmentBytes + lane * 8;
  // All of it at once, before the sums need the registers.
  float2 values[kFragments][6];
  u32 largest = 0;
#pragma unroll
  for (int f = 0; f < kFragments; ++f) PhiFragment::load(values[f], phi + fragment_at(f, hidden));
#pragma unroll
  for (int w = 0; w < kFragments * 6; ++w) {
    const float2 v = values[w / 6][w % 6];
    largest = max(largest, max(magnitude(v.x), magnitude(v.y)));
  }
  const float unit = half_unit(__reduce_max_sync(kAllLanes, largest)), scale = inverse_of_unit(unit);
  write_float(main.phi_unit(), unit);
#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
    PhiFragment fragment;
    fragment.set(values[f], scale);
    if (f < kHeld) {
      main.held[f < kHeld ? f : 0] = fragment;
    } else {
      fragment.write(main.phi_at + (f - kHeld) * kMainWarps * kFragmentBytes);
    }
  }
#pragma unroll
  for (int e = 0; e < kSums * 12; ++e) main.d_phi[e / 12][e / 4 % 3][e % 4] = 0.f;
  if constexpr (NORM) {
    main.norm = norm, main.hidden = hidden;
#pragma unroll
    for (float& sum : main.d_w) sum = 0.f;
    if constexpr (!kHoldsDW) main.write_d_w(lane);
  }
  if constexpr (kSumsInShared > 0) main.write_sums({});
  __syncwarp();
  if (lane == 0) arrive(block.barrier(kPhiRead, 0));
  cluster_wait();

#pragma unroll 1
  for (int tile = 0; tile < block.num_tiles; ++tile) {
    // From the number of the tile, so that it is all that has to be kept.
    const u32 slot = tile % kStages, parity = tile / kStages % 2;
    const u32 d_x_in_slot = tile % kDXInSlots, d_x_in_parity = tile / kDXInSlots % 2;
    if (warp == 0 && lane == 0) {
      arrive_and_expect(block.barrier(kReplyFull, slot), kTileTokens * kHRes);
    }
    wait(block.barrier(kFull, slot), parity);
    wait(block.barrier(kTableFull, slot), parity);
    wait(block.barrier(kDXInFull, d_x_in_slot), d_x_in_parity);
    wait_for_cluster(block.barrier(kReplyFull, slot), parity);
    main.stage = block.stage(slot), main.d_x_in_at = block.d_x_in_at(d_x_in_slot);
    const u32 replies = block.replies(slot);
    // Asked for again, like all that can be.
    const u32 lane = lane_id(), q = lane % 4, matrix = lane / 8, row = lane % 8;
    main.row_replies = replies + row * kReplyRow + matrix * 16, main.own_replies = replies + 2 * q * kReplyRow;
    // Of a pair of streams: the matrices of the first, then those of the second.
    const auto pair_at = [&](int unit) {
      return matrix / 2 * kPlaneBytes + swizzled(row, unit % kBoxUnits * 2 + matrix % 2) +
             unit / kBoxUnits * kBoxBytes;
    };
    main.template take_turns<0>(pair_at(warp));
    if constexpr (kShared) {
      main.template differentiate<kTurns * N, 2>(pair_at(kTurns * kMainWarps + warp / 2), warp % 2 * 2);
    }
    fence_for_copies();
    __syncwarp();
    if (lane == 0) arrive(block.barrier(kDone, slot));
  }

  // [clusters, n C, kColumns], for sum_gradients
  float* partial = d_phi_partial + (long long)cluster_id() * N * hidden * kColumns;
  float last[3][4] = {};
  if constexpr (kSumsInShared > 0) main.read_sums(last);
#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
    float* out = partial + fragment_at(f, hidden);
#pragma unroll
    for (int octet = 0; octet < 3; ++octet) {
      const float(&d)[4] = (f < kSums ? main.d_phi[f < kSums ? f : 0] : last)[octet];
      *reinterpret_cast<float2*>(out + octet * 8) = {d[0], d[1]};
      *reinterpret_cast<float2*>(out + 8 * kColumns + octet * 8) = {d[2], d[3]};
    }
  }
  if constexpr (NORM && kHoldsDW) main.write_d_w(lane);
}

struct Maps {
  const TensorMap &x, &d_u, &d_x_in, &d_x;
};

template <bool NORM>
__device__ inline void differentiate_all(const Maps& maps, const Gates& gates, const InputNorm& norm,
                                         const float* phi, const float* h_res, float* d_phi_partial,
                                         int tokens, int hidden, int deferred, const Settings& settings) {
  using Roles = Warps<NORM>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Block block(shared, tokens);

  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      init_barrier(block.barrier(kFull, s), 1);
      init_barrier(block.barrier(kDone, s), kMainWarps);
      init_barrier(block.barrier(kPartsFull, s), 1);
      init_barrier(block.barrier(kReplyFull, s), 1);
      init_barrier(block.barrier(kTableFull, s), Roles::kDot);
    }
    for (int s = 0; s < kDXInSlots; ++s) init_barrier(block.barrier(kDXInFull, s), 1);
    init_barrier(block.barrier(kPhiRead, 0), kMainWarps);
    publish_barriers();
  }
  start_cluster();

  // Each task asks for its block again, so that none keeps in registers what only others want.
  if (warp < kMainWarps) {
    take_registers<Roles::kMainRegisters>();
    const Block block(shared, tokens);
    differentiate_tiles<NORM>(block, phi, d_phi_partial, norm, hidden, warp, lane);
  } else {
    // The dot warps may be a group of their own.
    if (Roles::kDot % 4 == 0 && warp < Roles::kLoader) {
      give_registers<Roles::kDotRegisters>();
      const Block block(shared, tokens);
      multiply_tiles<NORM>(block, h_res, gates, norm, tokens, deferred, settings.pre_eps, warp - kMainWarps, lane);
    } else {
      give_registers<Roles::kOtherRegisters>();
      const Block block(shared, tokens);
      if (warp < Roles::kLoader) {
        multiply_tiles<NORM>(block, h_res, gates, norm, tokens, deferred, settings.pre_eps, warp - kMainWarps, lane);
      } else {
        cluster_wait();
      }
      if (warp == Roles::kOwner) {
        reply<NORM>(block, gates, norm, tokens, hidden, settings, lane);
      } else if (warp == Roles::kLoader && lane == 0) {
        copy_tiles(block, maps.x, maps.d_u, maps.d_x_in, maps.d_x);
      }
    }
  }
  end_cluster();
}

// d_z: [tokens, kColumns], of which those of h_pre are not read. d_x may be d_x_in.
KERNEL(pre_bwd_one_pass, Warps<false>::kThreads, 1)
(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap d_u,
 const __grid_constant__ TensorMap d_x_in, const __grid_constant__ TensorMap d_x, const float* phi,
 const float* alpha, const float* bias, const float* m, const float* r, const float* h_res,
 const float* d_h_pre, const float* d_z, float* d_phi_partial, float* gate_sums, int tokens,
 int hidden, int deferred, Settings settings) {
  differentiate_all<false>({x, d_u, d_x_in, d_x}, {alpha, bias, m, r, d_h_pre, d_z, gate_sums}, {}, phi, h_res,
                           d_phi_partial, tokens, hidden, deferred, settings);
}

// The same where the layer's input is normalised. With 384 channels it would spill registers.
#if SIZE != 384
KERNEL(pre_norm_bwd_one_pass, Warps<true>::kThreads, 1)
(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap d_u,
 const __grid_constant__ TensorMap d_x_in, const __grid_constant__ TensorMap d_x, const float* phi,
 const float* alpha, const float* bias, const float* m, const float* r, const float* h_res,
 const float* d_h_pre, const float* d_z, float* d_phi_partial, float* gate_sums, int tokens,
 int hidden, int deferred, Settings settings, const float* w, const float* rho, float* d_w_partial) {
  differentiate_all<true>({x, d_u, d_x_in, d_x}, {alpha, bias, m, r, d_h_pre, d_z, gate_sums}, {w, rho, d_w_partial},
                          phi, h_res, d_phi_partial, tokens, hidden, deferred, settings);
}
#endif
