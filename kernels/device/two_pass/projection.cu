// The three products with phi and its gradient, for the ops that have a projection (pre, post_pre, head):
//
//   project        vec(X) phi and the sum of X^2, for slices of the n C values of a token        [14]
//   project_tiled  the same for many columns, from what phi_fragments makes of phi (project_tiled.cuh)
//   project_back   d_x = d_x_in + h_pre d_u + (r dm) phi^T - f X, with H_res^T d_x_in where that is deferred
//   d_phi          sums over some tokens of vec(X)^T (r dm)
//   sum_d_phi      d_phi, from these sums
//
// None but project_back depends on n but through n C and K. Sums over n C are cut into slices that depend on n C and K
// alone, so that a token's result does not depend on the others.

#include "base/matrix.cuh"

// Octets (groups of 8 columns) that a block works on.
constexpr int kOctets = SIZE;
constexpr int kStream = kStreamParts<Stream>;
constexpr int kWeight = kWeightParts<Stream>;
constexpr int kThreads = tuning_project_back::threads;
constexpr int kWarps = kThreads / 32;
static_assert(kThreads == tuning_project_back_mixing::threads &&
              kThreads == tuning_d_phi::threads && kThreads == tuning_sum_d_phi::threads);
static_assert(kTile == tuning_project_back::tokens && kTile == tuning_project_back_mixing::tokens &&
              kTile == tuning_d_phi::tokens);

// Tensor cores cut a sum off after every addition. Beside float32 streams every sum is therefore short,
// begins with the smallest products, and is added to the others by the units that round; the parts of
// the weights beside 16-bit streams err more than longer sums do.
constexpr bool kRounded = sizeof(Stream) == 4;

__device__ inline float weight(const float* phi, int k, int width, int c, int columns) {
  return k < width && c < columns ? phi[(long long)k * columns + c] : 0.f;
}

// ---- project ------------------------------------------------------------------------------------

#ifdef HAS_project

static_assert(kThreads == tuning_project::threads && kTile == tuning_project::tokens);

// Groups of 32 values whose loads are under way at once.
constexpr int kAhead = sizeof(Stream) == 2 ? 4 : 2;

// phi of `length` rows from k0 on, as B fragments: fragments[((step * kOctets + octet) * kWeight + part)
// * 32 + lane]. The lane's values of X are 8 neighbours, for two steps; so the rows of phi are taken in
// that order.
__device__ inline void stage_phi(uint2* fragments, const float* phi, int k0, int length, int width,
                                 int first_column, int columns) {
#pragma unroll 8
  for (int at = threadIdx.x; at < length / 16 * kOctets * 32; at += kThreads) {
    const int lane = at % 32, octet = at / 32 % kOctets, step = at / 32 / kOctets;
    const int k = k0 + step / 2 * 32 + lane % 4 * 8 + step % 2 * 4;
    const int c = first_column + octet * 8 + lane / 4;
    float w[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) w[e] = weight(phi, k + e, width, c, columns);
    u32 low[kWeight], high[kWeight];
    split(w[0], w[1], low);
    split(w[2], w[3], high);
#pragma unroll
    for (int p = 0; p < kWeight; ++p) {
      fragments[((step * kOctets + octet) * kWeight + p) * 32 + lane] = {low[p], high[p]};
    }
  }
}

// Some values of the tokens g and g + 8: kAhead groups of 32, of which a lane has 8 neighbours.
struct Batch {
  static constexpr int kValues = 32 * kAhead;
  Pack<Stream, 8> packs[kAhead][2];

  __device__ void load(const Stream* const (&rows)[2], int k, int width) {
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
#pragma unroll
      for (int h = 0; h < 2; ++h) ::load<true>(packs[a][h], rows[h], k + 32 * a, width);
    }
  }

  __device__ void add_squares(float (&squares)[2]) const {
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int e = 0; e < 8; ++e) squares[h] += packs[a][h][e] * packs[a][h][e];
      }
    }
  }

  __device__ void add_products(const uint2* phi, float (&sums)[kOctets][4]) const {
    float products[kOctets][4] = {};
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      u32 parts[2][kStream][4];
      split(packs[a][0], parts[0]);
      split(packs[a][1], parts[1]);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int octet = 0; octet < kOctets; ++octet) {
          float fresh[4] = {};
          float (&product)[4] = kRounded ? fresh : products[octet];
#pragma unroll
          for (int w = kWeight - 1; w >= 0; --w) {
            const uint2 b = phi[(((2 * a + s) * kOctets + octet) * kWeight + w) * 32];
#pragma unroll
            for (int p = kStream - 1; p >= 0; --p) {
              if (counts<Stream>(p, w)) {
                mma(product, parts[0][p][2 * s], parts[1][p][2 * s], parts[0][p][2 * s + 1],
                    parts[1][p][2 * s + 1], b);
              }
            }
          }
          if (kRounded) add(fresh, sums[octet]);
        }
      }
    }
    if constexpr (!kRounded) {
#pragma unroll
      for (int octet = 0; octet < kOctets; ++octet) add(products[octet], sums[octet]);
    }
  }

  __device__ static void add(const float (&product)[4], float (&sum)[4]) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e] += product[e];
  }
};

// partial: [tokens, slices, num_octets * 8 + 2], the last two entries the sum of squares and nothing.
// Grid: slices, groups of tokens, chunks of kOctets octets. Shared memory: fragments of `stage` rows.
__device__ inline void project(const Stream* x, const float* phi, float* partial, int tokens,
                               int width, int columns, int slice, int stage) {
  extern __shared__ uint2 fragments[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int first = blockIdx.x * slice, last = min(first + slice, width);
  const int first_octet = blockIdx.z * kOctets;
  const int row_length = (columns + 7) / 8 * 8 + 2;
  constexpr int kBlockTokens = kWarps * kTile;
  const int block_stride = gridDim.y * kBlockTokens;

  // Of the tokens of a block; rows behind the last token compute something that nobody reads.
  const auto rows_of = [&](int block, const Stream*(&rows)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      rows[h] = x + (long long)min(block + warp * kTile + g + 8 * h, tokens - 1) * width;
    }
  };

  bool staged = false;
  const Stream* rows[2];
  Batch batch, next;
  rows_of(blockIdx.y * kBlockTokens, rows);
  batch.load(rows, first + q * 8, width);
  for (int block = blockIdx.y * kBlockTokens; block < tokens; block += block_stride) {
    const int token = block + warp * kTile + g;
    float sums[kOctets][4] = {};
    float squares[2] = {};
    for (int from = first; from < last; from += stage) {
      if (!staged || slice > stage) {
        __syncthreads();
        stage_phi(fragments, phi, from, stage, width, first_octet * 8, columns);
        __syncthreads();
        staged = true;
      }
      const int to = min(from + stage, last);
      for (int k = from; k < to; k += Batch::kValues) {
        int next_k = k + Batch::kValues;
        if (next_k >= last) {
          next_k = first;
          rows_of(block + block_stride, rows);
        }
        next.load(rows, next_k + q * 8, width);
        batch.add_products(fragments + (k - from) / 16 * kOctets * kWeight * 32 + lane, sums);
        batch.add_squares(squares);
        batch = next;
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      squares[h] += __shfl_xor_sync(kAllLanes, squares[h], 1);
      squares[h] += __shfl_xor_sync(kAllLanes, squares[h], 2);
      if (token + 8 * h >= tokens) continue;
      float* out = partial + ((long long)(token + 8 * h) * gridDim.x + blockIdx.x) * row_length;
#pragma unroll
      for (int octet = 0; octet < kOctets; ++octet) {
        const int c = (first_octet + octet) * 8 + 2 * q;
        if (c < row_length - 2) {
          *reinterpret_cast<float2*>(out + c) = {sums[octet][2 * h], sums[octet][2 * h + 1]};
        }
      }
      if (blockIdx.z == 0 && q == 0) out[row_length - 2] = squares[h];
    }
  }
}

KERNEL(project, kThreads, kStream == 1 ? 2 : 1)
(const Stream* x, const float* phi, float* partial, int tokens, int width, int columns, int slice,
 int stage) {
  project(x, phi, partial, tokens, width, columns, slice, stage);
}

#else

#include "two_pass/project_tiled.cuh"

static_assert(kTile == tuning_project_tiled::tokens);

KERNEL(phi_fragments, tuning_phi_fragments::threads)
(const float* phi, uint2* fragments, int width, int columns, int octets, int chunks, int aligned) {
  tiled::phi_fragments(phi, fragments, width, columns, octets, chunks, aligned);
}

#define PROJECT(name, aligned)                                                              \
  KERNEL(name, tiled::kThreads, 1)                                                          \
  (const Stream* x, const uint2* phi, float* partial, int tokens, int width, int columns,   \
   int slice, int octets, int chunks, int stages) {                                         \
    tiled::project<aligned>(x, phi, partial, tokens, width, columns, slice, octets, chunks, \
                            stages);                                                        \
  }
PROJECT(project_tiled, true)
#if !EXACT
PROJECT(project_tiled_unaligned, false)
#endif
#undef PROJECT

#endif

// ---- project_back and d_phi ---------------------------------------------------------------------

// A warp goes through tiles of 16 tokens and 64 channels, of which it keeps phi or the sums for d_phi. Lane
// 4 g + q has the channels 8 g to 8 g + 7 of the tokens 2 q, 2 q + 1, 2 q + 8 and 2 q + 9, so that a
// warp reads and writes lines of 128 bytes. In the products j = 0 to 3 row g is channel 8 g + 2 j, and
// row g + 8 the next one.
constexpr int kChannels = tuning_d_phi::channels;
static_assert(kChannels == tuning_project_back::channels &&
              kChannels == tuning_project_back_mixing::channels);

__device__ inline int token_of(int r, int q) { return 2 * q + r % 2 + r / 2 * 8; }

// ---- project_back -------------------------------------------------------------------------------

#include "two_pass/project_back.cuh"

// Beside bfloat16 streams project_back_streams mixes.
#define BACK(name, aligned, mixes)                                                             \
  KERNEL(name, kThreads, back::kBlocks)                                                        \
  (const Stream* x, const float* phi, u32* rows, int num_columns, const float* h_pre,          \
   const float2* factors, const Stream* d_u, const Stream* d_x_in, const float* h_res,         \
   Stream* d_x, int tokens, int n, int hidden, int units, int has_phi, int has_dm) {           \
    if constexpr (!mixes || back::kParts > 1) {                                                \
      back::project_back<aligned, mixes>(x, phi, {rows, nullptr, num_columns}, h_pre, factors, \
                                         d_u, d_x_in, h_res, d_x, tokens, n, hidden, units,    \
                                         has_phi, has_dm);                                     \
    }                                                                                          \
  }
BACK(project_back, true, false)
BACK(project_back_mixing, true, true)
#if !EXACT
BACK(project_back_unaligned, false, false)
BACK(project_back_mixing_unaligned, false, true)
#endif
#undef BACK

// ---- d_phi --------------------------------------------------------------------------------------

#include "two_pass/d_phi.cuh"

#define D_PHI(name, aligned)                                                              \
  KERNEL(name, kThreads, phi_gradient::kBlocks)                                           \
  (const Stream* x, u32* rows, u32* columns, int num_columns, float* partial, int tokens, \
   int width, int chunk_octets, int chunks, int stages) {                                 \
    phi_gradient::d_phi<aligned>(x, {rows, columns, num_columns}, partial, tokens, width, \
                                 chunk_octets, chunks, stages);                           \
  }
D_PHI(d_phi, true)
#if !EXACT
D_PHI(d_phi_unaligned, false)
#endif
#undef D_PHI

KERNEL(sum_d_phi, kThreads)(const float* partial, float* d_phi, int splits, long long size) {
  const long long at = (long long)blockIdx.x * kThreads + threadIdx.x;
  if (at >= size) return;
  float sum = 0.f;
  for (int split = 0; split < splits; ++split) sum += partial[split * size + at];
  d_phi[at] = sum;
}
