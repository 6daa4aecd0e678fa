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
//   loader        X and d_u, to a buffer
//   dot warps     this block's part of <d_u, X[i]>, to the block that owns the token
//   owner         the sum of these parts; r dm, h_pre and f, to all blocks
//   table warp    h_res as the main warps want it
//   main warps    d_x in place of d_x_in, and the sums for d_phi, which stay in registers until the end
//   changer       d_x to memory, d_x_in of a later tile to where it was
//
// X has more buffers than d_x_in, which is not wanted before the answer is there.
//
// Whatever belongs to a token stays within it, so that one with no number in it does not spoil others.

#include "coefficients.cuh"
#include "one_pass.cuh"

constexpr int N = 4;
constexpr int kColumns = N * (N + 2);
// Main warps take turns at units of 16 channels of all streams.
constexpr int kUnits = SIZE / 16;

#ifndef STAGES
#define STAGES 5
#define CHANGES 5
#define HELD 8
#define REGS_MAIN 208
#define REGS_DOTS 48
#define REGS_AUX 48
#endif
// Buffers for X and d_u, and for d_x_in.
constexpr int kStages = STAGES, kChanges = CHANGES;
constexpr int kMainWarps = 8;
// The first warps have one more where they do not share the units evenly.
constexpr int kWarpUnits = kUnits / kMainWarps, kLongWarps = kUnits % kMainWarps;
// Fragments of phi (a unit of one stream) that a main warp keeps in registers; the others are in shared memory.
constexpr int kHeld = HELD;
constexpr int kMainRegisters = REGS_MAIN, kDotRegisters = REGS_DOTS, kOtherRegisters = REGS_AUX;

constexpr int kDotWarps = 4;
constexpr int kLoader = kMainWarps + kDotWarps, kChanger = kLoader + 1, kTableWarp = kLoader + 2,
              kOwner = kLoader + 3;
constexpr int kThreads = 32 * (kOwner + 1);

// ---- shared memory ----------------------------------------------------------------------------------

// A plane a stream: X and d_u; d_x_in.
constexpr u32 kPlaneBytes = SIZE * kTileTokens * sizeof(Stream);
constexpr u32 kBoxBytes = kTileTokens * kRowBytes;
constexpr u32 kDU = N * kPlaneBytes, kStageBytes = kDU + kPlaneBytes;
constexpr u32 kChangeBytes = N * kPlaneBytes;
// Of one fragment of phi.
constexpr u32 kFragmentBytes = 32 * 24;
// Those of all warps before fragment f of each warp.
__device__ constexpr int fragments_before(int f) {
  const int unit = f / N, last = kUnits - unit * kMainWarps;
  return unit * N * kMainWarps + f % N * (last < kMainWarps ? last : kMainWarps);
}
constexpr u32 kPhiBytes = (N * kUnits - fragments_before(kHeld)) * kFragmentBytes;
// What main warps want to know of a tile, a row a token: r dm, what r dm lost by rounding (bf16, 24 each), h_pre, -f,
// all of these from the owner; the transpose of h_res. The padding keeps the rows in different banks.
constexpr u32 kHPre = 96, kMinusF = 112, kHRes = 128;
constexpr u32 kNoteRow = kHRes + N * N * sizeof(float) + 16;
constexpr u32 kNotesBytes = kTileTokens * kNoteRow;
// The parts of the dot products of one token from one block: a float4 a dot warp.
constexpr u32 kPartBytes = kDotWarps * 16;
// Clusters of 16 have owners for two tiles, so that half as many buffers do.
constexpr u32 kPartsBytes = (kStages + 1) / 2 * 16 * kPartBytes;

constexpr u32 kChange = kStages * kStageBytes;
constexpr u32 kPhi = kChange + kChanges * kChangeBytes;
constexpr u32 kNotes = kPhi + kPhiBytes;
constexpr u32 kParts = kNotes + kStages * kNotesBytes;
constexpr u32 kBarriers = kParts + kPartsBytes;
// Barriers: of each buffer, and that phi has been read.
constexpr u32 kFull = kBarriers, kDone = kFull + 8 * kStages, kPartsFull = kDone + 8 * kStages,
              kAnswerFull = kPartsFull + 8 * kStages, kTableFull = kAnswerFull + 8 * kStages,
              kChangeFull = kTableFull + 8 * kStages, kPhiRead = kChangeFull + 8 * kChanges;
constexpr u32 kSharedBytes = kPhiRead + 8;
static_assert(kSharedBytes <= 227 * 1024);

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
  __device__ u32 stage(u32 slot) const { return shared + slot * kStageBytes; }
  __device__ u32 change(u32 slot) const { return shared + kChange + slot * kChangeBytes; }
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

// ---- loader, changer --------------------------------------------------------------------------------

__device__ inline void load_tiles(const Block& block, const TensorMap& x, const TensorMap& d_u) {
  const u64 policy = evict_first();
  const int box = block.rank * (SIZE / kBoxChannels);
  Ring<kStages> ring;
#pragma unroll 1
  for (int tile = 0; tile < block.num_tiles; ++tile, ring.next()) {
    // phi comes first: everybody waits for it.
    if (tile == 1) wait(block.barrier(kPhiRead, 0), 0);
    wait(block.barrier(kDone, ring.slot), ring.parity ^ 1);
    const u32 stage = block.stage(ring.slot), full = block.barrier(kFull, ring.slot);
    const int token = block.first_token(tile);
    arrive_and_expect(full, kStageBytes);
    copy_in(stage, x, token, box, 0, full, policy);
    copy_in(stage + kDU, d_u, token, box, 0, full, policy);
  }
}

__device__ inline void change_tiles(const Block& block, const TensorMap& d_x_in,
                                    const TensorMap& d_x) {
  const u64 policy = evict_first();
  const int box = block.rank * (SIZE / kBoxChannels);
  const auto load = [&](int tile, u32 slot) {
    const u32 full = block.barrier(kChangeFull, slot);
    arrive_and_expect(full, kChangeBytes);
    copy_in(block.change(slot), d_x_in, block.first_token(tile), box, 0, full, policy);
  };
  wait(block.barrier(kPhiRead, 0), 0);
#pragma unroll 1
  for (int tile = 0; tile < min(kChanges, block.num_tiles); ++tile) load(tile, tile);
  Ring<kStages> ring;
  Ring<kChanges> changes;
#pragma unroll 1
  for (int tile = 0; tile < block.num_tiles; ++tile, ring.next(), changes.next()) {
    wait(block.barrier(kDone, ring.slot), ring.parity);
    copy_out(d_x, block.first_token(tile), box, 0, block.change(changes.slot));
    commit_copies();
    wait_for_reads<0>();
    if (tile + kChanges < block.num_tiles) load(tile + kChanges, changes.slot);
  }
  finish_copies();
}

// ---- dot warps --------------------------------------------------------------------------------------

// <d_u, X[i]> is the diagonal of the product of both tiles. A dot warp has 16 channels of every box.
__device__ inline void multiply_tiles(const Block& block, int warp, int lane) {
  const u32 matrix = lane / 8, row = lane % 8;
  const u32 x_at = matrix % 2 * kPlaneBytes + swizzled(row, 2 * warp + matrix / 2);
  const u32 d_u_at = kDU + swizzled(row, 2 * warp + matrix % 2);
  // The token whose diagonal element this lane has, if any.
  const u32 token = lane / 4;
  const bool on_diagonal = token / 2 == lane % 4;
  const u32 owner = token % block.cluster;
  const u32 part = (token / block.cluster * block.cluster + block.rank) * kPartBytes + warp * 16;
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
      u32 d_u[2];
      read_matrices(d_u, stage + d_u_at + box * kBoxBytes);
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        u32 x[4];
        read_matrices(x, stage + x_at + 2 * pair * kPlaneBytes + box * kBoxBytes);
        mma(dots[pair], x[0], x[1], x[2], x[3], {d_u[0], d_u[1]});
      }
    }
    // The buffer for parts is free: whoever fills this stage again has seen the answer to what was in it.
    if (on_diagonal) {
      const bool odd = token % 2;
      const float4 v = {odd ? dots[0][1] : dots[0][0], odd ? dots[0][3] : dots[0][2],
                        odd ? dots[1][1] : dots[1][0], odd ? dots[1][3] : dots[1][2]};
      const u32 to = owner + group * kTileTokens;
      send(in_block(parts.at(block) + part, to), v, in_block(block.barrier(kPartsFull, parts.slot), to));
    }
    __syncwarp();
    if (++group == block.owner_groups()) {
      group = 0;
      parts.next();
    }
  }
}

// ---- table warp -------------------------------------------------------------------------------------

// A lane has row j of the transpose of h_res of a token; of the unit matrix where d_x_in is not to be mixed.
__device__ inline void write_tables(const Block& block, const float* h_res, int tokens, bool deferred,
                                    int lane) {
  const int j = lane % N;
  Ring<kStages> ring;
#pragma unroll 1
  for (int tile = 0; tile < block.num_tiles; ++tile, ring.next()) {
    const long long token = block.first_token(tile) + lane / N;
    float h[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      h[i] = deferred && token < tokens ? h_res[(token * N + i) * N + j] : float(i == j);
    }
    wait(block.barrier(kDone, ring.slot), ring.parity ^ 1);
    write_float4(block.notes(ring.slot) + lane / N * kNoteRow + kHRes + j * 16,
                 {h[0], h[1], h[2], h[3]});
    __syncwarp();
    if (lane == 0) arrive(block.barrier(kTableFull, ring.slot));
  }
}

// ---- owner ------------------------------------------------------------------------------------------

struct Gates {
  const float *alpha, *bias, *m, *r, *d_h_pre, *d_z;
  // [blocks, kColumns + 3], for sum_gates
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
  float m, r, d_h, d_z;

  __device__ OwnToken(const Gates& gates, long long token, bool exists, int lane) {
    m = exists && lane < kColumns ? gates.m[token * kColumns + lane] : 0.f;
    r = exists ? gates.r[token] : 0.f;
    d_h = exists && lane < N ? gates.d_h_pre[token * N + lane] : 0.f;
    d_z = exists && lane >= N && lane < kColumns ? gates.d_z[token * kColumns + lane] : 0.f;
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
      const float d_z = lane < N ? (dot + own.d_h) * slope : own.d_z;
      const float dm = alpha * d_z;
      const float f = norm * warp_sum(dm * own.m);
      sum_d_z += d_z;
      sum_d_z_m += d_z * own.m;

      // r dm and what it lost by rounding, in one word, then as pairs of columns.
      const float rdm = own.r * dm;
      u32 rounded[2];
      split(rdm, 0.f, rounded);
      const u32 both = __byte_perm(rounded[0], rounded[1], 0x5410);
      const u32 left = __shfl_sync(kAllLanes, both, pair);
      const u32 right = __shfl_sync(kAllLanes, both, pair + 1);
      const u32 h_pre = __shfl_sync(kAllLanes, __float_as_uint(h + settings.pre_eps), lane % N);
      u32 word = __byte_perm(left, right, lane < 12 ? 0x5410 : 0x7632);
      if (lane >= 24) word = lane < 28 ? h_pre : lane == 28 ? __float_as_uint(-f) : 0;
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

// A fragment of phi: 16 channels and 24 columns, as A of the products.
struct PhiFragment {
  u32 words[6];

  // This lane's elements, from the first on.
  __device__ void load(const float* first) {
#pragma unroll
    for (int octet = 0; octet < 3; ++octet) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 v =
            *reinterpret_cast<const float2*>(first + half * 8 * kColumns + octet * 8);
        words[2 * octet + half] = pair_of((Stream*)nullptr, v.x, v.y);
      }
    }
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

__device__ inline float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ inline float high(u32 pair) { return __uint_as_float(pair & 0xffff0000); }

// Where this thread's elements of fragment f of phi or d_phi begin. Asks for its place, so that it need not be kept
// in registers meanwhile.
__device__ inline int fragment_at(int f, int hidden) {
  u32 thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  const int channel = cluster_rank() * SIZE + thread / 32 * 16 + thread % 32 / 4;
  return (f % N * hidden + f / N * kMainWarps * 16 + channel) * kColumns + thread % 4 * 2;
}

// UNITS: of this warp. Lane 4 g + q has the channels g and g + 8 of a unit, and the tokens 2 q and 2 q + 1.
template <int UNITS>
__device__ inline void differentiate_tiles(const Block& block, const float* phi, float* d_phi_partial,
                                           int hidden, int warp, int lane) {
  const u32 q = lane % 4, matrix = lane / 8, row = lane % 8;
  const u32 own_phi = block.shared + kPhi + warp * kFragmentBytes + lane * 8;
  constexpr int kFragments = N * UNITS;
  PhiFragment held[kHeld > 0 ? kHeld : 1];
  float d_phi[kFragments][3][4];
#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
    PhiFragment fragment;
    fragment.load(phi + fragment_at(f, hidden));
    if (f < kHeld) {
      held[f < kHeld ? f : 0] = fragment;
    } else {
      fragment.write(own_phi + (fragments_before(f) - fragments_before(kHeld)) * kFragmentBytes);
    }
#pragma unroll
    for (int e = 0; e < 12; ++e) d_phi[f][e / 4][e % 4] = 0.f;
  }
  __syncwarp();
  if (lane == 0) arrive(block.barrier(kPhiRead, 0));
  cluster_wait();

  // Of a pair of streams: the matrices of stream 0, then those of stream 1.
  constexpr u32 kBoxUnits = kBoxChannels / 16, kUnitStep = kMainWarps / kBoxUnits * kBoxBytes;
  const u32 octet_at = swizzled(row, warp % kBoxUnits * 2 + matrix % 2) + warp / kBoxUnits * kBoxBytes;
  const u32 pair_at = matrix / 2 * kPlaneBytes + octet_at;
  Ring<kStages> ring;
  Ring<kChanges> changes;
#pragma unroll 1
  for (int tile = 0; tile < block.num_tiles; ++tile, ring.next(), changes.next()) {
    const u32 stage = block.stage(ring.slot), change = block.change(changes.slot);
    const u32 notes = block.notes(ring.slot);
    if (warp == 0 && lane == 0) {
      arrive_and_expect(block.barrier(kAnswerFull, ring.slot), kTileTokens * kHRes);
    }
    wait(block.barrier(kFull, ring.slot), ring.parity);
    wait(block.barrier(kTableFull, ring.slot), ring.parity);
    wait(block.barrier(kChangeFull, changes.slot), changes.parity);
    wait_for_cluster(block.barrier(kAnswerFull, ring.slot), ring.parity);

    // r dm and the rest of it: as B of phi dm (k is a column), and of X^T dm (k is a token).
    u32 back[6], forth[6];
    {
      u32 four[4], two[2];
      const u32 at = notes + row * kNoteRow + matrix * 16;
      read_matrices(four, at);
      read_matrices(two, at + 64);
      back[0] = four[0], back[1] = four[1], back[2] = four[2], back[3] = four[3];
      back[4] = two[0], back[5] = two[1];
      read_transposed(four, at);
      read_transposed(two, at + 64);
      forth[0] = four[0], forth[1] = four[1], forth[2] = four[2], forth[3] = four[3];
      forth[4] = two[0], forth[5] = two[1];
    }
    const u32 own_notes = notes + 2 * q * kNoteRow;
    const float minus_f[2] = {read_float(own_notes + kMinusF),
                              read_float(own_notes + kNoteRow + kMinusF)};

#pragma unroll
    for (int unit = 0; unit < UNITS; ++unit) {
      const u32 step = unit * kUnitStep;
      u32 d_u[2], d_x_in[2][4];
      read_transposed(d_u, stage + kDU + octet_at + step);
      read_transposed(d_x_in[0], change + pair_at + step);
      read_transposed(d_x_in[1], change + 2 * kPlaneBytes + pair_at + step);
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        u32 x[4], d_x[4];
        read_transposed(x, stage + 2 * pair * kPlaneBytes + pair_at + step);
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          const int j = 2 * pair + s, f = unit * N + j;
          const u32 x0 = x[2 * s], x1 = x[2 * s + 1];
          float sums[4];
#pragma unroll
          for (int t = 0; t < 2; ++t) {
            const auto of = [&](u32 v) { return t == 0 ? low(v) : high(v); };
            const float h_pre = read_float(own_notes + t * kNoteRow + kHPre + 4 * j);
            const float4 h = read_float4(own_notes + t * kNoteRow + kHRes + j * 16);
            sums[t] = h_pre * of(d_u[0]) + minus_f[t] * of(x0);
            sums[2 + t] = h_pre * of(d_u[1]) + minus_f[t] * of(x1);
            const float hs[N] = {h.x, h.y, h.z, h.w};
#pragma unroll
            for (int i = 0; i < N; ++i) {
              sums[t] += hs[i] * of(d_x_in[i / 2][i % 2 * 2]);
              sums[2 + t] += hs[i] * of(d_x_in[i / 2][i % 2 * 2 + 1]);
            }
          }
          PhiFragment p;
          if (f < kHeld) {
            p = held[f < kHeld ? f : 0];
          } else {
            p.read(own_phi + (fragments_before(f) - fragments_before(kHeld)) * kFragmentBytes);
          }
          mma(sums, p.words[0], p.words[1], p.words[2], p.words[3], {back[0], back[1]});
          mma(sums, p.words[4], p.words[5], p.words[0], p.words[1], {back[2], back[3]});
          mma(sums, p.words[2], p.words[3], p.words[4], p.words[5], {back[4], back[5]});
#pragma unroll
          for (int octet = 0; octet < 3; ++octet) {
            mma(d_phi[f][octet], x0, x1, x0, x1, {forth[octet], forth[octet + 3]});
          }
          d_x[2 * s] = pair_of((Stream*)nullptr, sums[0], sums[1]);
          d_x[2 * s + 1] = pair_of((Stream*)nullptr, sums[2], sums[3]);
        }
        write_transposed(change + 2 * pair * kPlaneBytes + pair_at + step, d_x);
      }
    }
    fence_for_copies();
    __syncwarp();
    if (lane == 0) arrive(block.barrier(kDone, ring.slot));
  }

  // [clusters, n C, kColumns], for sum_d_phi
  float* partial = d_phi_partial + (long long)block.first_tile * N * hidden * kColumns;
#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
    float* out = partial + fragment_at(f, hidden);
#pragma unroll
    for (int octet = 0; octet < 3; ++octet) {
      const float(&d)[4] = d_phi[f][octet];
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
  extern __shared__ __align__(1024) unsigned char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Block block(shared, tokens);

  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      init_barrier(block.barrier(kFull, s), 1);
      init_barrier(block.barrier(kDone, s), kMainWarps);
      init_barrier(block.barrier(kPartsFull, s), 1);
      init_barrier(block.barrier(kAnswerFull, s), 1);
      init_barrier(block.barrier(kTableFull, s), 1);
    }
    for (int s = 0; s < kChanges; ++s) init_barrier(block.barrier(kChangeFull, s), 1);
    init_barrier(block.barrier(kPhiRead, 0), kMainWarps);
    publish_barriers();
  }
  __syncthreads();
  cluster_arrive();

  if (warp < kMainWarps) {
    take_registers<kMainRegisters>();
    if (warp < kLongWarps) {
      differentiate_tiles<kWarpUnits + 1>(block, phi, d_phi_partial, hidden, warp, lane);
    } else {
      differentiate_tiles<kWarpUnits>(block, phi, d_phi_partial, hidden, warp, lane);
    }
  } else if (warp < kLoader) {
    give_registers<kDotRegisters>();
    cluster_wait();
    multiply_tiles(block, warp - kMainWarps, lane);
  } else {
    give_registers<kOtherRegisters>();
    cluster_wait();
    if (warp == kLoader && lane == 0) load_tiles(block, x, d_u);
    if (warp == kChanger && lane == 0) change_tiles(block, d_x_in, d_x);
    if (warp == kTableWarp) write_tables(block, h_res, tokens, deferred, lane);
    if (warp == kOwner) {
      answer(block, {alpha, bias, m, r, d_h_pre, d_z, gate_sums}, tokens, hidden, settings, lane);
    }
  }
  // What others sent may still be on its way to a block.
  __syncwarp();
  cluster_arrive();
  cluster_wait();
}
