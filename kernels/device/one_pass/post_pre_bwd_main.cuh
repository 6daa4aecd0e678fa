// The main warps of post_pre_bwd_one_pass.cu, which includes this behind its sizes and its `Block`.
//
//   X'      = H_res X + h_post y, again
//   d_X'[j] = sum over i of H_res_new[i, j] d_X'_in[i] + h_pre[j] d_u + (r dm) phi^T - f X'[j]
//   d_y     = sum over i of h_post[i] d_X'[i]
//   d_phi   = sum over tokens of vec(X')^T (r dm), where kSumsPhi

#pragma once

// The units of a warp are two neighbours, or every eighth of the block's. In the latter case half of the warps may have
// one less than the others.
constexpr bool kNeighbours = kUnits == 2;
constexpr int kLastUnits = SIZE / 16 - (kUnits - 1) * kMainWarps;
constexpr int kUnitStep = kNeighbours ? 16 : 16 * kMainWarps;  // channels
constexpr int kWarpStep = kNeighbours ? 32 : 16;
// Units whose X' is there before the replies are: with those of all, 448 channels would take too many registers.
constexpr int kAhead = Tuned::ahead;
// Whether d_X'_in of all units is read before any of them is worked on: where there are registers for it.
constexpr bool kGradientsFirst = kAhead == kUnits && kSumsPhi && !kIdentity;
// Whether what units share of the replies is read once for all of them: likewise.
constexpr bool kKeepsReply = kOctets < 4 || kAhead > 1;
// Where a unit lies, from the address of the warp's first one.
__device__ inline u32 of_unit(u32 at, u32 unit) {
  return kNeighbours ? at ^ unit * 32 : at + unit * (kUnitStep / kBoxChannels) * kBox;
}

// Fragments of 16 channels and 8 tokens have the channels g and g + 8, and in neighbouring columns the
// tokens q and 4 + (q ^ 2): so those of two products with four tokens each make one for eight. `2`: what lanes have of a
// table for one product is zero where they have something for the other.
__device__ inline u32 token_of_column(u32 column) {
  return column % 2 ? 4 + (column / 2 ^ 2) : column / 2;
}

struct MainWarp {
  const Block& block;
  const bool has_last_unit;
  u32 phi;      // this lane's fragment of the first unit
  u32 streams;  // ldmatrix addresses of the tokens 0 to 3, in the first stage and in the first slot
  u32 gradients;
  u32 vectors;  // of y and d_u; the first two of the four matrices are y's
  u32 outputs;  // stmatrix addresses of d_X'
  float phi_units[kUnits];
  u32 dm_columns;  // ldmatrix address within the replies
  u32 table;       // where the words of this lane lie in a table
  u32 take_high[2],
      take_low[2];  // what makes fragments of them, for the products of either four tokens
  float d_phi[N][kUnits][kOctets][4];   // where kSumsPhi
  u32 phi_words[N][kUnits][kPhiWords];  // where kHoldsPhi; elsewhere of a tile

  __device__ MainWarp(const Block& block, int warp, int lane)
      : block(block), has_last_unit(kLastUnits == kMainWarps || warp < kLastUnits) {
    const u32 row = lane % 8, matrix_of_lane = lane / 8;
    const u32 first_channel = warp * kWarpStep, box = first_channel / kBoxChannels * kBox;
    const u32 first_unit = first_channel % kBoxChannels / 8;  // 16 bytes are 8 channels
    phi = block.shared + kPhi + first_channel / 16 * N * kPhiBytes;

    // Rows (k) are stream * 4 + token % 4; matrices go over the channels first.
    const u32 k = lane / 16 * 8 + row, stream = k / 4, odd = stream % 2;
    const u32 unit = first_unit + matrix_of_lane % 2;
    const u32 in_pair = stream / 2 * kPlane + box + swizzled(k % 4, unit ^ odd * kOddSwizzle);
    streams = (odd ? block.odd(0) : block.even(0)) + in_pair;
    gradients = (odd ? block.odd_gradient(0) : block.even_gradient(0)) + in_pair;

    const u32 token = token_of_column(row);
    vectors = block.vectors(0) + matrix_of_lane / 2 * kPlane + box + swizzled(token, unit);
    const u32 odd_output = matrix_of_lane / 2;
    outputs = (odd_output ? block.odd_gradient(0) : block.even_gradient(0)) + box +
              swizzled(token, unit ^ odd_output * kOddSwizzle);
    dm_columns = token * kReplyStride + matrix_of_lane / 2 * 16 + matrix_of_lane % 2 * kReplyLow;

    // A fragment that mixes has a token of stream g % 2 in column g, and in the rows 2q and 2q + 1 two tokens of another
    // stream: at most one of both is the column's, and the rest is zero. Of the tokens 0 to 3 column g has g / 2, of the
    // others 4 + (g / 2 ^ 2): so a lane has a word of one of the two fragments alone.
    const u32 g = lane / 4, q = lane % 4;
    const u32 which = g / 4 == q % 2 ? 0 : 1, upper = g / 2 % 2;
    table = Tables::place(which ? 4 + (g / 2 ^ 2) : g / 2, g) + q / 2 * 16;
#pragma unroll
    for (u32 e = 0; e < 2; ++e) {
      take_high[e] = e != which ? 0x4444 : upper ? 0x1044 : 0x4410;
      take_low[e] = e != which ? 0x4444 : upper ? 0x3244 : 0x4432;
    }
  }

  // phi as fragments, into shared memory and from there into registers if it is kept there. Two units at a
  // time, which share a scale: there are too few registers for the numbers of all. Behind `channels`, which the warp
  // has from its first one on, it is zero.
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
#pragma unroll
        for (int e = 0; e < N * kPhiWords; ++e) {
          const int i = e / kPhiWords, p = e % kPhiWords,
                    row = i * block.hidden + channel + p % 2 * 8 + g;
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
      if (kHoldsPhi && has_unit(unit)) read_phi(phi_words[i][unit], i, unit, lane);
    }
    for (u32* number : {&streams, &gradients, &vectors, &table, &take_high[0], &take_high[1],
                        &take_low[0], &take_low[1]})
      keep(*number);
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

  // Four streams of the tokens 0 to 3 and 4 to 7.
  __device__ static void read_streams(u32 (&fragments)[2][4], u32 at) {
    read_transposed(fragments[0], at);
    read_transposed(fragments[1], (at ^ 4 * 16) + 4 * kRowBytes);
  }

  // Mixes four streams of the tokens 0 to 3 (e = 0) or of the others to the streams i and i + 1: (channel g, i), (g, i + 1),
  // (g + 8, i), (g + 8, i + 1) of the lane's token. `words`: this lane's of a table.
  __device__ void mix(float (&mixed)[4], const u32 (&streams)[4], uint4 words, u32 i, u32 e) const {
    const u32 first = i ? words.z : words.x, second = i ? words.w : words.y;
    mma(mixed, streams[0], streams[1], streams[2], streams[3],
        {__byte_perm(first, 0, take_high[e]), __byte_perm(second, 0, take_high[e])});
    mma(mixed, streams[0], streams[1], streams[2], streams[3],
        {__byte_perm(first, 0, take_low[e]), __byte_perm(second, 0, take_low[e])});
  }

  __device__ static u32 read_h_post(u32 tables, int lane) {
    return read1(tables + kHPost + token_of_column(lane / 4) * N * 4 + lane % 4 * 4);
  }
  // What tokens have four numbers of, of which lane 4 g + q has the q-th of column g's token in a word: two of them
  // (of stream i and i + 1, say) for the lane's two tokens, as the results of products have their columns. A product with
  // ones brings them there; reading each number would take as many turns of shared memory as 128 bytes.
  __device__ static void spread(float (&numbers)[4], u32 word, u32 i, u32 q) {
    constexpr u32 kOnes = 0x3f803f80;
    // Else what follows from q alone is kept for all tiles, in four registers that are not there.
    if constexpr (!kKeepsReply || kUnits > 3) keep(q);
#pragma unroll
    for (float& number : numbers) number = 0.f;
    mma_k8(numbers, q == i ? kOnes : 0, q == i + 1 ? kOnes : 0, word);
  }

  // X' = H_res X + h_post y of a unit as A fragments: channels g and g + 8.
  __device__ void mix_x(u32 (&x_new)[N][2], const u32 (&y)[2], u32 at, uint4 h_res,
                        const float (&h_post)[2][4]) const {
    u32 x[2][4];
    read_streams(x, at);
    float values[N][4];
#pragma unroll
    for (u32 e = 0; e < 2; ++e) {
#pragma unroll
      for (u32 i = 0; i < N; i += 2) {
        float mixed[4] = {};
        mix(mixed, x[e], h_res, i, e);
#pragma unroll
        for (u32 v = 0; v < 4; ++v) {
          const float y_v = e ? high_half(y[v / 2]) : low_half(y[v / 2]);
          values[i + v % 2][v / 2 * 2 + e] = fmaf(h_post[i / 2][v % 2 * 2 + e], y_v, mixed[v]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x_new[i][0] = pair(values[i][0], values[i][1]);
      x_new[i][1] = pair(values[i][2], values[i][3]);
    }
  }

  // X' and d_u of some units.
  __device__ void begin(u32 first, u32 last, u32 (&x_new)[kUnits][N][2], u32 (&d_u)[kUnits][2],
                        u32 tables, u32 stage, int lane) const {
    const uint4 h_res = read4(tables + table);
    float h_post[2][4];
    const int q = lane % 4;
    const u32 h_post_word = read_h_post(tables, lane);
    spread(h_post[0], h_post_word, 0, q), spread(h_post[1], h_post_word, 2, q);
#pragma unroll
    for (u32 unit = first; unit < last; ++unit) {
      if (!has_unit(unit)) break;
      u32 y_and_d_u[4];
      read_transposed(y_and_d_u, of_unit(vectors + stage * kPair, unit));
      const u32 y[2] = {y_and_d_u[0], y_and_d_u[1]};
      d_u[unit][0] = y_and_d_u[2], d_u[unit][1] = y_and_d_u[3];
      mix_x(x_new[unit], y, of_unit(streams + stage * kPair, unit), h_res, h_post);
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
    u32 half_dm[kOctets], h_pre, factors;
  };
  __device__ void read_reply(Reply& reply, u32 replies, int lane) const {
    const u32 of_token = replies + token_of_column(lane / 4) * kReplyStride;
    reply.h_pre = read1(of_token + kReplyGates + lane % 4 * 4);
    reply.factors = read1(of_token + kReplyFactor + lane % 4 * 4);
    u32 dm[2 * kOctets];
    read_dm<false>(dm, replies);
    const float scale = inverse_of_unit(low_half(read1(of_token + kReplyUnit)));
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet)
      reply.half_dm[octet] = half_pair(dm[2 * octet], dm[2 * octet + 1], scale);
  }

  // Adds units of a tile to d_phi = sum over tokens of vec(X')^T (r dm).
  __device__ void sum_phi(u32 first, u32 last, const u32 (&x_new)[kUnits][N][2], u32 replies) {
    // Rows 8 to 15 of the tokens are the same again, for the low parts.
    u32 dm[2 * kOctets];
    read_dm<true>(dm, replies);
#pragma unroll
    for (u32 unit = first; unit < last; ++unit) {
      if (!has_unit(unit)) break;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const u32 a0 = x_new[unit][i][0], a1 = x_new[unit][i][1];
#pragma unroll
        for (int part = 0; part < 2 * kOctets; ++part)
          mma_k8(d_phi[i][unit][part / 2], a0, a1, dm[part]);
      }
    }
  }

  // d_X'_in of a unit, for the products that mix it, or where it is added as it is: two channels of a stream and the
  // lane's tokens.
  __device__ void read_gradient(u32 (&gradient)[2][4], u32 slot, u32 unit) const {
    if constexpr (kIdentity) {
      read_transposed(gradient[0], of_unit(outputs + slot * kPair, unit));
      read_transposed(gradient[1], of_unit(outputs + slot * kPair + kPlane, unit));
    } else {
      read_streams(gradient, of_unit(gradients + slot * kPair, unit));
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
    wait_for_cluster(block.barrier(kRepliesFull, stage), rings.stages.parity);
    const u32 replies = block.reply(stage, 0);
    if constexpr (kSumsPhi) sum_phi(0, kAhead, x_new, replies);

    Reply reply;
    if constexpr (kKeepsReply) read_reply(reply, replies, lane);
    u32 gradient[kUnits][2][4];
    if constexpr (kGradientsFirst) {
#pragma unroll
      for (u32 unit = 0; unit < kUnits; ++unit) read_gradient(gradient[unit], slot, unit);
    }
#pragma unroll
    for (u32 unit = 0; unit < kUnits; ++unit) {
      if (!has_unit(unit)) break;
      if (unit >= kAhead) {
        begin(unit, unit + 1, x_new, d_u, tables, stage, lane);
        if constexpr (kSumsPhi) sum_phi(unit, unit + 1, x_new, replies);
      }
      if constexpr (!kKeepsReply) read_reply(reply, replies, lane);
      uint4 h_res_new = {};
      if constexpr (!kIdentity) h_res_new = read4(tables + kTableBytes + table);
      if constexpr (!kGradientsFirst) read_gradient(gradient[unit], slot, unit);
      // What follows from these for a unit is not kept in registers for the next one.
      for (u32* word : {&reply.h_pre, &reply.factors}) keep(*word);
      // d_X'[j] = sum over i of H_res_new[i, j] d_X'_in[i] + h_pre[j] d_u - f X'[j], to which (r dm) phi^T comes below:
      // channel g of the lane's tokens, channel g + 8 of these
      float values[N][4], factors[4];  // -f and the unit of r dm
      spread(factors, reply.factors, 0, q);
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
              mixed[v] = e ? high_half(pair) : low_half(pair);
            }
          } else {
            mix(mixed, gradient[unit][e], h_res_new, i, e);
          }
#pragma unroll
          for (u32 v = 0; v < 4; ++v) {
            const u32 d_u_pair = d_u[unit][v / 2], x_pair = x_new[unit][i + v % 2][v / 2];
            const float d_u_v = e ? high_half(d_u_pair) : low_half(d_u_pair);
            const float x_v = e ? high_half(x_pair) : low_half(x_pair);
            const float collapsed = fmaf(h_pre[v % 2 * 2 + e], d_u_v, mixed[v]);
            values[i + v % 2][v / 2 * 2 + e] = fmaf(factors[e], x_v, collapsed);
          }
        }
      }

      // d_X' += (r dm) phi^T,  d_y = sum over i of h_post[i] d_X'[i]
      float d_y[4] = {}, h_post[4];
      const u32 h_post_word = read_h_post(tables, lane);
      u32 rounded[2][4];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (i % 2 == 0) spread(h_post, h_post_word, i, q);
        float products[4] = {};
        if constexpr (!kHoldsPhi) read_phi(phi_words[i][unit], i, unit, lane);
        mma_half(products, phi_words[i][unit], reply.half_dm);
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          values[i][v] = fmaf(phi_units[unit] * factors[2 + v % 2], products[v], values[i][v]);
          d_y[v] = fmaf(h_post[i % 2 * 2 + v % 2], values[i][v], d_y[v]);
        }
        rounded[i / 2][i % 2 * 2] = pair(values[i][0], values[i][1]);
        rounded[i / 2][i % 2 * 2 + 1] = pair(values[i][2], values[i][3]);
      }
      write_transposed(of_unit(outputs + slot * kPair, unit), rounded[0]);
      write_transposed(of_unit(outputs + kPlane + slot * kPair, unit), rounded[1]);
      const u32 rounded_d_y[2] = {pair(d_y[0], d_y[1]), pair(d_y[2], d_y[3])};
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
        const int row = i * block.hidden + unit * kUnitStep + g;
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
  cluster_wait();
  Rings rings;
  for (int tile = 0; tile < block.num_tiles; ++tile, rings.next()) {
    if (warp == 0 && lane == 0) {
      const u32 replies_full = block.barrier(kRepliesFull, rings.stages.slot);
      arrive_and_expect(replies_full, kTileTokens * kReplyBytes);
    }
    self.tile(tile, rings, lane);
  }
  if constexpr (kSumsPhi) {
    const int of_cluster = block.first_tile * N * block.hidden;
    self.store_d_phi(static_cast<float*>(args.for_phi) + (of_cluster + row) * kColumns,
                     block.hidden - row);
  }
}
