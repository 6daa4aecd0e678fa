// How streams are mixed in post_pre_bwd_one_pass.cu, behind whose sizes and `Block` this is included: tables of a tile,
// which the finisher writes, and what main warps make of them. Four streams are mixed on tensor cores, two by a
// multiplication for each number, which for so few is no more work.

#pragma once

// Fragments of 16 channels and 8 tokens have the channels g and g + 8, and in neighbouring columns the
// tokens q and 4 + (q ^ 2): so those of two products with four tokens each make one for eight. `2`: what lanes have of a
// table for one product is zero where they have something for the other.
__device__ inline u32 token_of_column(u32 column) {
  return column % 2 ? 4 + (column / 2 ^ 2) : column / 2;
}

// What tokens have four numbers of, of which lane 4 g + q has the q-th of column g's token in a word: two of them
// (of stream i and i + 1, say) for the lane's two tokens, as the results of products have their columns. A product with
// ones brings them there; reading each number would take as many turns of shared memory as 128 bytes.
__device__ inline void spread(float (&numbers)[4], u32 word, u32 i, u32 q) {
  constexpr u32 kOnes = 0x3f803f80;
  // Else what follows from q alone is kept for all tiles, in four registers that are not there.
  if constexpr (N > 2 && (!kKeepsReply || kUnits > 3)) keep(q);
#pragma unroll
  for (float& number : numbers) number = 0.f;
  mma_k8(numbers, q == i ? kOnes : 0, q == i + 1 ? kOnes : 0, word);
}
// This lane's word of tokens with four each, or two that each of two lanes gets, one behind the other.
__device__ inline u32 word_to_spread(u32 first, u32 token_bytes, int lane) {
  return read1(first + token_of_column(lane / 4) * token_bytes + lane % (token_bytes / 4) * 4);
}

// ---- tables --------------------------------------------------------------------------------------------

// Tables that the main warps mix by, as words. A lane of the finisher has some of a token's numbers.
template <int STREAMS>
struct Tables;

// A lane has a token's row i of H_res (for X'[i]) and column i of H_res_new (for d_X'[i]), each number in a word. The
// words of the streams j and j + 2 lie side by side, and so do those of i and i + 2: see `Mixing::table`.
template <>
struct Tables<4> {
  const Block& block;
  const Args& args;
  const int lane;
  float row[4], column[4];
  float4 h_post;

  __device__ void load(int tile) {
    const int t = lane / 4, i = lane % 4;
    const long long token = block.first_token(tile) + t, whole = block.first_token(tile) + lane;
    const bool exists = tile < block.num_tiles && token < args.tokens;
    const float4 v =
        exists ? __ldg(reinterpret_cast<const float4*>(args.h_res) + token * 4 + i) : float4{};
    row[0] = v.x, row[1] = v.y, row[2] = v.z, row[3] = v.w;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      column[k] = k == i;
      if (!kIdentity && args.deferred)
        column[k] = exists ? __ldg(args.h_res_new + (token * 4 + k) * 4 + i) : 0.f;
    }
    const bool has_h_post = lane < kTileTokens && tile < block.num_tiles && whole < args.tokens;
    h_post = has_h_post ? __ldg(reinterpret_cast<const float4*>(args.h_post) + whole) : float4{};
  }

  // Where the words of a token are that lanes with stream i (modulo 2) of it read. Tokens that are read at once (see
  // `Mixing::table`) lie in different banks.
  __device__ static u32 place(u32 t, u32 i) { return ((t ^ t / 4) * 2 + i % 2) * 32; }

  // A lane's numbers of a token's matrix, in the unit that is returned.
  __device__ static float write(u32 at, const float (&values)[4]) {
    if constexpr (kHasUnits) {
      u32 largest = 0;
#pragma unroll
      for (float v : values) largest = max(largest, magnitude(v));
#pragma unroll
      for (u32 step = 1; step < 4; step *= 2)
        largest = max(largest, __shfl_xor_sync(kAllLanes, largest, step));
      const float unit = half_unit(largest), scale = inverse_of_unit(unit);
      write2(at, {half_word_of(values[0] * scale), half_word_of(values[2] * scale)});
      write2(at + 16, {half_word_of(values[1] * scale), half_word_of(values[3] * scale)});
      return unit;
    } else {
      write2(at, {word_of(values[0]), word_of(values[2])});
      write2(at + 16, {word_of(values[1]), word_of(values[3])});
      return 1.f;
    }
  }

  __device__ void write(int tile) const {
    if (tile >= block.num_tiles) return;
    const u32 t = lane / 4, i = lane % 4;
    const u32 tables = block.tables(tile), at = place(t, i) + i / 2 * 8;
    const float unit = write(tables + at, row);
    float unit_new = 1.f;
    if constexpr (!kIdentity) unit_new = write(tables + kTableBytes + at, column);
    if (kHasUnits && i == 0)
      write2(tables + kTableUnits + t * kTableUnitsBytes, {word_of(unit), word_of(unit_new)});
    if (lane < kTileTokens) {
      write4(tables + kHPost + lane * kHPostBytes,
             {word_of(h_post.x), word_of(h_post.y), word_of(h_post.z), word_of(h_post.w)});
    }
    __syncwarp();
    if (lane == 0) arrive(block.barrier(kTablesFull, tile % 2));
  }
};

// Lane 4 t + 2 i + j has of token t H_res[i, j] and H_res_new[j, i], and the first lanes of a token h_post. The tables
// are in the order of the lanes.
template <>
struct Tables<2> {
  static_assert(kTileTokens * 4 == 32, "a lane has a number of each table");
  const Block& block;
  const Args& args;
  const int lane;
  float h_res, transposed, h_post;

  __device__ void load(int tile) {
    const int k = lane % 4, i = k / 2, j = k % 2;
    const long long token = block.first_token(tile) + lane / 4;
    const bool exists = tile < block.num_tiles && token < args.tokens;
    h_res = exists ? __ldg(args.h_res + token * 4 + k) : 0.f;
    transposed = i == j;
    if (args.deferred) transposed = exists ? __ldg(args.h_res_new + token * 4 + j * 2 + i) : 0.f;
    h_post = exists && k < 2 ? __ldg(args.h_post + token * 2 + k) : 0.f;
  }

  __device__ void write(int tile) const {
    if (tile >= block.num_tiles) return;
    const u32 at = block.tables(tile) + lane * 4;
    write1(at, word_of(h_res));
    write1(at + kTableBytes, word_of(transposed));
    write1(at + kHPost, word_of(h_post));
    __syncwarp();
    if (lane == 0) arrive(block.barrier(kTablesFull, tile % 2));
  }
};

// ---- mixing --------------------------------------------------------------------------------------------

// Numbers with which main warps mix streams, by H_res (`which` = 0) or the transposed H_res_new. Results are (channel g, i),
// (g, i + 1), (g + 8, i), (g + 8, i + 1) of one of the lane's two tokens, the first (e = 0) or the second, for the streams
// i and i + 1.
template <int STREAMS>
struct Mixing;

template <>
struct Mixing<4> {
  struct Weights {
    uint4 words;     // this lane's, of a table
    float units[2];  // where there are some, those of the lane's tokens
  };

  u32 table;  // where these lie
  u32 take_high[2],
      take_low[2];  // what makes fragments of them, for the products of either four tokens

  // A fragment that mixes has a token of stream g % 2 in column g, and in the rows 2q and 2q + 1 two tokens of another
  // stream: at most one of both is the column's, and the rest is zero. Of the tokens 0 to 3 column g has g / 2, of the
  // others 4 + (g / 2 ^ 2): so a lane has a word of one of the two fragments alone.
  __device__ void init(int lane) {
    const u32 g = lane / 4, q = lane % 4;
    const u32 which = g / 4 == q % 2 ? 0 : 1, upper = g / 2 % 2;
    table = Tables<4>::place(which ? 4 + (g / 2 ^ 2) : g / 2, g) + q / 2 * 16;
#pragma unroll
    for (u32 e = 0; e < 2; ++e) {
      take_high[e] = e != which ? 0x4444 : upper ? 0x1044 : 0x4410;
      take_low[e] = e != which ? 0x4444 : upper ? 0x3244 : 0x4432;
    }
  }
  __device__ void keep_all() {
    for (u32* number : {&table, &take_high[0], &take_high[1], &take_low[0], &take_low[1]})
      keep(*number);
  }

  // Rows (k) are stream * 4 + token % 4.
  struct Row {
    u32 stream, token;
    __device__ Row(int lane, u32 row) {
      const u32 k = lane / 16 * 8 + row;
      stream = k / 4, token = k % 4;
    }
  };
  // Of the tokens 0 to 3 and 4 to 7.
  __device__ static void read_streams(u32 (&fragments)[2][4], u32 at) {
    read_transposed(fragments[0], at);
    read_transposed(fragments[1], (at ^ 4 * 16) + 4 * kRowBytes);
  }
  __device__ Weights read(u32 tables, u32 which, int lane) const {
    Weights weights;
    weights.words = read4(tables + which * kTableBytes + table);
    if constexpr (kHasUnits) {
      float units[4];
      spread(units, word_to_spread(tables + kTableUnits, kTableUnitsBytes, lane), which, lane % 4);
      weights.units[0] = units[0], weights.units[1] = units[1];
    }
    return weights;
  }

  __device__ void mix(float (&mixed)[4], const u32 (&streams)[2][4], const Weights& weights, u32 i,
                      u32 e) const {
    const u32(&own)[4] = streams[e];
    const uint4 words = weights.words;
    const u32 first = i ? words.z : words.x, second = i ? words.w : words.y;
    mma_of<Stream>(mixed, {own[0], own[1], own[2], own[3]},
                   {__byte_perm(first, 0, take_high[e]), __byte_perm(second, 0, take_high[e])});
    mma_of<Stream>(mixed, {own[0], own[1], own[2], own[3]},
                   {__byte_perm(first, 0, take_low[e]), __byte_perm(second, 0, take_low[e])});
    if constexpr (kHasUnits) {
#pragma unroll
      for (float& v : mixed) v *= weights.units[e];
    }
  }
};

template <>
struct Mixing<2> {
  // For stream i: those of the streams 0 and 1, for two tokens each.
  struct Weights {
    float of[2][4];
  };

  __device__ void init(int) {}
  __device__ void keep_all() {}

  // As the results have their columns.
  struct Row {
    u32 stream, token;
    __device__ Row(int lane, u32 row) : stream(lane / 16), token(token_of_column(row)) {}
  };
  __device__ static void read_streams(u32 (&fragments)[1][4], u32 at) {
    read_transposed(fragments[0], at);
  }
  __device__ Weights read(u32 tables, u32 which, int lane) const {
    Weights weights;
    const u32 word = word_to_spread(tables + which * kTableBytes, 16, lane);
    spread(weights.of[0], word, 0, lane % 4), spread(weights.of[1], word, 2, lane % 4);
    return weights;
  }

  __device__ void mix(float (&mixed)[4], const u32 (&streams)[1][4], const Weights& weights, u32,
                      u32 e) const {
#pragma unroll
    for (u32 v = 0; v < 4; ++v) {
      const float (&own)[4] = weights.of[v % 2];
      const u32 pair0 = streams[0][v / 2], pair1 = streams[0][2 + v / 2];
      const float x0 = e ? high_of<Stream>(pair0) : low_of<Stream>(pair0);
      const float x1 = e ? high_of<Stream>(pair1) : low_of<Stream>(pair1);
      mixed[v] = fmaf(own[2 + e], x1, own[e] * x0);
    }
  }
};
