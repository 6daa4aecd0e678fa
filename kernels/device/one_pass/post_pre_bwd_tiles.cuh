// Warps that post_pre_bwd_one_pass.cu and given/post_given_bwd.cu share beside 16-bit streams: main warps, the loader, both
// kinds of dots and the finisher. They include this behind their `Block`. Beside float32 streams post_pre_bwd_main_f32.cuh
// and post_pre_bwd_others_f32.cuh have these.

#pragma once

// ---- loader -----------------------------------------------------------------------------------------

// Stages and slots in turn, which are the same where there are as many of both.
struct Rings {
  Ring<kStages> stages;
  Ring<kGradients> slots;
  __device__ void next() {
    stages.next();
    if constexpr (kGradients < kStages) slots.next();
  }
  __device__ u32 slot() const { return kGradients < kStages ? slots.slot : stages.slot; }
  __device__ u32 slot_parity() const { return kGradients < kStages ? slots.parity : stages.parity; }
};

template <bool HAS_REST>
__device__ inline void load_tiles(const Block& block, const Maps& maps) {
  const u64 policy = evict_first();
  const auto lines = block.lines<HAS_REST>();
  // A tile that is done makes room for a stage and for a slot, of the tile that comes kSlotsLater.
  constexpr int kSlotsLater = kStages - kGradients;
  Ring<kStages> ring;
  Ring<kGradients> slots;
  if constexpr (kStagesWaitForPhi) wait(block.barrier(kPhiThere, 0), 0);
  for (int tile = 0; tile < block.num_tiles + kSlotsLater; ++tile, ring.next()) {
    const u32 stage = ring.slot;
    const int token = block.first_token(tile);
    const bool exists = tile < block.num_tiles;
    if (exists && tile >= kStages) {
      // Until there is room for it, the tile comes as far as the L2 cache.
      lines.template prefetch<N / 2>(maps.x_even, token);
      lines.template prefetch<N / 2>(maps.x_odd, token);
      lines.template prefetch<1>(maps.y, token);
      lines.template prefetch<1>(maps.d_u, token);
      lines.template prefetch<N / 2>(maps.d_x_new_in_even, token);
      lines.template prefetch<N / 2>(maps.d_x_new_in_odd, token);
    }
    wait(block.barrier(kEmpty, stage), ring.parity ^ 1);
    if (exists) {
      const u32 full = block.barrier(kInputFull, stage);
      arrive_and_expect(full, 2 * kHalf + kPair);
      lines.template copy_in<N / 2>(block.even(stage), maps.x_even, token, full, policy);
      lines.template copy_in<N / 2>(block.odd(stage), maps.x_odd, token, full, policy);
      lines.template copy_in<1>(block.vectors(stage), maps.y, token, full, policy);
      lines.template copy_in<1>(block.vectors(stage) + kPlane, maps.d_u, token, full, policy);
    }
    // phi before all others: everything waits for it.
    if (tile == 0) wait(block.barrier(kPhiThere, 0), 0);
    if (tile >= kSlotsLater) {
      const int earlier = block.first_token(tile - kSlotsLater);
      const u32 full = block.barrier(kGradientFull, slots.slot);
      arrive_and_expect(full, 2 * kHalf);
      const u32 even = block.even_gradient(slots.slot), odd = block.odd_gradient(slots.slot);
      lines.template copy_in<N / 2>(even, maps.d_x_new_in_even, earlier, full, policy);
      lines.template copy_in<N / 2>(odd, maps.d_x_new_in_odd, earlier, full, policy);
      slots.next();
    }
  }
}

// ---- input dots -------------------------------------------------------------------------------------

// <d_u, X[j]> and <d_u, y>, as diagonals of products of all tokens with all, over half of the channels by each of two warps,
// or over all of them for every second tile (TAKES_TURNS). Calls `use(tile, ring, x01, x23, y)` with a lane's sums: those
// with q == g / 2 have token g's, in the columns g % 2.
template <bool TAKES_TURNS, class Use>
__device__ inline void input_dots(const Block& block, int half, int lane, Use use) {
  const u32 row = lane % 8, matrix = lane / 8, odd = matrix % 2;
  // Half of the boxes, or of each box where they are not even.
  constexpr bool kWholeBoxes = TAKES_TURNS || SIZE / kBoxChannels % 2 == 0;
  constexpr u32 kSteps = kWholeBoxes ? 4 : 2;  // in a box
  constexpr u32 kBoxesApart = TAKES_TURNS ? 0 : SIZE / kBoxChannels / 2;
  const u32 box = (kWholeBoxes ? half * kBoxesApart * kBox : 0) + row * kRowBytes;
  const u32 swizzle = kWholeBoxes ? row : row ^ half * 4;
  // Within a box an even unit (of 16 bytes) more is another of these bits.
  const u32 x_first =
      (odd ? block.odd(0) : block.even(0)) + box + (matrix / 2 ^ swizzle ^ odd * kOddSwizzle) * 16;
  const u32 v_first = block.vectors(0) + matrix / 2 * kPlane + box + (matrix % 2 ^ swizzle) * 16;
  constexpr int kApart = TAKES_TURNS ? 2 : 1;
  Ring<kStages> ring;
  if (TAKES_TURNS && half) ring.next();
  for (int tile = TAKES_TURNS ? half : 0; tile < block.num_tiles; tile += kApart) {
    const u32 slot = ring.slot;
    wait(block.barrier(kInputFull, slot), ring.parity);
    float x01[4] = {}, x23[4] = {}, y[4] = {};  // of two streams x23 is zero
#pragma unroll
    for (u32 step = 0; step < SIZE / 16 / (3 - kApart); ++step) {
      const u32 at = slot * kHalf + step / kSteps * kBox, unit = step % kSteps * 2;
      const u32 from = (x_first + at) ^ unit * 16;
      u32 a[4], b[4], v[4];  // v: y, d_u
      read_matrices(a, from);
      if constexpr (N > 2) read_matrices(b, from + kPlane);
      read_matrices(v, (v_first + at + slot * (kPair - kHalf)) ^ unit * 16);
      mma_of<Stream>(x01, {a[0], a[1], a[2], a[3]}, {v[2], v[3]});
      if constexpr (N > 2) mma_of<Stream>(x23, {b[0], b[1], b[2], b[3]}, {v[2], v[3]});
      mma_of<Stream>(y, {v[0], v[0], v[1], v[1]}, {v[2], v[3]});
    }
    use(tile, ring, x01, x23, y);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kApart; ++i) ring.next();
  }
}

#include "one_pass/post_pre_bwd_main.cuh"

// ---- stream dots ------------------------------------------------------------------------------------

// d_X' [X, y]^T of four tokens, by one warp. Rows and columns of the products are stream * 4 + token, and only entries
// with the same token in both are wanted: those of lanes with g % 4 / 2 == q % 2, where g % 2 says which of two.
template <int STREAMS>
struct StreamDots;

// Of four streams d_X' are the rows.
template <>
struct StreamDots<4> {
  struct Sums {
    float x01[4], x23[4], y[4];
  };
  u32 x_first, gradient_first, y_first;

  __device__ StreamDots(const Block& block, int half, int lane) {
    const u32 row = lane % 8, matrix = lane / 8, odd = row / 4, token = 4 * half + row % 4;
    const u32 swizzle = token ^ odd * kOddSwizzle;
    x_first = (odd ? block.odd(0) : block.even(0)) + matrix / 2 * kPlane + token * kRowBytes +
              (matrix % 2 ^ swizzle) * 16;
    gradient_first = (odd ? block.odd_gradient(0) : block.even_gradient(0)) + matrix % 2 * kPlane +
                     token * kRowBytes + (matrix / 2 ^ swizzle) * 16;
    y_first = block.vectors(0) + token * kRowBytes + (matrix ^ token) * 16;
  }

  __device__ void add(Sums& sums, u32 stage, u32 slot) const {
    const u32 streams = x_first + stage * kHalf, vectors = y_first + stage * kPair;
    const u32 gradients = gradient_first + slot * kHalf;
#pragma unroll 2
    for (u32 at = 0; at < SIZE / kBoxChannels * kBox; at += kBox) {
#pragma unroll
      for (u32 unit = 0; unit < 8; unit += 4) {
        u32 y_part[4];
        read_matrices(y_part, (vectors + at) ^ unit * 16);
#pragma unroll
        for (u32 h = 0; h < 2; ++h) {
          u32 a[4], x[4];
          read_matrices(a, (gradients + at) ^ (unit + 2 * h) * 16);
          read_matrices(x, (streams + at) ^ (unit + 2 * h) * 16);
          mma_of<Stream>(sums.x01, {a[0], a[1], a[2], a[3]}, {x[0], x[1]});
          mma_of<Stream>(sums.x23, {a[0], a[1], a[2], a[3]}, {x[2], x[3]});
          mma_of<Stream>(sums.y, {a[0], a[1], a[2], a[3]}, {y_part[2 * h], y_part[2 * h + 1]});
        }
      }
    }
  }

  // Calls `use(place, entry)` with what the lane has, and its place in bytes.
  using Entry = float4;
  template <class Use>
  __device__ static void for_entries(const Sums& sums, u32 g, u32 q, Use use) {
    const auto& [x01, x23, y] = sums;
    const bool b = g % 2;
    use((g / 4 * 2 + q / 2) * 16,
        float4{b ? x01[1] : x01[0], b ? x23[1] : x23[0], b ? x01[3] : x01[2], b ? x23[3] : x23[2]});
    if (q < 2) use((4 + g / 4) * 16, float4{b ? y[1] : y[0], b ? y[3] : y[2], 0.f, 0.f});
  }
};

// Of two streams X and y are the rows, y twice, and d_X' the columns: one product has all.
template <>
struct StreamDots<2> {
  struct Sums {
    float even[4], odd[4];  // two chains of products, as each waits for the one before
  };
  u32 source_first, source_step, gradient_first;

  __device__ StreamDots(const Block& block, int half, int lane) {
    const u32 row = lane % 8, matrix = lane / 8, odd = row / 4, token = 4 * half + row % 4;
    const u32 swizzle = token ^ odd * kOddSwizzle, is_y = matrix % 2;
    const u32 x = odd ? block.odd(0) : block.even(0);
    source_first = (is_y ? block.vectors(0) : x) + token * kRowBytes +
                   (matrix / 2 ^ (is_y ? token : swizzle)) * 16;
    source_step = is_y ? kPair : kHalf;
    gradient_first = (odd ? block.odd_gradient(0) : block.even_gradient(0)) + token * kRowBytes +
                     (matrix ^ swizzle) * 16;
  }

  __device__ void add(Sums& sums, u32 stage, u32 slot) const {
    const u32 sources = source_first + stage * source_step;
    const u32 gradients = gradient_first + slot * kHalf;
#pragma unroll 4
    for (u32 at = 0; at < SIZE / kBoxChannels * kBox; at += kBox) {
#pragma unroll
      for (u32 unit = 0; unit < 8; unit += 4) {
        u32 d_x[4], a[4], b[4];
        read_matrices(d_x, (gradients + at) ^ unit * 16);
        read_matrices(a, (sources + at) ^ unit * 16);
        read_matrices(b, (sources + at) ^ (unit + 2) * 16);
        mma_of<Stream>(sums.even, {a[0], a[1], a[2], a[3]}, {d_x[0], d_x[1]});
        mma_of<Stream>(sums.odd, {b[0], b[1], b[2], b[3]}, {d_x[2], d_x[3]});
      }
    }
  }

  // d_H_res[i, j] at 2 i + j, then d_h_post.
  using Entry = float;
  template <class Use>
  __device__ static void for_entries(const Sums& sums, u32 g, u32 q, Use use) {
    const u32 i = q / 2, j = g / 4, b = g % 2;
    float all[4];
#pragma unroll
    for (int v = 0; v < 4; ++v) all[v] = sums.even[v] + sums.odd[v];
    use((2 * i + j) * 4, b ? all[1] : all[0]);
    if (j == 0) use((4 + i) * 4, b ? all[3] : all[2]);
  }
};

// Calls `use(tile, g, q, sums)` with the sums of lanes that have some of token 4 half + g % 4.
template <class Use>
__device__ inline void stream_dots(const Block& block, int half, int lane, Use use) {
  const StreamDots<N> dots(block, half, lane);
  const u32 g = lane / 4, q = lane % 4;
  Rings rings;
  for (int tile = 0; tile < block.num_tiles; ++tile, rings.next()) {
    const u32 stage = rings.stages.slot;
    wait(block.barrier(kDone, stage), rings.stages.parity);
    StreamDots<N>::Sums sums = {};
    dots.add(sums, stage, rings.slot());
    __syncwarp();
    if (lane == 0) arrive(block.barrier(kEmpty, stage));
    if (g % 4 / 2 == q % 2) use(tile, g, q, sums);
    __syncwarp();
  }
}

// ---- finisher ---------------------------------------------------------------------------------------

// The tables of two tiles are there at once: a finished tile makes room for the one after the next.
template <bool HAS_REST>
__device__ inline void finish_tiles(const Block& block, const Args& args, const Maps& maps,
                                    int lane) {
  const auto lines = block.lines<HAS_REST>();
  Tables<N> tables{block, args, lane};
  for (int tile = 0; tile < 2; ++tile) {
    tables.load(tile);
    tables.write(tile);
  }
  tables.load(2);
  Rings rings;
  for (int tile = 0; tile < block.num_tiles; ++tile, rings.next()) {
    const u32 stage = rings.stages.slot, slot = rings.slot();
    const int token = block.first_token(tile);
    wait(block.barrier(kDone, stage), rings.stages.parity);
    if (lane == 0) {
      lines.template copy_out<N / 2>(maps.d_x_new_even, token, block.even_gradient(slot));
      lines.template copy_out<N / 2>(maps.d_x_new_odd, token, block.odd_gradient(slot));
      lines.template copy_out<1>(maps.d_y, token, block.vectors(stage) + kPlane);
      commit_copies();
    }
    tables.write(tile + 2);
    if (lane == 0) {
      wait_for_reads<0>();
      arrive(block.barrier(kEmpty, stage));
    }
    __syncwarp();
    tables.load(tile + 3);
  }
  if (lane == 0) finish_copies();
}
