// d_x with a cotangent that is deferred, of all streams at once: beside bfloat16 streams, of which there are up to 8. What
// the two tokens of a warp need of the next tile is on its way to registers meanwhile.

#include "two_pass/back_streams.cuh"

constexpr int kThreads = tuning_project_back_streams::threads;
constexpr int kWarps = kThreads / 32;
constexpr int kHexets = tuning_project_back_streams::hexets;
constexpr int kWarpTokens = kTile / kWarps;
static_assert(kTile == tuning_project_back_streams::tokens);
static_assert(kWarps * 8 == kChannels && kChannels == tuning_project_back_streams::channels);

// Shared memory: products of two tiles, and r dm of two as it is in memory.
constexpr u32 kDm = kHexets * 32 * 16;
constexpr u32 kSharedBytes = 2 * (kProducts + kDm);
static_assert(kSharedBytes == tuning_project_back_streams::shared_bytes);

// What a lane has of a token.
template <bool ALIGNED>
struct Inputs {
  Values values;
  Weights weights;

  __device__ void load(const Operands& from, int any_token, int block) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, octet = in_place(g);
    const long long token = min(any_token, from.tokens - 1), start = token * from.n * from.hidden;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = 2 * q + r;
      from.load<ALIGNED>(values.d_x_ins[r], from.d_x_in + start, from.stream(row),
                         from.first(row, block) + 8 * octet, from.end(row));
      from.load<ALIGNED>(values.xs[r], from.x + start, from.stream(g),
                         from.first(g, block) + 8 * in_place(2 * q + r), from.end(g));
    }
    values.d_u = {};
    if (q < kSets) {
      from.load<ALIGNED>(values.d_u, from.d_u + token * from.hidden, 0,
                         block + q * kChannels + 8 * octet, from.hidden);
    }
    weights.load(from, any_token, block);
  }

  __device__ void finish(const Operands& to, u32 products, int token, int tile, int block) const {
    const float2 factors = to.factors[min(tile * kTile + token, to.tokens - 1)];
    values.finish<ALIGNED>(to, weights, factors, products, token, tile, block);
  }
};

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
  Inputs<ALIGNED> inputs[kWarpTokens];
#pragma unroll
  for (int t = 0; t < kWarpTokens; ++t) {
    inputs[t].load(operands, tile * kTile + own_token + t, block);
  }
  Phi<kRows, kHexets> own_phi;
  own_phi.load(operands, phi, dm.num_columns, block, 0, warp);
  wait_for_async<1>();
  __syncthreads();  // r dm of the first tile is there

  for (; tile < tiles; tile += step, buffer ^= 1) {
    own_phi.multiply(dm_at(buffer), hexets, products_at(buffer), 0, warp);
    wait_for_async<0>();
    // The products are there, and r dm of the next tile. Nobody needs this tile's any more, or the products before.
    __syncthreads();
    copy_dm(tile + 2 * step, buffer);
#pragma unroll
    for (int t = 0; t < kWarpTokens; ++t) {
      inputs[t].finish(operands, products_at(buffer), own_token + t, tile, block);
      const int next = tile + step;
      if (next < tiles) inputs[t].load(operands, next * kTile + own_token + t, block);
    }
  }
}

// Blocks at once on a multiprocessor. Earlier chips' kernels need more registers than there are for two.
constexpr int kBlocks = __CUDA_ARCH__ >= 900 ? int(tuning_project_back_streams::blocks) : 1;

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
