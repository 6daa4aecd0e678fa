// The main warps of post_pre_bwd_one_pass.cu for float32 streams, in place of post_pre_bwd_main.cuh.
//
//   X'      = H_res X + h_post y, again
//   d_phi   = sum over tokens of vec(X')^T (r dm)
//   d_X'[j] = sum over i of H_res_new[i, j] d_X'_in[i] + h_pre[j] d_u + (r dm) phi^T - f X'[j]
//   d_y     = sum over i of h_post[i] d_X'[i]
//
// All but the products with r dm is float32 as it is. Those for d_phi are products of tf32 parts. Those with phi are of
// float16 parts: two have 22 bits of a number in units of the largest one of a warp's phi, or of a token's r dm, and phi is
// cut once. A warp has its units of 16 channels at once, so that coefficients of tokens are read from shared memory once.

#pragma once

#include "one_pass/back_f32.cuh"

static_assert(N == 4 && kSumsPhi && kUnits * kMainWarps * 16 == SIZE && kUnits == kAhead);

// Fragments of phi and of d_phi of a main warp: the streams of its first unit, then those of the next one.
constexpr int kFragments = kUnits * N;
// Fragments that are multiplied at once.
constexpr int kAtOnce = 2;
// Bytes from a unit to the warp's next one: boxes have two units.
constexpr u32 kBoxUnits = kBoxChannels / 16, kNextUnit = kMainWarps / kBoxUnits * kBox;
static_assert(kMainWarps % kBoxUnits == 0);

// Where stream j of X and of d_X'_in lies, from the first stage or slot.
__device__ constexpr u32 plane_of_x(int j) { return (j % 2 ? kOdd : kEven) + j / 2 * kPlane; }
__device__ constexpr u32 plane_of_gradient(int j) {
  return (j % 2 ? kOddGradient : kEvenGradient) + j / 2 * kPlane;
}

// Where a main warp keeps the number of tiles and the unit of its phi, for which it has no registers; asks for its place,
// as the next does.
__device__ inline u32 num_tiles_at(const Block& block) {
  return block.shared + kOfMainWarps + thread_id() / 32 * sizeof(u32);
}
__device__ inline u32 phi_unit_at(const Block& block) {
  return num_tiles_at(block) + kMainWarps * sizeof(u32);
}
// Where four words of phi of this thread are in shared memory. If an odd number of pairs is there the first is alone.
constexpr u32 kPhiAlone = kHeld % 2 * kPhiPairBytes;
__device__ inline u32 phi_at(const Block& block, int four) {
  const u32 first = kPhi + kPhiAlone + (four - (kHeld + 1) / 2) * 2 * kPhiPairBytes;
  return block.shared + first + thread_id() * 16;
}
__device__ inline u32 phi_alone_at(const Block& block) {
  return block.shared + kPhi + thread_id() * 8;
}

// A fragment of phi in parts of float16, as A of products. Four words have the large parts of two octets of columns, four
// the small ones; of an octet that is left four words have both.
struct HalfPhi {
  u32 parts[kOctets][4];

  __device__ HalfPhi(const PhiFragment& phi, float scale) {
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
      const bool is_left = octet % 2 == 0 && octet + 1 == kOctets;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float (&v)[4] = phi.octets[octet];
        u32 halves[2];
        split_halves(v[2 * c] * scale, v[2 * c + 1] * scale, halves);
#pragma unroll
        for (int small = 0; small < 2; ++small) {
          u32(&words)[4] = parts[is_left ? octet : octet / 2 * 2 + small];
          words[is_left ? 2 * small + c : octet % 2 * 2 + c] = halves[small];
        }
      }
    }
  }
};

// The place of fragment f's words p among those of a main warp. The first of these are held: those that products take in
// pairs, for which registers are found more easily.
__device__ constexpr int place_of(int f, int p) { return (kOctets - 1 - p) * kFragments + f; }

// r dm of a token in such parts, as B of the products: two neighbouring columns of each octet.
struct DmParts {
  u32 large[kOctets], small[kOctets];
};

// d = the product of both. Tensor cores drop the last bits of a sum instead of rounding it: so the large parts of two
// octets have sums of their own, and small parts come first.
__device__ inline void multiply(float (&d)[4], const u32 (&phi)[kOctets][4], const DmParts& dm) {
#pragma unroll
  for (float& sum : d) sum = 0.f;
  if constexpr (kOctets > 1) {
    mma_half(d, phi[1], {dm.large[0], dm.large[1]});
    mma_half(d, phi[0], {dm.small[0], dm.small[1]});
  }
  const u32(&left)[4] = phi[kOctets - 1];
  const u32 large[2] = {left[0], left[1]}, small[2] = {left[2], left[3]};
  mma_half(d, small, {dm.large[kOctets - 1]});
  mma_half(d, large, {dm.small[kOctets - 1]});
  mma_half(d, large, {dm.large[kOctets - 1]});
  if constexpr (kOctets > 1) {
    float others[4] = {};
    mma_half(others, phi[0], {dm.large[0], dm.large[1]});
#pragma unroll
    for (int e = 0; e < 4; ++e) d[e] += others[e];
  }
}
static_assert(kOctets == 1 || kOctets == 3);

// False, of which the compiler knows nothing. Where the loop over tiles would end in the middle, because of this, the sums
// for d_phi have to be there, and nothing is read ahead: else what is added to them waits behind all else, and what comes
// next has its numbers too early, in more registers than there are.
__device__ inline bool is_never(u32 tile) {
  keep(tile);
  return int(tile) < 0;
}

// A main warp. Lane 4 g + q has the channels 2 g and 2 g + 1 of a unit, and the tokens 2 q and 2 q + 1: as `add_product`
// wants them, and as the banks of shared memory are all read at once.
struct MainWarp {
  const Block& block;
  // Pairs of words of phi; the others are in shared memory.
  u32 held[kHeld][2];
  float d_phi[kFragments][kOctets][4];

  // Of each unit and each stream the first channel of both tokens, then the second one.
  using Numbers = float[kUnits][N][4];

  // Where this thread's numbers lie in a plane: those of its even token, and of its odd one.
  struct Own {
    u32 even, odd;
    __device__ Own(const Block& block, u32 slot) {
      const u32 warp = thread_id() / 32, lane = lane_id(), g = lane / 4, q = lane % 4;
      even = block.shared + slot * kHalf + warp / kBoxUnits * kBox +
             swizzled(2 * q, warp % kBoxUnits * 4 + g / 2) + g % 2 * 8;
      odd = other_row(even);
    }
    __device__ void read(float (&v)[4], u32 place) const {
      const uint2 first = read2(even + place), second = read2(odd + place);
      sort_own(v, first, second);
    }
    __device__ void write(const float (&v)[4], u32 place) const {
      write2(even + place, {__float_as_uint(v[0]), __float_as_uint(v[2])});
      write2(odd + place, {__float_as_uint(v[1]), __float_as_uint(v[3])});
    }
  };
  // Four numbers of either token, the rows of which are this far from each other.
  static __device__ void read_of_tokens(float (&v)[2][N], u32 at, u32 row_bytes) {
    read_floats(v[0], at), read_floats(v[1], at + row_bytes);
  }
  __device__ u32 own_table(int tile) const {
    return block.tables(tile) + lane_id() % 4 * 2 * kTableRow;
  }

  // X' = H_res X + h_post y, by two of the streams at once.
  template <int FIRST = 0>
  __device__ bool mix_x(Numbers& x_new, u32 stage, int tile) const {
    const Own own(block, stage);
    const u32 table = own_table(tile);
    float of_tokens[2][N];
    if constexpr (FIRST == 0) {
      read_of_tokens(of_tokens, table + kTableHPost, kTableRow);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        float y[4];
        own.read(y, kVectors + u * kNextUnit);
#pragma unroll
        for (int i = 0; i < N; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) x_new[u][i][e] = of_tokens[e % 2][i] * y[e];
        }
      }
    }
#pragma unroll
    for (int j = FIRST; j < FIRST + 2; ++j) {
      read_of_tokens(of_tokens, table + j * 16, kTableRow);  // column j of H_res
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        float x[4];
        own.read(x, plane_of_x(j) + u * kNextUnit);
#pragma unroll
        for (int i = 0; i < N; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) x_new[u][i][e] += of_tokens[e % 2][i] * x[e];
        }
      }
    }
    if constexpr (FIRST + 2 < N) return !is_never(tile) && mix_x<FIRST + 2>(x_new, stage, tile);
    return true;
  }

  // r dm of the tokens 2 q and 2 q + 1, column g.
  __device__ void dm_of_column(Factor (&dm)[kOctets], u32 own_replies) const {
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
      const u32 at = own_replies + lane_id() / 4 * 4 + octet * 32;
      dm[octet] = {Parts(read_float(at)), Parts(read_float(at + kReplyStride))};
    }
  }

  // d_phi from fragment FIRST on, with r dm as B: k is a token. What ends in the middle (`is_never`) is false.
  template <int FIRST = 0>
  __device__ bool add_d_phi(const Numbers& x_new, const Factor (&dm)[kOctets], int tile) {
#pragma unroll
    for (int f = FIRST; f < FIRST + kAtOnce; ++f) {
#pragma unroll
      for (int octet = 0; octet < kOctets; ++octet)
        add_product(d_phi[f][octet], x_new[f / N][f % N], dm[octet]);
    }
    if (is_never(tile)) return false;
    if constexpr (FIRST + kAtOnce < kFragments) return add_d_phi<FIRST + kAtOnce>(x_new, dm, tile);
    return true;
  }

  // From X' of units to their d_X', but for its products with phi.
  __device__ void mix_gradients(Numbers& sums, u32 stage, u32 slot, int tile,
                                u32 own_replies) const {
    float of_tokens[2][N], minus_f[2];
    read_of_tokens(of_tokens, own_replies + kReplyGates, kReplyStride);
#pragma unroll
    for (int t = 0; t < 2; ++t)
      minus_f[t] = read_float(own_replies + t * kReplyStride + kReplyFactor);
    const Own of_stage(block, stage);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      float d_u[4];
      of_stage.read(d_u, kVectors + kPlane + u * kNextUnit);
#pragma unroll
      for (int j = 0; j < N; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          sums[u][j][e] = of_tokens[e % 2][j] * d_u[e] + minus_f[e % 2] * sums[u][j][e];
      }
    }
    const Own of_slot(block, slot);
    const u32 table = own_table(tile) + kTableNew;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if constexpr (!kIdentity) read_of_tokens(of_tokens, table + i * 16, kTableRow);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        float v[4];
        of_slot.read(v, plane_of_gradient(i) + u * kNextUnit);
        if constexpr (kIdentity) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[u][i][e] += v[e];
        } else {
#pragma unroll
          for (int j = 0; j < N; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[u][j][e] += of_tokens[e % 2][j] * v[e];
          }
        }
      }
    }
  }

  // Four words of phi, and where they are.
  __device__ void read_phi(u32 (&words)[4], int four) const {
    if (2 * four + 1 > kHeld) {
      const uint4 v = read4(phi_at(block, four));
      words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
      return;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int pair = 2 * four + e / 2;
      if (pair < kHeld) words[e] = held[pair < kHeld ? pair : 0][e % 2];
    }
    if (2 * four + 1 == kHeld) {
      const uint2 v = read2(phi_alone_at(block));
      words[2] = v.x, words[3] = v.y;
    }
  }
  __device__ void write_phi(const u32 (&words)[4], int four) {
    if (2 * four + 1 > kHeld) {
      write4(phi_at(block, four), {words[0], words[1], words[2], words[3]});
      return;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int pair = 2 * four + e / 2;
      if (pair < kHeld) held[pair < kHeld ? pair : 0][e % 2] = words[e];
    }
    if (2 * four + 1 == kHeld) write2(phi_alone_at(block), {words[2], words[3]});
  }

  // r dm of token g.
  __device__ DmParts dm_of_row(u32 replies) const {
    DmParts dm;
    const u32 lane = lane_id(), of_token = replies + lane / 4 * kReplyStride;
    const float scale = inverse_of_unit(read_float(of_token + kReplyUnit));
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
      float v[2];
      read_floats(v, of_token + octet * 32 + lane % 4 * 8);
      u32 halves[2];
      split_halves(v[0] * scale, v[1] * scale, halves);
      dm.large[octet] = halves[0], dm.small[octet] = halves[1];
    }
    return dm;
  }

  // d_X' += (r dm) phi^T from fragment FIRST to the end of its unit, with r dm as B: k is a column.
  template <int FIRST>
  __device__ bool add_products(Numbers& sums, const DmParts& dm, u32 own_replies, int tile) const {
    const float phi_unit = read_float(phi_unit_at(block));
    float units[2];
#pragma unroll
    for (int t = 0; t < 2; ++t)
      units[t] = phi_unit * read_float(own_replies + t * kReplyStride + kReplyUnit);
#pragma unroll
    for (int f = FIRST; f < FIRST + kAtOnce; ++f) {
      u32 phi[kOctets][4];
#pragma unroll
      for (int p = 0; p < kOctets; ++p) read_phi(phi[p], place_of(f, p));
      float products[4];
      multiply(products, phi, dm);
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[f / N][f % N][e] += units[e % 2] * products[e];
    }
    if (is_never(tile)) return false;
    if constexpr ((FIRST + kAtOnce) % N != 0)
      return add_products<FIRST + kAtOnce>(sums, dm, own_replies, tile);
    return true;
  }

  // d_X' in place of d_X'_in, d_y in place of d_u.
  template <int UNIT>
  __device__ void write(const Numbers& sums, u32 stage, u32 slot, int tile) const {
    float h_post[2][N];
    read_of_tokens(h_post, own_table(tile) + kTableHPost, kTableRow);
    const Own of_stage(block, stage), of_slot(block, slot);
    float d_y[4] = {};
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) d_y[e] += h_post[e % 2][i] * sums[UNIT][i][e];
      of_slot.write(sums[UNIT][i], plane_of_gradient(i) + UNIT * kNextUnit);
    }
    of_stage.write(d_y, kVectors + kPlane + UNIT * kNextUnit);
  }

  __device__ u32 own_replies(u32 stage) const {
    return block.reply(stage, 0) + lane_id() % 4 * 2 * kReplyStride;
  }

  // A tile until its X' is in d_phi.
  __device__ bool begin(Numbers& x_new, int tile) {
    const u32 stage = tile % kStages, slot = tile % kGradients;
    if (!mix_x(x_new, stage, tile)) return false;
    wait(block.barrier(kGradientFull, slot), tile / kGradients % 2);
    block.wait_for_replies(stage, tile / kStages % 2);
    Factor dm[kOctets];
    dm_of_column(dm, own_replies(stage));
    return add_d_phi(x_new, dm, tile);
  }
};

__device__ inline void main_warps(const Block& block, const Args& args, int warp, int lane) {
  MainWarp self{block};
  PhiFragment phi[kFragments];
  u32 largest = 0;
#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
    phi[f].load(args.phi + fragment_at(f, block.hidden), channel_at(f / N) < block.hidden);
#pragma unroll
    for (int e = 0; e < kOctets * 4; ++e)
      largest = max(largest, magnitude(phi[f].octets[e / 4][e % 4]));
  }
  const float phi_unit = half_unit(__reduce_max_sync(kAllLanes, largest));
#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
    const HalfPhi halves(phi[f], inverse_of_unit(phi_unit));
#pragma unroll
    for (int p = 0; p < kOctets; ++p) self.write_phi(halves.parts[p], place_of(f, p));
  }
  write1(num_tiles_at(block), block.num_tiles);
  write_float(phi_unit_at(block), phi_unit);
  __syncwarp();
  if (lane == 0) arrive(block.barrier(kPhiThere, 0));
  block.wait_for_start();
  // Here, as phi has taken many registers on its way.
#pragma unroll
  for (int e = 0; e < kFragments * kOctets * 4; ++e)
    self.d_phi[e / 4 / kOctets][e / 4 % kOctets][e % 4] = 0.f;

#pragma unroll 1
  for (int tile = 0; tile < int(read1(num_tiles_at(block))); ++tile) {
    // From the number of the tile, so that it is all that has to be kept.
    const u32 stage = tile % kStages, parity = tile / kStages % 2;
    if (thread_id() == 0) block.expect_replies(stage);
    wait(block.barrier(kInputFull, stage), parity);
    wait(block.barrier(kTablesFull, tile % 2), tile / 2 % 2);
    MainWarp::Numbers numbers;
    if (!self.begin(numbers, tile)) break;
    const u32 slot = tile % kGradients, own_replies = self.own_replies(stage);
    self.mix_gradients(numbers, stage, slot, tile, own_replies);
    if (is_never(tile)) break;
    const DmParts dm = self.dm_of_row(block.reply(stage, 0));
    if (!self.add_products<0>(numbers, dm, own_replies, tile)) break;
    self.write<0>(numbers, stage, slot, tile);
    if (!self.add_products<N>(numbers, dm, own_replies, tile)) break;
    self.write<1>(numbers, stage, slot, tile);
    fence_for_copies();
    __syncwarp();
    if (lane_id() == 0) arrive(block.barrier(kDone, stage));
  }

  const int channels = padded(block.hidden);
  float* partial =
      static_cast<float*>(args.for_phi) + (long long)cluster_id() * N * channels * kColumns;
#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
    if (channel_at(f / N) >= block.hidden) continue;
    store_d_phi<1>(partial + fragment_at(f, channels), self.d_phi[f]);
  }
}
