// The main warps of pre_bwd_one_pass.cu for float32 streams, in place of pre_bwd_main.cuh.
//
//   d_x[j] = sum over i of h_res[i, j] d_x_in[i] + h_pre[j] d_u + (r dm) phi^T - f X[j]
//   d_phi  = sum over tokens of vec(X)^T (r dm)

#pragma once

#include "one_pass/back_f32.cuh"

// Where this thread's part of its first fragment of phi in shared memory begins; asks for its place, too.
__device__ inline u32 phi_of_thread() {
  const u32 thread = thread_id();
  return shared_address(shared) + kPhi + thread / 32 * kFragmentBytes + thread % 32 * 16;
}

// A main warp. Lane 4 g + q has the channels 2 g and 2 g + 1 of a unit, and the tokens 2 q and 2 q + 1: as `add_product`
// wants them, and as the banks of shared memory are all read at once.
struct Differentiation {
  // Fragments of phi; the others are in shared memory.
  PhiFragment held[kHeld > 0 ? kHeld : 1];
  float d_phi[kFragments][kOctets][4];
  // Places of the tile's X and d_u, d_x_in and replies.
  u32 stage, d_x_in, replies;

  // Of this lane's numbers of a stream in a turn; asks for its place, as the next do.
  template <int TURN>
  __device__ static u32 own_at() {
    const u32 warp = thread_id() / 32, lane = lane_id(), g = lane / 4, q = lane % 4;
    const u32 box = TURN * (kMainWarps / kBoxUnits) + warp / kBoxUnits;
    return box * kBoxBytes + swizzled(2 * q, warp % kBoxUnits * 4 + g / 2) + g % 2 * 8;
  }
  // Of the replies to token 2 q.
  __device__ u32 own_replies() const { return replies + lane_id() % 4 * 2 * kReplyRow; }

  // d_x in place of d_x_in, with r dm as B: k is a column.
  template <int TURN>
  __device__ void write_d_x() const {
    float sums[N][4];
    const u32 own = own_at<TURN>(), x = stage + own, own_replies = this->own_replies();
    float d_u[4];
    read_own(d_u, x + kDU);
    float h_pre[2][N], minus_f[2];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      read_floats(h_pre[t], own_replies + t * kReplyRow + kHPre);
      minus_f[t] = read_float(own_replies + t * kReplyRow + kMinusF);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      float v[4];
      read_own(v, x + j * kPlaneBytes);
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[j][e] = h_pre[e % 2][j] * d_u[e] + minus_f[e % 2] * v[e];
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float v[4];
      read_own(v, d_x_in + own + i * kPlaneBytes);
      if constexpr (kMixes) {
        float h[2][N];
#pragma unroll
        for (int t = 0; t < 2; ++t)
          read_floats(h[t], own_replies + t * kReplyRow + kHRes + i * N * sizeof(float));
#pragma unroll
        for (int j = 0; j < N; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[j][e] += h[e % 2][j] * v[e];
        }
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i][e] += v[e];
      }
    }
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
      const Factor dm = dm_of_row(octet);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const int f = TURN * N + j;
        if (f < kHeld) {
          add_product(sums[j], held[f < kHeld ? f : 0].octets[octet], dm);
        } else {
          float phi[4];
          read_floats(phi,
                      phi_of_thread() + (f - kHeld) * kMainWarps * kFragmentBytes + octet * 512);
          add_product(sums[j], phi, dm);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < N; ++j) write_own(d_x_in + own_at<TURN>() + j * kPlaneBytes, sums[j]);
  }

  // d_phi, with r dm as B: k is a token.
  template <int TURN>
  __device__ void add_d_phi(const Factor (&dm)[kOctets]) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      float x[4];
      read_own(x, stage + own_at<TURN>() + j * kPlaneBytes);
#pragma unroll
      for (int octet = 0; octet < kOctets; ++octet)
        add_product(d_phi[TURN * N + j][octet], x, dm[octet]);
    }
  }

  template <int TURN = 0>
  __device__ void write_all_d_x() const {
    write_d_x<TURN>();
    if constexpr (TURN + 1 < kTurns) write_all_d_x<TURN + 1>();
  }
  template <int TURN = 0>
  __device__ void add_all_d_phi(const Factor (&dm)[kOctets]) {
    add_d_phi<TURN>(dm);
    if constexpr (TURN + 1 < kTurns) add_all_d_phi<TURN + 1>(dm);
  }

  // r dm of token g: the columns 2 q and 2 q + 1 of an octet.
  __device__ Factor dm_of_row(int octet) const {
    const u32 lane = lane_id();
    const uint2 v = read2(replies + lane / 4 * kReplyRow + octet * 32 + lane % 4 * 8);
    return {Parts(__uint_as_float(v.x)), Parts(__uint_as_float(v.y))};
  }
  // r dm of the tokens 2 q and 2 q + 1: column g of an octet.
  __device__ Factor dm_of_column(int octet) const {
    const u32 at = own_replies() + lane_id() / 4 * 4 + octet * 32;
    return {Parts(read_float(at)), Parts(read_float(at + kReplyRow))};
  }
};

// Where a main warp keeps the number of tiles, for which it has no register; asks for its place, too.
__device__ inline u32 num_tiles_at() {
  return shared_address(shared) + kPhiUnits + thread_id() / 32 * sizeof(u32);
}

template <bool NORM>
__device__ inline void differentiate_tiles(const Block& block, const Args& args, int warp,
                                           int lane) {
  static_assert(!NORM && kSumsInShared == 0 && !kShared);
  const int hidden = args.hidden;
  Differentiation main;
#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
    PhiFragment phi;
    phi.load(args.phi + fragment_at(f, hidden), channel_at(f / N) < hidden);
    if (f < kHeld) {
      main.held[f < kHeld ? f : 0] = phi;
    } else {
      phi.write(phi_of_thread() + (f - kHeld) * kMainWarps * kFragmentBytes);
    }
#pragma unroll
    for (int e = 0; e < kOctets * 4; ++e) main.d_phi[f][e / 4][e % 4] = 0.f;
  }
  write1(num_tiles_at(), block.num_tiles);
  __syncwarp();
  if (lane_id() == 0) arrive(block.barrier(kPhiRead, 0));
  cluster_wait();

#pragma unroll 1
  for (int tile = 0; tile < int(read1(num_tiles_at())); ++tile) {
    // From the number of the tile, so that it is all that has to be kept.
    const u32 slot = tile % kStages, parity = tile / kStages % 2;
    const u32 d_x_in_slot = tile % kDXInSlots, d_x_in_parity = tile / kDXInSlots % 2;
    wait(block.barrier(kFull, slot), parity);
    if constexpr (kMixes) wait(block.barrier(kTableFull, slot), parity);
    wait(block.barrier(kDXInFull, d_x_in_slot), d_x_in_parity);
    wait_for_cluster(block.barrier(kReplyFull, slot), parity);
    main.stage = block.stage(slot), main.d_x_in = block.d_x_in_at(d_x_in_slot);
    main.replies = block.replies(slot);
    // Or else the compiler would cut them once, and keep the parts in memory.
#pragma unroll
    for (PhiFragment& phi : main.held) {
#pragma unroll
      for (int e = 0; e < kOctets * 4; ++e) keep(phi.octets[e / 4][e % 4]);
    }
    main.write_all_d_x();
    Factor dm[kOctets];
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) dm[octet] = main.dm_of_column(octet);
    main.add_all_d_phi(dm);
    fence_for_copies();
    __syncwarp();
    if (lane_id() == 0) arrive(block.barrier(kDone, slot));
  }

  const int channels = padded(hidden);
  float* partial =
      static_cast<float*>(args.d_phi) + (long long)cluster_id() * N * channels * kColumns;
#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
    if (channel_at(f / N) >= hidden) continue;
    store_d_phi<1>(partial + fragment_at(f, channels), main.d_phi[f]);
  }
}
