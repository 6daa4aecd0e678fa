// The warps of post_pre_bwd_one_pass.cu for float32 streams that do not multiply by phi, in place of its own: tables of the
// mixing, dots, and all copies. There are four of them, with one owner, so that main warps have more registers.

#pragma once

// ---- tables --------------------------------------------------------------------------------------------

// Tables: of each token the columns of H_res, the rows of H_res_new and h_post. A lane has a token's row i of both matrices.
struct FloatTables {
  const Block& block;
  const Args& args;
  const int lane;
  float4 row, new_row, h_post;

  __device__ void load(int tile) {
    const int t = lane / 4, i = lane % 4;
    const long long token = block.first_token(tile) + t, whole = block.first_token(tile) + lane;
    const bool exists = tile < block.num_tiles && token < args.tokens;
    const auto row_of = [&](const float* matrices) {
      return __ldg(reinterpret_cast<const float4*>(matrices) + token * 4 + i);
    };
    row = exists ? row_of(args.h_res) : float4{};
    new_row = {float(i == 0), float(i == 1), float(i == 2), float(i == 3)};
    if (!kIdentity && args.deferred) new_row = exists ? row_of(args.h_res_new) : float4{};
    const bool has_h_post = lane < kTileTokens && tile < block.num_tiles && whole < args.tokens;
    h_post = has_h_post ? __ldg(reinterpret_cast<const float4*>(args.h_post) + whole) : float4{};
  }

  __device__ void write(int tile) const {
    if (tile >= block.num_tiles) return;
    const u32 i = lane % 4, tables = block.tables(tile), at = tables + lane / 4 * kTableRow;
    write_float(at + i * 4, row.x), write_float(at + 16 + i * 4, row.y);
    write_float(at + 32 + i * 4, row.z), write_float(at + 48 + i * 4, row.w);
    if constexpr (!kIdentity) write_float4(at + kTableNew + i * 16, new_row);
    if (lane < kTileTokens) write_float4(tables + lane * kTableRow + kTableHPost, h_post);
    __syncwarp();
    if (lane == 0) arrive(block.barrier(kTablesFull, tile % 2));
  }
};

// ---- copies and tables ---------------------------------------------------------------------------------

// All copies in and out, as tiles are done, and the tables of two tiles ahead.
template <bool HAS_REST>
__device__ inline void move_tiles(const Block& block, const Args& args, const Maps& maps,
                                  int lane) {
  const u64 policy = evict_first();
  const auto lines = block.lines<HAS_REST>();
  const auto load = [&](int tile) {
    if (tile >= block.num_tiles) return;
    const u32 stage = tile % kStages, full = block.barrier(kInputFull, stage);
    const int token = block.first_token(tile);
    arrive_and_expect(full, 2 * kHalf + kPair);
    lines.template copy_in<N / 2>(block.even(stage), maps.x_even, token, full, policy);
    lines.template copy_in<N / 2>(block.odd(stage), maps.x_odd, token, full, policy);
    lines.template copy_in<1>(block.vectors(stage), maps.y, token, full, policy);
    lines.template copy_in<1>(block.vectors(stage) + kPlane, maps.d_u, token, full, policy);
  };
  const auto load_gradient = [&](int tile) {
    if (tile >= block.num_tiles) return;
    const u32 slot = tile % kGradients, full = block.barrier(kGradientFull, slot);
    const int token = block.first_token(tile);
    arrive_and_expect(full, 2 * kHalf);
    lines.template copy_in<N / 2>(block.even_gradient(slot), maps.d_x_new_in_even, token, full,
                                  policy);
    lines.template copy_in<N / 2>(block.odd_gradient(slot), maps.d_x_new_in_odd, token, full,
                                  policy);
  };
  // As far as the L2 cache, until there is room for it.
  const auto load_ahead = [&](int tile) {
    if (tile < block.num_tiles) {
      const int token = block.first_token(tile);
      lines.template prefetch<N / 2>(maps.x_even, token),
          lines.template prefetch<N / 2>(maps.x_odd, token);
      lines.template prefetch<1>(maps.y, token), lines.template prefetch<1>(maps.d_u, token);
    }
    const int earlier = tile - kStages + kGradients;
    if (earlier < block.num_tiles) {
      const int token = block.first_token(earlier);
      lines.template prefetch<N / 2>(maps.d_x_new_in_even, token),
          lines.template prefetch<N / 2>(maps.d_x_new_in_odd, token);
    }
  };

  if (lane == 0) load(0);
  FloatTables tables{block, args, lane};
#pragma unroll 1
  for (int tile = 0; tile < 2; ++tile) {
    tables.load(tile);
    tables.write(tile);
  }
  tables.load(2);
  if (lane == 0) {
    // phi comes next: everybody waits for it.
    wait(block.barrier(kPhiThere, 0), 0);
    load_gradient(0);
#pragma unroll 1
    for (int tile = 1; tile < kStages; ++tile) {
      load(tile);
      if (tile < kGradients) load_gradient(tile);
    }
  }
  __syncwarp();
  Ring<kStages> ring;
#pragma unroll 1
  for (int tile = 0; tile < block.num_tiles; ++tile, ring.next()) {
    const u32 slot = tile % kGradients;
    if (lane == 0) load_ahead(tile + kStages);
    __syncwarp();
    wait(block.barrier(kDone, ring.slot), ring.parity);
    if (lane == 0) {
      const int token = block.first_token(tile);
      lines.template copy_out<N / 2>(maps.d_x_new_even, token, block.even_gradient(slot));
      lines.template copy_out<N / 2>(maps.d_x_new_odd, token, block.odd_gradient(slot));
      lines.template copy_out<1>(maps.d_y, token, block.vectors(ring.slot) + kPlane);
      commit_copies();
    }
    __syncwarp();
    tables.write(tile + 2);
    if (lane == 0) {
      const u32 empty = block.barrier(kEmpty, ring.slot);
      wait_for_reads<0>();
      arrive(empty);
      wait(empty, ring.parity);
      load(tile + kStages);
      load_gradient(tile + kGradients);
    }
    __syncwarp();
    tables.load(tile + 3);
  }
  if (lane == 0) finish_copies();
}

// ---- dots ----------------------------------------------------------------------------------------------

// One of the two dot warps has four tokens of a tile, with eight lanes each: of every box a lane has 16 bytes of a token.
struct DotWarp {
  const Block& block;
  const u32 lane, own;  // place of the lane's first 16 bytes in a plane
  const Addressee owner;

  __device__ DotWarp(const Block& block, u32 half, u32 lane)
      : block(block),
        lane(lane),
        own(block.shared + swizzled(4 * half + lane / 8, lane % 8)),
        owner(block, 4 * half + lane / 8) {}

  // Four products are added up before they meet a long sum, which drops more of each.
  static __device__ float dot(const float (&a)[4], const float (&b)[4]) {
    float sum = a[0] * b[0];
#pragma unroll
    for (int e = 1; e < 4; ++e) sum = fmaf(a[e], b[e], sum);
    return sum;
  }

  // <d_u, X[j]> and <d_u, y> of this block. Where they go is free: the tile that had been there is done, so that its owners
  // have replied.
  __device__ void input(int tile) const {
    const u32 stage = tile % kStages, at = own + stage * kHalf;
    wait(block.barrier(kInputFull, stage), tile / kStages % 2);
    float sums[N + 1] = {};
#pragma unroll 2
    for (u32 box = 0; box < kPlane; box += kBox) {
      float d_u[4], v[4];
      read_floats(d_u, at + box + kVectors + kPlane);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        read_floats(v, at + box + plane_of_x(j));
        sums[j] += dot(d_u, v);
      }
      read_floats(v, at + box + kVectors);
      sums[N] += dot(d_u, v);
    }
#pragma unroll
    for (float& sum : sums) {
#pragma unroll
      for (u32 step = 1; step < 8; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    }
    const u32 rank = owner.rank(block, tile), slot = tile % kDotsSlots;
    const u32 to = in_block(block.dots(slot, owner.t, block.rank), rank);
    const u32 barrier = in_block(block.barrier(kDotsFull, slot), rank);
    if (lane % 8 == 0) send(to, {sums[0], sums[1], sums[2], sums[3]}, barrier);
    if (lane % 8 == 1) send(to + 16, sums[N], barrier);
    __syncwarp();
  }

  // d_H_res[i, j] = <d_X'[i], X[j]> and d_h_post[i] = <d_X'[i], y> of this block.
  __device__ void streams(int tile) const {
    const u32 stage = tile % kStages, slot = tile % kGradients;
    const u32 at = own + stage * kHalf, gradients = own + slot * kHalf;
    wait(block.barrier(kDone, stage), tile / kStages % 2);
    float sums[N][N + 1] = {};
#pragma unroll 1
    for (u32 box = 0; box < kPlane; box += kBox) {
      float v[N + 1][4];
#pragma unroll
      for (int j = 0; j < N; ++j) read_floats(v[j], at + box + plane_of_x(j));
      read_floats(v[N], at + box + kVectors);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        float d_x[4];
        read_floats(d_x, gradients + box + plane_of_gradient(i));
#pragma unroll
        for (int j = 0; j <= N; ++j) sums[i][j] += dot(d_x, v[j]);
      }
    }
    __syncwarp();
    if (lane == 0) arrive(block.barrier(kEmpty, stage));

    // Two lanes have a row i at the end.
    const bool second_half = lane & 4, odd_row = lane & 2;
    float half[2][N + 1], row[N + 1];
#pragma unroll
    for (int n = 0; n < 2 * (N + 1); ++n) {
      const float a = sums[n / (N + 1)][n % (N + 1)], b = sums[2 + n / (N + 1)][n % (N + 1)];
      half[n / (N + 1)][n % (N + 1)] =
          (second_half ? b : a) + __shfl_xor_sync(kAllLanes, second_half ? a : b, 4);
    }
#pragma unroll
    for (int j = 0; j <= N; ++j) {
      const float a = half[0][j], b = half[1][j];
      row[j] = (odd_row ? b : a) + __shfl_xor_sync(kAllLanes, odd_row ? a : b, 2);
      row[j] += __shfl_xor_sync(kAllLanes, row[j], 1);
    }
    const u32 rank = owner.rank(block, tile), i = lane % 8 / 2;
    const u32 sums_slot = (tile >> block.turns_shift) & (block.sums_slots() - 1);
    const u32 to = in_block(block.sums(sums_slot, owner.t, block.rank), rank);
    const u32 barrier = in_block(block.barrier(kSumsFull, sums_slot), rank);
    if (lane % 2 == 0) {
      send(to + i * 16, {row[0], row[1], row[2], row[3]}, barrier);
    } else {
      send(to + N * N * 4 + i * 4, row[N], barrier);
    }
    __syncwarp();
  }
};

// A tile that is done makes room for the one whose dots of d_u come next.
__device__ inline void dot_warps(const Block& block, u32 half, u32 lane) {
  const DotWarp dots(block, half, lane);
#pragma unroll 1
  for (int tile = 0; tile < min(kStages, block.num_tiles); ++tile) dots.input(tile);
#pragma unroll 1
  for (int tile = 0; tile < block.num_tiles; ++tile) {
    dots.streams(tile);
    if (tile + kStages < block.num_tiles) dots.input(tile + kStages);
  }
}
