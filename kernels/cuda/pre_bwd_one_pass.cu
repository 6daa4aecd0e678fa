// The backward pass of pre in one pass over X, d_u and the cotangent of the X that was handed on (n = 4):
//
//   d_h_pre[i] += <d_u, X[i]>
//   d_z         from d_h_pre; that of the other coefficients is there already (gates_bwd.cu)
//   dm          = alpha d_z
//   d_x[j]      = sum over i of h_res[i, j] d_x_in[i] + h_pre[j] d_u + (r dm) phi^T - f X[j]
//   d_phi       = sum over tokens of vec(X)^T (r dm)
//
// The tasks of the warps, and the order in which a tile meets them:
//
//   copier        X and d_u to a buffer, and d_x_in to another one
//   dot warps     this block's part of <d_u, X[i]>, to the block that owns the token; h_res as main warps want it
//   owner         the sum of these parts; r dm, h_pre and f, to all blocks
//   main warps    d_x in place of d_x_in, and the sums for d_phi, which stay where they are until the end
//   copier        d_x to memory
//
// X may have more buffers than d_x_in, which is not wanted before the answer is there.
//
// Whatever belongs to a token stays within it, so that one with no number in it does not spoil others.

#include "coefficients.cuh"
#include "one_pass.cuh"

constexpr int N = 4;
constexpr int kColumns = N * (N + 2);
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
  int stages, changes;
  // Fragments of phi that a main warp has in registers; the others are in shared memory.
  int held;
};
constexpr Plan kPlan = SIZE == 256   ? Plan{5, 5, 4}
                       : SIZE == 320 ? Plan{3, 3, 0}
                       : SIZE == 384 ? Plan{3, 2, 0}
                                     : Plan{2, 2, 0};
constexpr int kStages = kPlan.stages, kChanges = kPlan.changes, kHeld = kPlan.held;
// Two buffers are too few to hide how long memory takes. Then a tile goes to the L2 cache before there is room for it.
constexpr bool kPrefetch = kStages < 3;
// Fragments of d_phi whose sums a main warp has in shared memory, as 14 do not fit into its registers.
constexpr int kSumsInShared = SIZE == 448 ? 1 : 0, kSums = kFragments - kSumsInShared;

// Registers are handed on by groups of four warps. Two dot warps take longer than four, but leave more registers to
// the main warps.
constexpr int kDotWarps = SIZE == 256 ? 4 : 2;
constexpr int kMainRegisters = kDotWarps == 2 ? 216 : 200;
constexpr int kDotRegisters = kDotWarps == 2 ? 72 : 48, kOtherRegisters = kDotWarps == 2 ? 72 : 64;
constexpr int kCopier = kMainWarps + kDotWarps, kOwner = kCopier + 1;
constexpr int kThreads = 32 * (kMainWarps + (kDotWarps + 2 + 3) / 4 * 4);

// ---- shared memory ----------------------------------------------------------------------------------

// A plane a stream: X and d_u; d_x_in.
constexpr u32 kPlaneBytes = SIZE * kTileTokens * sizeof(Stream);
constexpr u32 kBoxBytes = kTileTokens * kRowBytes;
constexpr u32 kDU = N * kPlaneBytes, kStageBytes = kDU + kPlaneBytes;
constexpr u32 kChangeBytes = N * kPlaneBytes;
constexpr u32 kBoxUnits = kBoxChannels / 16, kUnitBytes = 32;
// Of one fragment of phi (f16), and of d_phi.
constexpr u32 kFragmentBytes = 32 * 24, kSumsBytes = 32 * 48;
constexpr u32 kPhiBytes = kMainWarps * (kFragments - kHeld) * kFragmentBytes;
// What main warps want to know of a tile, a row a token: r dm, what r dm lost by rounding (bf16, 24 each), h_pre, -f
// and the unit of r dm (`half_unit`), all of these from the owner; the transpose of h_res. The padding keeps the rows in different banks.
constexpr u32 kHPre = 96, kMinusF = 112, kUnit = kMinusF + 4, kHRes = 128;
constexpr u32 kNoteRow = kHRes + N * N * sizeof(float) + 16;
constexpr u32 kNotesBytes = kTileTokens * kNoteRow;
// The parts of the dot products of one token from one block: a float4 a dot warp.
constexpr u32 kPartBytes = kDotWarps * 16;
// Clusters of 16 have owners for two tiles, so that half as many buffers do.
constexpr u32 kPartsBytes = (kStages + 1) / 2 * 16 * kPartBytes;

// As many buffers for d_x_in as for X lie among these: one address is enough.
constexpr u32 kChange = kStages * kStageBytes;
constexpr u32 kPhi = kChange + kChanges * kChangeBytes;
constexpr u32 kSumsAt = kPhi + kPhiBytes;
constexpr u32 kNotes = kSumsAt + kMainWarps * kSumsInShared * kSumsBytes;
constexpr u32 kParts = kNotes + kStages * kNotesBytes;
constexpr u32 kBarriers = kParts + kPartsBytes;
// Barriers: of each buffer, and that phi has been read.
constexpr u32 kFull = kBarriers, kDone = kFull + 8 * kStages, kPartsFull = kDone + 8 * kStages,
              kAnswerFull = kPartsFull + 8 * kStages, kTableFull = kAnswerFull + 8 * kStages,
              kChangeFull = kTableFull + 8 * kStages, kPhiRead = kChangeFull + 8 * kChanges;
// Of phi in a main warp's fragments (`half_unit`).
constexpr u32 kPhiUnits = kPhiRead + 8;
constexpr u32 kSharedBytes = kPhiUnits + kMainWarps * sizeof(float);
// The plan of a call (one_pass/pre_bwd.rs) has the same numbers.
static_assert(SIZE != 256 || (kSharedBytes == 220568 && kThreads == 512));
static_assert(SIZE != 320 || (kSharedBytes == 205880 && kThreads == 384));
static_assert(SIZE != 384 || (kSharedBytes == 221232 && kThreads == 384));
static_assert(SIZE != 448 || (kSharedBytes == 231304 && kThreads == 384));

extern __shared__ __align__(1024) unsigned char shared[];

// What all warps of a block know.
struct Block {
  u32 shared;
  u32 rank, cluster;
  int first_tile, tile_step, num_tiles;

  __device__ Block(const unsigned char* shared_bytes, int tokens)
      : shared(shared_address(shared_bytes)), rank(cluster_rank()), cluster(cluster_size()) {
    first_tile = blockIdx.x / cluster;
    tile_step = gridDim.x / cluster;
    const int all_tiles = (tokens + int(kTileTokens) - 1) / int(kTileTokens);
    num_tiles = (all_tiles - first_tile + tile_step - 1) / tile_step;
  }

  __device__ int first_token(int tile) const {
    return (first_tile + tile * tile_step) * int(kTileTokens);
  }
  __device__ u32 stage(u32 slot) const {
    return shared + slot * (kStages == kChanges ? kStageBytes + kChangeBytes : kStageBytes);
  }
  __device__ u32 change(u32 slot) const {
    return kStages == kChanges ? stage(slot) + kStageBytes : shared + kChange + slot * kChangeBytes;
  }
  __device__ u32 notes(u32 slot) const { return shared + kNotes + slot * kNotesBytes; }
  __device__ u32 barrier(u32 which, u32 slot) const { return shared + which + 8 * slot; }

  // Token t of a tile is owned by block t % cluster; of clusters of 16 the blocks 0 to 7 own those of even tiles and
  // the others those of odd ones.
  __device__ u32 owned() const { return cluster < kTileTokens ? kTileTokens / cluster : 1; }
  __device__ int owner_groups() const { return cluster > kTileTokens ? cluster / kTileTokens : 1; }
};

// The ring of buffers for parts of the dot products.
struct PartsRing {
  u32 slots, slot_bytes;
  u32 slot = 0, parity = 0;

  __device__ PartsRing(const Block& block)
      : slots(block.owner_groups() > 1 ? (kStages + 1) / 2 : kStages),
        slot_bytes(block.owned() * block.cluster * kPartBytes) {}
  __device__ u32 at(const Block& block) const { return block.shared + kParts + slot * slot_bytes; }
  __device__ void next() {
    if (++slot == slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// ---- copier -----------------------------------------------------------------------------------------

__device__ inline void copy_tiles(const Block& block, const TensorMap& x, const TensorMap& d_u,
                                  const TensorMap& d_x_in, const TensorMap& d_x) {
  const u64 policy = evict_first();
  const int box = block.rank * (SIZE / kBoxChannels);
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
  const auto load_change = [&](int tile, u32 slot) {
    if (tile >= block.num_tiles) return;
    const u32 full = block.barrier(kChangeFull, slot);
    arrive_and_expect(full, kChangeBytes);
    copy_in(block.change(slot), d_x_in, block.first_token(tile), box, 0, full, policy);
    if (kPrefetch && tile + kChanges < block.num_tiles) {
      prefetch(d_x_in, block.first_token(tile + kChanges), box, 0);
    }
  };
  load(0, 0);
  // phi comes next: everybody waits for it.
  wait(block.barrier(kPhiRead, 0), 0);
  load_change(0, 0);
#pragma unroll 1
  for (int tile = 1; tile < kStages; ++tile) {
    load(tile, tile);
    if (tile < kChanges) load_change(tile, tile);
  }
  Ring<kStages> ring;
  Ring<kChanges> changes;
#pragma unroll 1
  for (int tile = 0; tile < block.num_tiles; ++tile, ring.next(), changes.next()) {
    wait(block.barrier(kDone, ring.slot), ring.parity);
    load(tile + kStages, ring.slot);
    copy_out(d_x, block.first_token(tile), box, 0, block.change(changes.slot));
    commit_copies();
    wait_for_reads<0>();
    load_change(tile + kChanges, changes.slot);
  }
  finish_copies();
}

// ---- dot warps --------------------------------------------------------------------------------------

// <d_u, X[i]> is the diagonal of the product of both tiles. A dot warp has some units of every box, and h_res of some
// tokens: its transpose, or the unit matrix where d_x_in is not to be mixed.
__device__ inline void multiply_tiles(const Block& block, const float* h_res, int tokens, bool deferred,
                                      int warp, int lane) {
  cluster_wait();
  const u32 matrix = lane / 8, row = lane % 8;
  const u32 first_unit = warp * (kBoxUnits / kDotWarps);
  const u32 x_at = matrix % 2 * kPlaneBytes + swizzled(row, 2 * first_unit + matrix / 2);
  const u32 d_u_at = kDU + swizzled(row, 2 * first_unit + matrix % 2);
  // The token whose diagonal element this lane has, if any.
  const u32 token = lane / 4;
  const bool on_diagonal = token / 2 == lane % 4;
  const u32 owner = token % block.cluster;
  const u32 part = (token / block.cluster * block.cluster + block.rank) * kPartBytes + warp * 16;

  // Neighbours in row j of the transpose.
  constexpr int kOwn = N * N * int(kTileTokens) / (32 * kDotWarps);
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

  Ring<kStages> ring;
  PartsRing parts(block);
  int group = 0;
#pragma unroll 1
  for (int tile = 0; tile < block.num_tiles; ++tile, ring.next()) {
    wait(block.barrier(kFull, ring.slot), ring.parity);
    const u32 stage = block.stage(ring.slot);
    float dots[2][4] = {};
#pragma unroll
    for (int box = 0; box < SIZE / kBoxChannels; ++box) {
#pragma unroll
      for (int unit = 0; unit < kBoxUnits / kDotWarps; ++unit) {
        // Swizzling is an exclusive or.
        const u32 from = stage + box * kBoxBytes, flip = unit * kUnitBytes;
        u32 d_u[2];
        read_matrices(d_u, from + (d_u_at ^ flip));
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          u32 x[4];
          read_matrices(x, from + (x_at ^ flip) + 2 * pair * kPlaneBytes);
          mma(dots[pair], x[0], x[1], x[2], x[3], {d_u[0], d_u[1]});
        }
      }
    }
    // The buffers for parts and notes are free: whoever fills this stage again has seen the answer to what was in it.
    if (on_diagonal) {
      const bool odd = token % 2;
      const float4 v = {odd ? dots[0][1] : dots[0][0], odd ? dots[0][3] : dots[0][2],
                        odd ? dots[1][1] : dots[1][0], odd ? dots[1][3] : dots[1][2]};
      const u32 to = owner + group * kTileTokens;
      send(in_block(parts.at(block) + part, to), v, in_block(block.barrier(kPartsFull, parts.slot), to));
    }
    const u32 at = block.notes(ring.slot) + h_token * kNoteRow + kHRes + (j * N + i) * sizeof(float);
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

struct Gates {
  const float *alpha, *bias, *m, *r, *d_h_pre, *d_z;
  // [blocks, kColumns + 3], for sum_gradients
  float* sums;
};

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
  float m, r, given;

  __device__ OwnToken(const Gates& gates, long long token, bool exists, int lane) {
    m = exists && lane < kColumns ? gates.m[token * kColumns + lane] : 0.f;
    r = exists ? gates.r[token] : 0.f;
    given = 0.f;
    if (exists && lane < N) given = gates.d_h_pre[token * N + lane];
    if (exists && lane >= N && lane < kColumns) given = gates.d_z[token * kColumns + lane];
  }
};

__device__ inline void answer(const Block& block, const Gates& gates, int tokens, int hidden,
                              const Settings& settings, int lane) {
  const int gate = (lane >= N) + (lane >= 2 * N);
  const float alpha = lane < kColumns ? gates.alpha[gate] : 0.f;
  const float bias = lane < N ? gates.bias[lane] : 0.f;
  const int groups = block.owner_groups(), owned = block.owned();
  const int own_first = block.rank % kTileTokens, own_group = block.rank / kTileTokens;
  // Of the words of an answer lane w makes word w. 0 to 23 are pairs of columns.
  const int pair = lane % 12 * 2;
  float sum_d_z = 0.f, sum_d_z_m = 0.f;

  const auto load = [&](int tile, int k) {
    const long long token = block.first_token(tile) + own_first + k * int(block.cluster);
    return OwnToken(gates, token, tile < block.num_tiles && token < tokens, lane);
  };
  PartsRing parts(block);
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
      const float norm = norm_factor(settings, own.r, N * hidden);

      if (k == 0) wait_for_cluster(full, parts.parity);
      float4 dots = {};
      const int num_parts = block.cluster * kDotWarps;
#pragma unroll 1
      for (int p = lane; p < num_parts; p += 32) {
        const float4 v = read_float4(parts.at(block) + (k * num_parts + p) * 16);
        dots = {dots.x + v.x, dots.y + v.y, dots.z + v.z, dots.w + v.w};
      }
      const float dot = __shfl_sync(kAllLanes, sum_components(dots, lane), lane % N * 8);
      const float d_z = lane < N ? (dot + own.given) * slope : own.given;
      const float dm = alpha * d_z;
      const float f = norm * warp_sum(dm * own.m);
      sum_d_z += d_z;
      sum_d_z_m += d_z * own.m;

      // r dm and what it lost by rounding, in one word, then as pairs of columns.
      const float rdm = own.r * dm;
      const float unit = half_unit(__reduce_max_sync(kAllLanes, magnitude(rdm)));
      u32 rounded[2];
      split(rdm, 0.f, rounded);
      const u32 both = __byte_perm(rounded[0], rounded[1], 0x5410);
      const u32 left = __shfl_sync(kAllLanes, both, pair);
      const u32 right = __shfl_sync(kAllLanes, both, pair + 1);
      const u32 h_pre = __shfl_sync(kAllLanes, __float_as_uint(h + settings.pre_eps), lane % N);
      u32 word = __byte_perm(left, right, lane < 12 ? 0x5410 : 0x7632);
      if (lane >= 24) word = lane < 28 ? h_pre : __float_as_uint(lane == 28 ? -f : unit);
      float words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        words[w] = __uint_as_float(__shfl_sync(kAllLanes, word, lane % 8 * 4 + w));
      }
      // The answers' ring is that of the tiles.
      const u32 slot = tile % kStages;
      const u32 at = block.notes(slot) + (own_first + k * block.cluster) * kNoteRow + lane % 8 * 16;
#pragma unroll 1
      for (u32 to = lane / 8; to < block.cluster; to += 4) {
        send(in_block(at, to), {words[0], words[1], words[2], words[3]},
             in_block(block.barrier(kAnswerFull, slot), to));
      }
    }
  }

  float* row = gates.sums + (long long)blockIdx.x * (kColumns + 3);
  if (lane < kColumns) row[lane] = sum_d_z;
#pragma unroll
  for (int g = 0; g < 3; ++g) {
    const float sum = warp_sum(lane < kColumns && gate == g ? sum_d_z_m : 0.f);
    if (lane == 0) row[kColumns + g] = sum;
  }
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

// Asks for it, so that it need not be kept in a register meanwhile.
__device__ inline u32 lane_id() {
  u32 lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

__device__ inline float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ inline float high(u32 pair) { return __uint_as_float(pair & 0xffff0000); }

// Where this thread's elements of fragment f of phi or d_phi begin. Asks for its place, so that it need not be kept
// in registers meanwhile.
__device__ inline int fragment_at(int f, int hidden) {
  u32 thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  const int warp = thread / 32, turn = f / N;
  const int unit = turn * kMainWarps + (turn < kTurns ? warp : warp / 2);
  const int stream = f % N + (turn < kTurns ? 0 : warp % 2 * 2);
  const int channel = cluster_rank() * SIZE + unit * 16 + thread % 32 / 4;
  return (stream * hidden + channel) * kColumns + thread % 4 * 2;
}

// A main warp. Lane 4 g + q has the channels g and g + 8 of a unit, and the tokens 2 q and 2 q + 1.
struct Differentiation {
  // Fragments of phi; from this warp's first one in shared memory on.
  PhiFragment held[kHeld > 0 ? kHeld : 1];
  u32 phi_at;
  float d_phi[kSums][3][4];
  // Of the tile: X and d_u, d_x_in; the notes from matrix rows of this lane on, and from its first token on.
  u32 stage, change, row_notes, own_notes;

  // A unit, or two streams of it from `first` on, whose fragments are those from F on. `at`: of this lane's matrix
  // row in a pair of streams; where only one is read, of a lane whose row is wanted it is in the first.
  template <int F, int STREAMS>
  __device__ void differentiate(u32 at, int first) {
    // r dm and the rest of it; and both in one as B of phi dm: k is a column.
    u32 dm[4], more_dm[2];
    read_matrices(dm, row_notes);
    read_matrices(more_dm, row_notes + 64);
    const u32 column_notes = own_notes + (lane_id() / 4 - lane_id() % 4 * 2) * kNoteRow;
    const float scale = inverse_of_unit(read_float(column_notes + kUnit));
    const u32 half_dm[3] = {half_pair(dm[0], dm[3], scale), half_pair(dm[1], more_dm[0], scale),
                            half_pair(dm[2], more_dm[1], scale)};
    const float unit_of_phi = read_float(phi_unit());
    u32 d_u[2], d_x_in[2][4];
    read_transposed(d_u, stage + kDU + at);
    read_transposed(d_x_in[0], change + at);
    read_transposed(d_x_in[1], change + 2 * kPlaneBytes + at);
    // The other warp of a shared unit writes what this one reads.
    if constexpr (STREAMS < N) wait_for_partner();
    const u32 first_at = at + first * kPlaneBytes;
    const u32 first_notes = own_notes + first * sizeof(float), first_h = own_notes + kHRes + first * 16;
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
          p.read(phi_at + (F + j - kHeld) * kMainWarps * kFragmentBytes);
        }
        float sums[4] = {};
        mma_half(sums, p.words, half_dm);
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          const auto of = [&](u32 v) { return t == 0 ? low(v) : high(v); };
          const float h_pre = read_float(first_notes + t * kNoteRow + kHPre + 4 * j);
          const uint2 factors = read2(own_notes + t * kNoteRow + kMinusF);
          const float minus_f = __uint_as_float(factors.x), unit = unit_of_phi * __uint_as_float(factors.y);
          const float4 h = read_float4(first_h + t * kNoteRow + j * 16);
          sums[t] = unit * sums[t] + h_pre * of(d_u[0]) + minus_f * of(x0);
          sums[2 + t] = unit * sums[2 + t] + h_pre * of(d_u[1]) + minus_f * of(x1);
          const float hs[N] = {h.x, h.y, h.z, h.w};
#pragma unroll
          for (int i = 0; i < N; ++i) {
            sums[t] += hs[i] * of(d_x_in[i / 2][i % 2 * 2]);
            sums[2 + t] += hs[i] * of(d_x_in[i / 2][i % 2 * 2 + 1]);
          }
        }
        d_x[j % 2 * 2] = pair_of((Stream*)nullptr, sums[0], sums[1]);
        d_x[j % 2 * 2 + 1] = pair_of((Stream*)nullptr, sums[2], sums[3]);
      }
      write_transposed(change + first_at + s * kPlaneBytes, d_x);
    }
    // The same as B of X^T dm: k is a token. X is read again, which takes fewer registers.
    read_transposed(dm, row_notes);
    read_transposed(more_dm, row_notes + 64);
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

  // Asks for its place like `fragment_at`.
  __device__ static u32 phi_unit() {
    u32 thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return shared_address(shared) + kPhiUnits + thread / 32 * sizeof(float);
  }

  // Asks for its place like `fragment_at`.
  __device__ static u32 sums_at() {
    u32 thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
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

__device__ inline void differentiate_tiles(const Block& block, const float* phi, float* d_phi_partial,
                                           int hidden, int warp, int lane) {
  Differentiation main;
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
  if constexpr (kSumsInShared > 0) main.write_sums({});
  __syncwarp();
  if (lane == 0) arrive(block.barrier(kPhiRead, 0));
  cluster_wait();

#pragma unroll 1
  for (int tile = 0; tile < block.num_tiles; ++tile) {
    // From the number of the tile, so that it is all that has to be kept.
    const u32 slot = tile % kStages, parity = tile / kStages % 2;
    const u32 change_slot = tile % kChanges, change_parity = tile / kChanges % 2;
    if (warp == 0 && lane == 0) {
      arrive_and_expect(block.barrier(kAnswerFull, slot), kTileTokens * kHRes);
    }
    wait(block.barrier(kFull, slot), parity);
    wait(block.barrier(kTableFull, slot), parity);
    wait(block.barrier(kChangeFull, change_slot), change_parity);
    wait_for_cluster(block.barrier(kAnswerFull, slot), parity);
    main.stage = block.stage(slot), main.change = block.change(change_slot);
    const u32 notes = block.notes(slot);
    // Asked for again, like all that can be.
    const u32 lane = lane_id(), q = lane % 4, matrix = lane / 8, row = lane % 8;
    main.row_notes = notes + row * kNoteRow + matrix * 16, main.own_notes = notes + 2 * q * kNoteRow;
    // Of a pair of streams: the matrices of the first, then those of the second.
    const auto pair_at = [&](int unit) {
      return matrix / 2 * kPlaneBytes + swizzled(row, unit % kBoxUnits * 2 + matrix % 2) +
             unit / kBoxUnits * kBoxBytes;
    };
    main.take_turns<0>(pair_at(warp));
    if constexpr (kShared) {
      main.differentiate<kTurns * N, 2>(pair_at(kTurns * kMainWarps + warp / 2), warp % 2 * 2);
    }
    fence_for_copies();
    __syncwarp();
    if (lane == 0) arrive(block.barrier(kDone, slot));
  }

  // [clusters, n C, kColumns], for sum_gradients
  float* partial = d_phi_partial + (long long)block.first_tile * N * hidden * kColumns;
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
}

// d_z: [tokens, kColumns], of which those of h_pre are not read. d_x may be d_x_in.
KERNEL(pre_bwd_one_pass, kThreads, 1)
(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap d_u,
 const __grid_constant__ TensorMap d_x_in, const __grid_constant__ TensorMap d_x, const float* phi,
 const float* alpha, const float* bias, const float* m, const float* r, const float* h_res,
 const float* d_h_pre, const float* d_z, float* d_phi_partial, float* gate_sums, int tokens,
 int hidden, int deferred, Settings settings) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Block block(shared, tokens);

  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      init_barrier(block.barrier(kFull, s), 1);
      init_barrier(block.barrier(kDone, s), kMainWarps);
      init_barrier(block.barrier(kPartsFull, s), 1);
      init_barrier(block.barrier(kAnswerFull, s), 1);
      init_barrier(block.barrier(kTableFull, s), kDotWarps);
    }
    for (int s = 0; s < kChanges; ++s) init_barrier(block.barrier(kChangeFull, s), 1);
    init_barrier(block.barrier(kPhiRead, 0), kMainWarps);
    publish_barriers();
  }
  __syncthreads();
  cluster_arrive();

  // Each task asks for its block again, so that none keeps in registers what only others want.
  if (warp < kMainWarps) {
    take_registers<kMainRegisters>();
    const Block block(shared, tokens);
    differentiate_tiles(block, phi, d_phi_partial, hidden, warp, lane);
  } else {
    // The dot warps may be a group of their own.
    if (kDotWarps % 4 == 0 && warp < kCopier) {
      give_registers<kDotRegisters>();
      const Block block(shared, tokens);
      multiply_tiles(block, h_res, tokens, deferred, warp - kMainWarps, lane);
    } else {
      give_registers<kOtherRegisters>();
      const Block block(shared, tokens);
      if (warp < kCopier) {
        multiply_tiles(block, h_res, tokens, deferred, warp - kMainWarps, lane);
      } else {
        cluster_wait();
      }
      if (warp == kOwner) {
        answer(block, {alpha, bias, m, r, d_h_pre, d_z, gate_sums}, tokens, hidden, settings, lane);
      } else if (warp == kCopier && lane == 0) {
        copy_tiles(block, x, d_u, d_x_in, d_x);
      }
    }
  }
  // What others sent may still be on its way to a block.
  __syncwarp();
  cluster_arrive();
  cluster_wait();
}
