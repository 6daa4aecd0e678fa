// The main warps of post_pre_bwd_one_pass.cu, which includes this behind its sizes and its `Block`.
//
//   X'      = H_res X + h_post y, again
//   d_X'[j] = sum over i of H_res_new[i, j] d_X'_in[i] + h_pre[j] d_u + (r dm) phi^T - f X'[j]
//   d_y     = sum over i of h_post[i] d_X'[i]
//   d_phi   = sum over tokens of vec(X')^T (r dm), where kSumsPhi

#pragma once

#include "one_pass/post_pre_bwd_mix.cuh"

// The units of a warp are two neighbours, or every eighth of the block's. In the latter case half of the warps may have
// one less than the others.
constexpr bool kNeighbours = kUnits == 2;
constexpr int kLastUnits = SIZE / 16 - (kUnits - 1) * kMainWarps;
constexpr int kUnitStep = kNeighbours ? 16 : 16 * kMainWarps;  // channels
constexpr int kWarpStep = kNeighbours ? 32 : 16;
static_assert(!kNeighbours || !kStagesWaitForPhi,
              "phi that stays in shared memory lies before the rest");
// Whether d_X'_in of all units is read before any of them is worked on: where there are registers for it.
constexpr bool kGradientsFirst = kAhead == kUnits && kSumsPhi && !kIdentity;
// Whether units read tables and use words of replies anew: there are registers for two streams' numbers.
constexpr bool kReadsAnew = N > 2;
// Whether they read those words from shared memory, too, lest the compiler keep what follows from them.
constexpr bool kReadsWordsAnew = kHasUnits && kAhead < 2 && kKeepsReply;
// Where a unit lies, from the address of the warp's first one.
__device__ inline u32 of_unit(u32 at, u32 unit) {
  return kNeighbours ? at ^ unit * 32 : at + unit * (kUnitStep / kBoxChannels) * kBox;
}

__device__ inline u32 stream_pair(float a, float b) { return pair_of((Stream*)nullptr, a, b); }

// Whether d_phi takes X' from words whose halves are swapped. From the words themselves the compiler would keep what
// follows until it is wanted again, and there are too few registers.
constexpr bool kSwaps = kStreamParts<Stream> == 2 && kOctets > 1;
__device__ inline void swap_halves(u32& word) {
  word = __byte_perm(word, 0, 0x1032);
  keep(word);
}

struct MainWarp {
  const Block& block;
  const bool has_last_unit;
  u32 phi;      // this lane's fragment of the first unit
  u32 streams;  // ldmatrix addresses of what is mixed, in the first stage and in the first slot
  u32 gradients;
  u32 vectors;  // of y and d_u; the first two of the four matrices are y's
  u32 outputs;  // stmatrix addresses of d_X'
  float phi_units[kUnits];
  u32 dm_columns;  // ldmatrix address within the replies
  Mixing<N> mixing;
  using Weights = Mixing<N>::Weights;
  float d_phi[N][kUnits][kOctets][4];   // where kSumsPhi
  u32 phi_words[N][kUnits][kPhiWords];  // of the first kSharedUnits those of a tile

  __device__ MainWarp(const Block& block, int warp, int lane)
      : block(block), has_last_unit(kLastUnits == kMainWarps || warp < kLastUnits) {
    const u32 row = lane % 8, matrix_of_lane = lane / 8;
    const u32 first_channel = warp * kWarpStep, box = first_channel / kBoxChannels * kBox;
    const u32 first_unit = first_channel % kBoxChannels / 8;  // 16 bytes are 8 channels
    phi = block.shared + kPhi + first_channel / 16 * N * kPhiBytes;

    // Matrices go over the channels first.
    const Mixing<N>::Row own(lane, row);
    const u32 odd = own.stream % 2, unit = first_unit + matrix_of_lane % 2;
    const u32 in_half =
        own.stream / 2 * kPlane + box + swizzled(own.token, unit ^ odd * kOddSwizzle);
    streams = (odd ? block.odd(0) : block.even(0)) + in_half;
    gradients = (odd ? block.odd_gradient(0) : block.even_gradient(0)) + in_half;

    const u32 token = token_of_column(row);
    vectors = block.vectors(0) + matrix_of_lane / 2 * kPlane + box + swizzled(token, unit);
    const u32 odd_output = matrix_of_lane / 2;
    outputs = (odd_output ? block.odd_gradient(0) : block.even_gradient(0)) + box +
              swizzled(token, unit ^ odd_output * kOddSwizzle);
    dm_columns = token * kReplyStride + matrix_of_lane / 2 * 16 + matrix_of_lane % 2 * kReplyLow;
    mixing.init(lane);
  }

  // phi as fragments, into shared memory and from there into registers if it is kept there. Two units at a
  // time, which share a scale: there are too few registers for the numbers of all. Units behind `channels`, which the warp
  // has from its first one on, are zero; of one that ends there the second half is the first again, for nothing.
  __device__ void load_phi(const float* phi_of_warp, int channels, int lane) {
    const int g = lane / 4, q = lane % 4;
#pragma unroll 1
    for (int first = 0; first < kUnits; first += 2) {
      float2 values[N * 2][kPhiWords];
      u32 largest = 0;
#pragma unroll
      for (int e = 0; e < N * 2 * kPhiWords; ++e) values[e / kPhiWords][e % kPhiWords] = {};
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const int channel = (first + u) * kUnitStep;
        if (!has_unit(first + u) || channel >= channels) continue;
        const int apart = channel + 8 < channels ? 8 : 0;
#pragma unroll
        for (int e = 0; e < N * kPhiWords; ++e) {
          const int i = e / kPhiWords, p = e % kPhiWords,
                    row = i * block.hidden + channel + p % 2 * apart + g;
          const float* from = phi_of_warp + row * kColumns + p / 2 * 8;
          const float2 v = __ldg(reinterpret_cast<const float2*>(from) + q);
          largest = max(largest, max(magnitude(v.x), magnitude(v.y)));
          values[i * 2 + u][p] = v;
        }
      }
      const float phi_unit = half_unit(__reduce_max_sync(kAllLanes, largest));
      const float scale = inverse_of_unit(phi_unit);
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit) {
        if (unit / 2 == first / 2) phi_units[unit] = phi_unit;
      }
#pragma unroll
      for (int j = 0; j < N * 2; ++j) {
        const int unit = first + j % 2;
        if (!has_unit(unit)) continue;
        u32 words[kPhiWords];
        round_phi(words, values[j], scale);
        const u32 at = fragment(j / 2, unit);
#pragma unroll
        for (int w = 0; w < kPhiWords; w += 4) {
          if (w + 2 < kPhiWords) {
            write4(at + w * 128 + lane * 16, {words[w], words[w + 1], words[w + 2], words[w + 3]});
          } else {
            write2(at + w * 128 + lane * 8, {words[w], words[w + 1]});
          }
        }
      }
    }
#pragma unroll
    for (int j = 0; j < N * kUnits; ++j) {
      const int i = j / kUnits, unit = j % kUnits;
      if constexpr (kSumsPhi) {
#pragma unroll
        for (int c = 0; c < 4 * kOctets; ++c) d_phi[i][unit][c / 4][c % 4] = 0.f;
      }
      if (unit >= kSharedUnits && has_unit(unit)) read_phi(phi_words[i][unit], i, unit, lane);
    }
    if constexpr (kReadsWordsAnew) {
      keep(streams);  // for the others there are no registers
    } else {
      for (u32* number : {&streams, &gradients, &vectors}) keep(*number);
    }
    mixing.keep_all();
    // The fourth unit takes the last register.
    if constexpr (kUnits < 4) keep(outputs);
  }
  __device__ u32 fragment(int i, int unit) const {
    return phi + (unit * (kUnitStep / 16) * N + i) * kPhiBytes;
  }
  __device__ void read_phi(u32 (&words)[kPhiWords], int i, int unit, int lane) const {
#pragma unroll
    for (int w = 0; w < kPhiWords; w += 4) {
      if (w + 2 < kPhiWords) {
        const uint4 v = read4(fragment(i, unit) + w * 128 + lane * 16);
        words[w] = v.x, words[w + 1] = v.y, words[w + 2] = v.z, words[w + 3] = v.w;
      } else {
        const uint2 v = read2(fragment(i, unit) + w * 128 + lane * 8);
        words[w] = v.x, words[w + 1] = v.y;
      }
    }
  }
  __device__ bool has_unit(int unit) const {
    return unit + 1 < kUnits || (unit + 1 == kUnits && has_last_unit);
  }

  __device__ static u32 read_h_post(u32 tables, int lane) {
    return word_to_spread(tables + kHPost, kHPostBytes, lane);
  }

  // X' = H_res X + h_post y of a unit as A fragments: channels g and g + 8.
  __device__ void mix_x(u32 (&x_new)[N][2], const u32 (&y)[2], u32 at, const Weights& h_res,
                        const float (&h_post)[N / 2][4]) const {
    u32 x[N / 2][4];
    Mixing<N>::read_streams(x, at);
    float values[N][4];
#pragma unroll
    for (u32 e = 0; e < 2; ++e) {
#pragma unroll
      for (u32 i = 0; i < N; i += 2) {
        float mixed[4] = {};
        mixing.mix(mixed, x, h_res, i, e);
#pragma unroll
        for (u32 v = 0; v < 4; ++v) {
          const float y_v = e ? high_of<Stream>(y[v / 2]) : low_of<Stream>(y[v / 2]);
          values[i + v % 2][v / 2 * 2 + e] = fmaf(h_post[i / 2][v % 2 * 2 + e], y_v, mixed[v]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x_new[i][0] = stream_pair(values[i][0], values[i][1]);
      x_new[i][1] = stream_pair(values[i][2], values[i][3]);
    }
  }

  // X' and d_u of some units.
  __device__ void begin(u32 first, u32 last, u32 (&x_new)[kUnits][N][2], u32 (&d_u)[kUnits][2],
                        u32 tables, u32 stage, int lane) const {
    const Weights h_res = mixing.read(tables, 0, lane);
    float h_post[N / 2][4];
    const int q = lane % 4;
    const u32 h_post_word = read_h_post(tables, lane);
#pragma unroll
    for (u32 i = 0; i < N; i += 2) spread(h_post[i / 2], h_post_word, i, q);
#pragma unroll
    for (u32 unit = first; unit < last; ++unit) {
      if (!has_unit(unit)) break;
      u32 y_and_d_u[4];
      read_transposed(y_and_d_u, of_unit(vectors + stage * kPair, unit));
      const u32 y[2] = {y_and_d_u[0], y_and_d_u[1]};
      d_u[unit][0] = y_and_d_u[2], d_u[unit][1] = y_and_d_u[3];
      mix_x(x_new[unit], y, of_unit(streams + stage * kHalf, unit), h_res, h_post);
    }
  }

  // r dm, high and low parts of an octet of columns side by side, as 8 x 8 matrices of tokens and columns.
  template <bool TRANSPOSED>
  __device__ void read_dm(u32 (&dm)[2 * kOctets], u32 replies) const {
#pragma unroll
    for (int octet = 0; octet < kOctets; octet += 2) {
      const u32 at = replies + dm_columns + octet * 16;
      u32(&rest)[2] = reinterpret_cast<u32(&)[2]>(dm[2 * octet]);
      u32(&both)[4] = reinterpret_cast<u32(&)[4]>(dm[2 * octet]);
      if (octet + 1 < kOctets) {
        TRANSPOSED ? read_transposed(both, at) : read_matrices(both, at);
      } else {
        TRANSPOSED ? read_transposed(rest, at) : read_matrices(rest, at);
      }
    }
  }

  // Of a reply r dm in float16, that of a column's token in its unit, and the words of h_pre, and of -f and that unit.
  struct Reply {
    HalfDm half_dm;
    u32 h_pre, factors;
  };
  __device__ void read_words(Reply& reply, u32 replies, int lane) const {
    const u32 of_token = replies + token_of_column(lane / 4) * kReplyStride;
    reply.h_pre = read1(of_token + kReplyGates + lane % 4 * 4);
    reply.factors = read1(of_token + kReplyFactor / 16 * 16 + lane % 4 * 4);
  }
  __device__ void read_reply(Reply& reply, u32 replies, int lane) const {
    const u32 of_token = replies + token_of_column(lane / 4) * kReplyStride;
    read_words(reply, replies, lane);
    u32 dm[2 * kOctets];
    read_dm<false>(dm, replies);
    const float scale = inverse_of_unit(low_half(read1(of_token + kReplyUnit)));
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet)
      set_octet(reply.half_dm, octet, dm[2 * octet], dm[2 * octet + 1], scale);
  }

  // Adds units of a tile to d_phi = sum over tokens of vec(X')^T (r dm).
  __device__ void sum_phi(u32 first, u32 last, const u32 (&x_new)[kUnits][N][2], u32 replies) {
    // Rows 8 to 15 of the tokens are the same again, for the low parts.
    u32 dm[2 * kOctets];
    read_dm<true>(dm, replies);
    if constexpr (kSwaps)
      for (u32& word : dm) swap_halves(word);
#pragma unroll
    for (u32 unit = first; unit < last; ++unit) {
      if (!has_unit(unit)) break;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        u32 x[2] = {x_new[unit][i][0], x_new[unit][i][1]};
        if constexpr (kSwaps)
          for (u32& word : x) swap_halves(word);
        add_columns(d_phi[i][unit], x, dm, [](int part) { return part / 2; });
      }
    }
  }

  // d_X'_in of a unit, for the products that mix it, or where it is added as it is: two channels of a stream and the
  // lane's tokens.
  __device__ void read_gradient(u32 (&gradient)[N / 2][4], u32 slot, u32 unit) const {
    if constexpr (kIdentity) {
#pragma unroll
      for (int half = 0; half < N / 2; ++half)
        read_transposed(gradient[half], of_unit(outputs + slot * kHalf + half * kPlane, unit));
    } else {
      Mixing<N>::read_streams(gradient, of_unit(gradients + slot * kHalf, unit));
    }
  }

  __device__ void tile(int tile, Rings rings, int lane) {
    const u32 stage = rings.stages.slot, slot = rings.slot();
    const int q = lane % 4;
    const u32 tables = block.tables(tile);
    wait(block.barrier(kInputFull, stage), rings.stages.parity);
    wait(block.barrier(kTablesFull, tile % 2), tile / 2 % 2);

    u32 x_new[kUnits][N][2], d_u[kUnits][2];
    begin(0, kAhead, x_new, d_u, tables, stage, lane);

    wait(block.barrier(kGradientFull, slot), rings.slot_parity());
    block.wait_for_replies(stage, rings.stages.parity);
    const u32 replies = block.reply(stage, 0);
    if constexpr (kSumsPhi) sum_phi(0, kAhead, x_new, replies);

    Reply reply;
    if constexpr (kKeepsReply) read_reply(reply, replies, lane);
    u32 gradient[kUnits][N / 2][4];
    if constexpr (kGradientsFirst) {
#pragma unroll
      for (u32 unit = 0; unit < kUnits; ++unit) read_gradient(gradient[unit], slot, unit);
    }
    Weights h_res_new = {};
    u32 h_post_word = 0;
    if constexpr (!kReadsAnew) {
      h_res_new = mixing.read(tables, 1, lane);
      h_post_word = read_h_post(tables, lane);
    }
#pragma unroll
    for (u32 unit = 0; unit < kUnits; ++unit) {
      if (!has_unit(unit)) break;
      if (unit >= kAhead) {
        begin(unit, unit + 1, x_new, d_u, tables, stage, lane);
        if constexpr (kSumsPhi) sum_phi(unit, unit + 1, x_new, replies);
      }
      if constexpr (!kKeepsReply) read_reply(reply, replies, lane);
      if constexpr (kReadsWordsAnew) read_words(reply, replies, lane);
      if constexpr (kReadsAnew && !kIdentity) h_res_new = mixing.read(tables, 1, lane);
      if constexpr (!kGradientsFirst) read_gradient(gradient[unit], slot, unit);
      // What follows from these for a unit is not kept in registers for the next one.
      if constexpr (kReadsAnew)
        for (u32* word : {&reply.h_pre, &reply.factors}) keep(*word);
      // d_X'[j] = sum over i of H_res_new[i, j] d_X'_in[i] + h_pre[j] d_u - f X'[j], to which (r dm) phi^T comes below:
      // channel g of the lane's tokens, channel g + 8 of these
      float values[N][4], factors[4];  // -f and the unit of r dm
      spread(factors, reply.factors, kReplyFactor % 16 / 4, q);
#pragma unroll
      for (u32 i = 0; i < N; i += 2) {
        float h_pre[4];
        spread(h_pre, reply.h_pre, i, q);
#pragma unroll
        for (u32 e = 0; e < 2; ++e) {
          float mixed[4] = {};
          if constexpr (kIdentity) {
#pragma unroll
            for (u32 v = 0; v < 4; ++v) {
              const u32 pair = gradient[unit][i / 2][v % 2 * 2 + v / 2];
              mixed[v] = e ? high_of<Stream>(pair) : low_of<Stream>(pair);
            }
          } else {
            mixing.mix(mixed, gradient[unit], h_res_new, i, e);
          }
#pragma unroll
          for (u32 v = 0; v < 4; ++v) {
            const u32 d_u_pair = d_u[unit][v / 2], x_pair = x_new[unit][i + v % 2][v / 2];
            const float d_u_v = e ? high_of<Stream>(d_u_pair) : low_of<Stream>(d_u_pair);
            const float x_v = e ? high_of<Stream>(x_pair) : low_of<Stream>(x_pair);
            const float collapsed = fmaf(h_pre[v % 2 * 2 + e], d_u_v, mixed[v]);
            values[i + v % 2][v / 2 * 2 + e] = fmaf(factors[e], x_v, collapsed);
          }
        }
      }

      // d_X' += (r dm) phi^T,  d_y = sum over i of h_post[i] d_X'[i]
      float d_y[4] = {}, h_post[4];
      if constexpr (kReadsAnew) h_post_word = read_h_post(tables, lane);
      u32 rounded[N / 2][4];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (i % 2 == 0) spread(h_post, h_post_word, i, q);
        float products[4] = {};
        if (unit < kSharedUnits) read_phi(phi_words[i][unit], i, unit, lane);
        add_product(products, phi_words[i][unit], reply.half_dm);
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          values[i][v] = fmaf(phi_units[unit] * factors[2 + v % 2], products[v], values[i][v]);
          d_y[v] = fmaf(h_post[i % 2 * 2 + v % 2], values[i][v], d_y[v]);
        }
        rounded[i / 2][i % 2 * 2] = stream_pair(values[i][0], values[i][1]);
        rounded[i / 2][i % 2 * 2 + 1] = stream_pair(values[i][2], values[i][3]);
      }
#pragma unroll
      for (int half = 0; half < N / 2; ++half)
        write_transposed(of_unit(outputs + half * kPlane + slot * kHalf, unit), rounded[half]);
      const u32 rounded_d_y[2] = {stream_pair(d_y[0], d_y[1]), stream_pair(d_y[2], d_y[3])};
      write_transposed(of_unit(vectors + kPlane + stage * kPair, unit), rounded_d_y);
    }
    fence_for_copies();
    __syncwarp();
    if (lane == 0) arrive(block.barrier(kDone, stage));
  }

  // Behind `channels` nothing.
  __device__ void store_d_phi(float* d_phi_of_block, int channels) const {
    // Asked for again, or the addresses of phi would be kept until here.
    const u32 lane = lane_id();
    const int g = lane / 4, q = lane % 4;
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit) {
        if (!has_unit(unit) || unit * kUnitStep >= channels) break;
        const int row = i * padded(block.hidden) + unit * kUnitStep + g;
        ::store_d_phi(d_phi_of_block + row * kColumns, d_phi[i][unit], q);
      }
    }
  }
};

__device__ inline void main_warps(const Block& block, const Args& args, int warp, int lane) {
  MainWarp self(block, warp, lane);
  const int row = block.first_channel() + warp * kWarpStep;
  self.load_phi(args.phi + row * kColumns, block.hidden - row, lane);
  fence_for_copies();
  __syncwarp();
  if (lane == 0) arrive(block.barrier(kPhiThere, 0));
  block.wait_for_start();
  Rings rings;
  for (int tile = 0; tile < block.num_tiles; ++tile, rings.next()) {
    if (warp == 0 && lane == 0) block.expect_replies(rings.stages.slot);
    self.tile(tile, rings, lane);
  }
  if constexpr (kSumsPhi) {
    const int of_cluster = block.first_tile * N * padded(block.hidden);
    self.store_d_phi(static_cast<float*>(args.for_phi) + (of_cluster + row) * kColumns,
                     block.hidden - row);
  }
}
