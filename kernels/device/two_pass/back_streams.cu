// d_x with a cotangent that is deferred, of all streams at once: beside bfloat16 streams, of which there are up to 8.
//
//   d_x = H_res^T d_x_in + h_pre d_u + (r dm) phi^T - f X
//
// A block has 8 rows of 64 channels: those of 8 streams, or of fewer in several sets of channels. It goes through tiles of
// 16 tokens. First a warp multiplies r dm of all of them by phi of 8 channels of each row, which stays in registers; then
// it has two tokens alone, and all rows of them. Shared memory hands the products over. What a warp needs of its next
// two tokens is on its way to registers meanwhile.
//
// H_res is mixed on tensor cores, a token at a time, in two bfloat16 parts. Rows of several sets are multiplied by each
// other's zeros: an infinity or NaN of a token stays in the token, but may get to another channel of it.

#include "base/matrix.cuh"

constexpr int N = SIZE;
constexpr int kThreads = tuning_project_back_streams::threads;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 8;
constexpr int kSets = kRows / N;
constexpr int kChannels = tuning_project_back_streams::channels;
constexpr int kHexets = tuning_project_back_streams::hexets;
constexpr int kWarpTokens = kTile / kWarps;
static_assert(kTile == tuning_project_back_streams::tokens);
static_assert(kWarps * 8 == kChannels && kChannels == 64 && kRows % N == 0);

// ---- shared memory ------------------------------------------------------------------------------

// Two tiles: products as [token][row][64 channels], whose 16-byte pieces are in an order that lets lanes write and read
// all banks at once; r dm as it is in memory.
constexpr u32 kTokenBytes = kRows * kChannels * 4 + 32;
constexpr u32 kProducts = kTile * kTokenBytes;
constexpr u32 kDm = kHexets * 32 * 16;
constexpr u32 kSharedBytes = 2 * (kProducts + kDm);
static_assert(kSharedBytes == tuning_project_back_streams::shared_bytes);

// Of the four channels `piece` of a row.
__device__ inline u32 place_of(int token, int row, int piece) {
  return token * kTokenBytes + row * kChannels * 4 + (piece ^ piece / 8 ^ row % 2 * 2) * 16;
}

// ---- operands -----------------------------------------------------------------------------------

struct Operands {
  const Stream *x, *d_u, *d_x_in;
  const float *h_pre, *h_res;
  const float2* factors;
  Stream* d_x;
  int tokens, n, hidden;

  // Of a row of the block whose first channel is given: the stream, the first channel, and where the channels end; a
  // row without a stream has none.
  __device__ static int stream(int row) { return row % N; }
  __device__ static int first(int row, int block) { return block + row / N * kChannels; }
  __device__ int end(int row) const { return EXACT || stream(row) < n ? hidden : 0; }
};

// PIECES of 8 channels of a stream on their way to registers.
template <bool ALIGNED, int PIECES>
struct Part {
  Pack<Stream, 8> packs[PIECES];

  // From `at` on in the row at `row` of a token, from which on there are so many values. Behind the last channel of an
  // exact size they are others: nobody needs what comes of them. The result is for `get`.
  __device__ u32 load(const Stream* token, long long, int row, int at, int end) {
#pragma unroll
    for (int p = 0; p < PIECES; ++p, at += 8) {
      if constexpr (EXACT) {
        ::load<true>(packs[p], token + (row + min(at, end - 8)), 0, 1);
      } else {
        ::load<true>(packs[p], token + row, at, end);
      }
    }
    return 0;
  }
  __device__ Pack<Stream, 8> get(int piece, u32, int) const { return packs[piece]; }
};
// Where rows are not aligned it is the 16-byte words that they lie in, without a branch, so that all are on their way at
// once, and the byte of these where the channels begin. Places are counted in values from the word on in which the
// token begins, and from it on there are `num`.
template <int PIECES>
struct Part<false, PIECES> {
  uint4 words[PIECES + 1];

  __device__ u32 load(const Stream* token, long long num, int row, int at, int) {
    const u32 before = u64(token) % 16 / 2, first = before + u32(row) + u32(at);
    const uint4* const start = reinterpret_cast<const uint4*>(token - before);
    const u32 last = u32(min(before + num - 1, (1ll << 32) - 1)) / 8;
#pragma unroll
    for (int w = 0; w <= PIECES; ++w) words[w] = start[min(first / 8 + w, last)];
    return first % 8 * 2;
  }
  // Zeros behind so many channels.
  __device__ Pack<Stream, 8> get(int piece, u32 shift, int channels) const {
    const uint4 &low = words[piece], &high = words[piece + 1];
    u32 window[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    Pack<Stream, 8> pack;
    shift_words(pack.words, window, shift);
    if (channels < 8) {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int left = channels - 2 * w;
        pack.words[w] = left > 1 ? pack.words[w] : left == 1 ? pack.words[w] & 0xffff : 0;
      }
    }
    return pack;
  }
};

// An eighth of a row of 64 channels, of which so many are there, to a place that is not aligned: by 8 neighbouring lanes,
// each the aligned 16 bytes that begin in its channels, the last one what lies before the first and behind the last of
// these. `piece_of(i)`: the channels from 8 i on.
template <class PieceOf>
__device__ inline void store_part(Stream* row, int channels, PieceOf piece_of) {
  const int own = threadIdx.x % 8, shift = u64(row) % 16;
  const bool is_whole = channels >= kChannels, is_last = shift > 0 && own == 7;
  const uint4 low = piece_of(own), high = piece_of(is_whole && shift > 0 ? (own + 1) % 8 : own);
  u32 window[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  if (is_whole && !is_last) {
    u32 words[4];
    shift_words(words, window, (16 - shift) % 16);
    char* const at = reinterpret_cast<char*>(row) + 16 * own + (16 - shift) % 16;
    *reinterpret_cast<uint4*>(at) = {words[0], words[1], words[2], words[3]};
    return;
  }
  // Of the last channels those behind the aligned bytes, and the first ones up to them; of a row's end all.
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const bool is_first = is_whole && 2 * e < 16 - shift;
    const int channel = is_first ? e : 8 * own + e;
    const u32 word = is_first ? window[4 + e / 2] : window[e / 2];
    if (channel < channels) row[channel] = Stream{u16(word >> (e % 2 * 16))};
  }
}

// What a lane has of a token: of d_x_in 8 channels of the rows 2 q and 2 q + 1, from 8 g on, and of d_u those of set q; of
// X 16 channels of the row g, from 16 q on; in this row the weights of the former.
template <bool ALIGNED>
struct Inputs {
  Part<ALIGNED, 1> d_x_ins[2], d_u;
  Part<ALIGNED, 2> x;
  float h_res[2], h_pre;
  u32 shifts;  // 8 bits each of d_x_ins, d_u and x

  __device__ void load(const Operands& from, int any_token, int block) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const long long token = min(any_token, from.tokens - 1), start = token * from.n * from.hidden;
    const long long rest = (from.tokens - token) * from.hidden, num = rest * from.n;
    const float* h_of_token = from.h_res + token * from.n * from.n + from.stream(g);
    shifts = x.load(from.x + start, num, from.stream(g) * from.hidden,
                    from.first(g, block) + 16 * q, from.end(g))
             << 24;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = 2 * q + r;
      shifts |= d_x_ins[r].load(from.d_x_in + start, num, from.stream(row) * from.hidden,
                                from.first(row, block) + 8 * g, from.end(row))
                << 8 * r;
      const bool is_there = from.end(g) > 0 && from.end(row) > 0 && row / N == g / N;
      h_res[r] = is_there ? h_of_token[from.stream(row) * from.n] : 0.f;
    }
    d_u = {};
    if (q < kSets) {
      shifts |= d_u.load(from.d_u + token * from.hidden, rest, 0, block + q * kChannels + 8 * g,
                         from.hidden)
                << 16;
    }
    h_pre = from.end(g) > 0 ? from.h_pre[token * from.n + from.stream(g)] : 0.f;
  }

  // Stores d_x of the row g; `products` is the address of the tile's, of which this is `token`.
  __device__ void finish(const Operands& to, u32 products, int token, int tile, int block) const {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const float2 factors = to.factors[min(tile * kTile + token, to.tokens - 1)];
    // H_res^T and h_pre: the rows g of A are their upper parts, the rows g + 8 their lower ones. Column g of B is
    // channel 8 g + e.
    u32 h[2], own_h_pre[2];
    split(h_res[0], h_res[1], h);
    split(g / N == q ? h_pre : 0.f, 0.f, own_h_pre);
    const auto get_in = [&](int r) {
      const int row = 2 * q + r, channels = to.end(row) - to.first(row, block) - 8 * g;
      return d_x_ins[r].get(0, shifts >> 8 * r & 15, channels);
    };
    const Pack<Stream, 8> first_in = get_in(0), second_in = get_in(1);
    const Pack<Stream, 8> own_d_u =
        d_u.get(0, shifts >> 16 & 15, to.hidden - block - q * kChannels - 8 * g);
    float values[2][8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const auto pair_of_rows = [&](u32 low, u32 high) {
        return __byte_perm(low, high, e % 2 ? 0x7632 : 0x5410);
      };
      float mixed[4] = {};
      mma(mixed, h[0], h[1], own_h_pre[0], own_h_pre[1],
          {pair_of_rows(first_in.words[e / 2], second_in.words[e / 2]),
           pair_of_rows(own_d_u.words[e / 2], 0)});
#pragma unroll
      for (int r = 0; r < 2; ++r) values[r][e] = mixed[r] + mixed[2 + r];
    }
    if (tile * kTile + token >= to.tokens || (ALIGNED && to.end(g) == 0)) return;
    Pack<Stream, 8> results[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Pack<Stream, 8> own_x = x.get(r, shifts >> 24, 8);
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const uint4 four = read4(products + place_of(token, g, 4 * q + 2 * r + p));
        const u32 words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& value = values[r][4 * p + e];
          value += factors.y * __uint_as_float(words[e]);
          value -= factors.x * own_x[4 * p + e];
        }
      }
      results[r].set(values[r]);
      if (ALIGNED) {
        Stream* row =
            to.d_x + ((tile * kTile + token) * (long long)to.n + to.stream(g)) * to.hidden;
        store<true>(results[r], row, to.first(g, block) + 16 * q + 8 * r, to.end(g));
      }
    }
    if constexpr (!ALIGNED) {
      // Neighbouring lanes store neighbouring channels: the token's products make room for them.
      const u32 place = products + token * kTokenBytes;
      Stream* const start = to.d_x + (tile * kTile + token) * (long long)to.n * to.hidden;
      __syncwarp();
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const u32(&words)[4] = results[r].words;
        write4(place + g * 128 + ((2 * q + r) ^ g) * 16, {words[0], words[1], words[2], words[3]});
      }
      __syncwarp();
#pragma unroll 1
      for (int row = lane / 8; row < kRows; row += 4) {
        const int first = to.first(row, block);
        store_part(start + to.stream(row) * to.hidden + first, to.end(row) - first,
                   [&](int piece) { return read4(place + row * 128 + (piece ^ row) * 16); });
      }
    }
  }
};

// ---- the product with phi -----------------------------------------------------------------------

#include "two_pass/back_phi.cuh"

using Phi = PhiOf<kRows, kHexets>;

// ---- project_back_streams -----------------------------------------------------------------------

// Grid: groups of kSets * 64 channels, beside each other; sets of tiles. d_x_in may be d_x.
template <bool ALIGNED>
__device__ inline void project_back(const Operands& operands, const float* phi, Fragments dm,
                                    int groups) {
  extern __shared__ uint4 shared[];
  const u32 memory = u32(__cvta_generic_to_shared(shared));
  const int warp = threadIdx.x / 32, own_token = warp * kWarpTokens;
  const int block = blockIdx.x % groups * kSets * kChannels;
  const int tiles = (operands.tokens + kTile - 1) / kTile, step = gridDim.x / groups;
  const int hexets = dm.hexets();
  const auto products_at = [&](int buffer) { return memory + buffer * kProducts; };
  const auto dm_at = [&](int buffer) { return memory + 2 * kProducts + buffer * kDm; };
  const auto copy_dm = [&](int tile, int buffer) {
    if (tile < tiles) {
      const uint4* from = dm.row_fragments<1>(tile);
#pragma unroll 1
      for (int i = threadIdx.x; i < hexets * 32; i += kThreads) {
        copy_part(dm_at(buffer) + i * 16, from + i, true);
      }
    }
    commit_async();
  };

  int tile = blockIdx.x / groups, buffer = 0;
  if (tile >= tiles) return;
  copy_dm(tile, 0);
  copy_dm(tile + step, 1);
  // As many tokens are on their way as there are registers for.
  constexpr int kAhead = ALIGNED && (EXACT || N > 4) ? kWarpTokens : 1;
  Inputs<ALIGNED> inputs[kAhead];
#pragma unroll
  for (int t = 0; t < kAhead; ++t) {
    inputs[t].load(operands, tile * kTile + own_token + t, block);
  }
  Phi own_phi;
  own_phi.load(operands, phi, dm.num_columns, block);
  wait_for_async<1>();
  __syncthreads();  // r dm of the first tile is there

  for (; tile < tiles; tile += step, buffer ^= 1) {
    own_phi.multiply(dm_at(buffer), hexets, products_at(buffer));
    wait_for_async<0>();
    // The products are there, and r dm of the next tile. Nobody needs this tile's any more, or the products before.
    __syncthreads();
    copy_dm(tile + 2 * step, buffer);
#pragma unroll
    for (int t = 0; t < kWarpTokens; ++t) {
      Inputs<ALIGNED>& own = inputs[t % kAhead];
      own.finish(operands, products_at(buffer), own_token + t, tile, block);
      const int next = tile + (t + kAhead) / kWarpTokens * step;
      const int next_token = own_token + (t + kAhead) % kWarpTokens;
      if (next < tiles) own.load(operands, next * kTile + next_token, block);
    }
  }
}

// Blocks at once on a multiprocessor. Other chips' kernels need more registers than there are for two.
constexpr bool kHasRegisters = __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200;
constexpr int kBlocks = kHasRegisters ? int(tuning_project_back_streams::blocks) : 1;

#define BACK(name, aligned)                                                               \
  KERNEL(name, kThreads, kBlocks)                                                         \
  (const Stream* x, const float* phi, u32* rows, int num_columns, const float* h_pre,     \
   const float2* factors, const Stream* d_u, const Stream* d_x_in, const float* h_res,    \
   Stream* d_x, int tokens, int n, int hidden, int groups) {                              \
    project_back<aligned>(                                                                \
        {x, d_u, d_x_in, h_pre, h_res, factors, d_x, tokens, EXACT ? N : n, hidden}, phi, \
        {rows, nullptr, num_columns}, groups);                                            \
  }
BACK(project_back_streams, true)
#if !EXACT
BACK(project_back_streams_unaligned, false)
#endif
#undef BACK
