// The main warps of post_pre_bwd_one_pass.cu for float32 streams, in place of post_pre_bwd_main.cuh.
//
//   X'      = H_res X + h_post y, again
//   d_phi   = sum over tokens of vec(X')^T (r dm)
//   d_X'[j] = sum over i of H_res_new[i, j] d_X'_in[i] + h_pre[j] d_u + (r dm) phi^T - f X'[j]
//   d_y     = sum over i of h_post[i] d_X'[i]
//
// All but the products with phi and r dm is float32 as it is. A warp has its units of 16 channels at once, so that
// coefficients of tokens are read from shared memory once.

#pragma once

#include "one_pass/back_f32.cuh"

static_assert(N == 4 && kSumsPhi && kUnits * kMainWarps * 16 == SIZE && kUnits == kAhead);

// Fragments of phi and of d_phi of a main warp: the streams of its first unit, then those of the next one.
constexpr int kFragments = kUnits * N;
// Bytes from a unit to the warp's next one: boxes have two units.
constexpr u32 kBoxUnits = kBoxChannels / 16, kNextUnit = kMainWarps / kBoxUnits * kBox;
static_assert(kMainWarps % kBoxUnits == 0);

// Where stream j of X and of d_X'_in lies, from the first stage or slot.
__device__ constexpr u32 plane_of_x(int j) { return (j % 2 ? kOdd : kEven) + j / 2 * kPlane; }
__device__ constexpr u32 plane_of_gradient(int j) {
  return (j % 2 ? kOddGradient : kEvenGradient) + j / 2 * kPlane;
}

// Where a main warp keeps the number of tiles, for which it has no register; asks for its place, as the next does.
__device__ inline u32 num_tiles_at(const Block& block) {
  return block.shared + kTilesOfWarps + thread_id() / 32 * sizeof(u32);
}
// Where this thread's part of phi in shared memory begins.
__device__ inline u32 phi_of_thread(const Block& block) {
  return block.shared + kPhi + thread_id() * 16;
}
constexpr u32 kNextPhiOctet = kMainWarps * kPhiOctetBytes;

// A main warp. Lane 4 g + q has the channels 2 g and 2 g + 1 of a unit, and the tokens 2 q and 2 q + 1: as `add_product`
// wants them, and as the banks of shared memory are all read at once.
struct MainWarp {
  const Block& block;
  // Octets of fragments of phi, one fragment after the other, in the order of `add_product_of`.
  float held[kHeld][4];
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

  // X' = H_res X + h_post y
  __device__ void mix_x(Numbers& x_new, u32 stage, int tile) const {
    const Own own(block, stage);
    const u32 table = own_table(tile);
    float of_tokens[2][N];
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
#pragma unroll
    for (int j = 0; j < N; ++j) {
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
  }

  // d_phi of units, with r dm as B: k is a token.
  __device__ void add_d_phi(const Numbers& x_new, u32 own_replies) {
    Factor dm[kOctets];
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
      const u32 at = own_replies + lane_id() / 4 * 4 + octet * 32;
      dm[octet] = {Parts(read_float(at)), Parts(read_float(at + kReplyStride))};
    }
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int octet = 0; octet < kOctets; ++octet)
        add_product(d_phi[f][octet], x_new[f / N][f % N], dm[octet]);
    }
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

  // d_X' += (r dm) phi^T, with r dm as B: k is a column.
  __device__ void add_products(Numbers& sums, u32 replies) const {
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
      const u32 lane = lane_id();
      const uint2 v = read2(replies + lane / 4 * kReplyStride + octet * 32 + lane % 4 * 8);
      const Factor dm{Parts(__uint_as_float(v.x)), Parts(__uint_as_float(v.y))};
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        const int of_phi = f * kOctets + octet;
        float phi[4];
        if (of_phi < kHeld) {
#pragma unroll
          for (int e = 0; e < 4; ++e) phi[e] = held[of_phi < kHeld ? of_phi : 0][e];
        } else {
          read_floats(phi, phi_of_thread(block) + (of_phi - kHeld) * kNextPhiOctet);
        }
        add_product_of(sums[f / N][f % N], Parts(phi[0]), Parts(phi[1]), Parts(phi[2]),
                       Parts(phi[3]), dm);
      }
    }
  }

  // d_X' in place of d_X'_in, d_y in place of d_u.
  __device__ void write(const Numbers& sums, u32 stage, u32 slot, int tile) const {
    float h_post[2][N];
    read_of_tokens(h_post, own_table(tile) + kTableHPost, kTableRow);
    const Own of_stage(block, stage), of_slot(block, slot);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      float d_y[4] = {};
#pragma unroll
      for (int i = 0; i < N; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) d_y[e] += h_post[e % 2][i] * sums[u][i][e];
        of_slot.write(sums[u][i], plane_of_gradient(i) + u * kNextUnit);
      }
      of_stage.write(d_y, kVectors + kPlane + u * kNextUnit);
    }
  }

  __device__ u32 own_replies(u32 stage) const {
    return block.reply(stage, 0) + lane_id() % 4 * 2 * kReplyStride;
  }

  // A tile until its X' is in d_phi.
  __device__ void begin(Numbers& x_new, int tile) {
    const u32 stage = tile % kStages, slot = tile % kGradients;
    mix_x(x_new, stage, tile);
    wait(block.barrier(kGradientFull, slot), tile / kGradients % 2);
    wait_for_cluster(block.barrier(kRepliesFull, stage), tile / kStages % 2);
    add_d_phi(x_new, own_replies(stage));
  }
  // The rest of it.
  __device__ void finish(Numbers& numbers, int tile) const {
    const u32 stage = tile % kStages, slot = tile % kGradients;
    mix_gradients(numbers, stage, slot, tile, own_replies(stage));
    add_products(numbers, block.reply(stage, 0));
    write(numbers, stage, slot, tile);
  }
};

__device__ inline void main_warps(const Block& block, const Args& args, int warp, int lane) {
  MainWarp self{block};
#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
    PhiFragment phi;
    phi.load(args.phi + fragment_at(f, block.hidden), channel_at(f / N) < block.hidden);
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
      const int of_phi = f * kOctets + octet;
      const float (&v)[4] = phi.octets[octet];
      if (of_phi < kHeld) {
        float (&held)[4] = self.held[of_phi < kHeld ? of_phi : 0];
        held[0] = v[0], held[1] = v[2], held[2] = v[1], held[3] = v[3];
      } else {
        write_float4(phi_of_thread(block) + (of_phi - kHeld) * kNextPhiOctet,
                     {v[0], v[2], v[1], v[3]});
      }
    }
  }
  write1(num_tiles_at(block), block.num_tiles);
  __syncwarp();
  if (lane == 0) arrive(block.barrier(kPhiThere, 0));
  cluster_wait();
  // Here, as phi has taken many registers on its way.
#pragma unroll
  for (int e = 0; e < kFragments * kOctets * 4; ++e)
    self.d_phi[e / 4 / kOctets][e / 4 % kOctets][e % 4] = 0.f;

#pragma unroll 1
  for (int tile = 0; tile < int(read1(num_tiles_at(block))); ++tile) {
    // From the number of the tile, so that it is all that has to be kept.
    const u32 stage = tile % kStages, parity = tile / kStages % 2;
    if (thread_id() == 0)
      arrive_and_expect(block.barrier(kRepliesFull, stage), kTileTokens * kReplyBytes);
    wait(block.barrier(kInputFull, stage), parity);
    wait(block.barrier(kTablesFull, tile % 2), tile / 2 % 2);
    // Or else the compiler would cut them once, and keep the parts in memory.
#pragma unroll
    for (int e = 0; e < 4 * kHeld; ++e) keep(self.held[e / 4][e % 4]);
    MainWarp::Numbers numbers;
    self.begin(numbers, tile);
    // Never, but the compiler has to have added to the sums for d_phi here: it would do so behind all else, and keep what
    // it adds until then.
    if (tile >= int(read1(num_tiles_at(block)))) break;
    self.finish(numbers, tile);
    fence_for_copies();
    __syncwarp();
    if (lane_id() == 0) arrive(block.barrier(kDone, stage));
  }

  float* partial =
      static_cast<float*>(args.for_phi) + (long long)cluster_id() * N * block.hidden * kColumns;
#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
    if (channel_at(f / N) >= block.hidden) continue;
    store_d_phi<1>(partial + fragment_at(f, block.hidden), self.d_phi[f]);
  }
}
