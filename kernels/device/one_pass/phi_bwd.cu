// d_phi of post_pre's backward pass, where post_pre_bwd_one_pass.cu has no room for these sums and leaves r dm (n = 4):
//
//   X'     = H_res X + h_post y, as the forward pass rounds it
//   d_phi  = sum over tokens of vec(X')^T (r dm)
//
// A block has SIZE channels of all streams, as far as there are so many, and every gridDim.y-th tile of tokens. One warp
// loads; the main warps have 32 channels each, whose sums stay in their registers until the end. Two blocks share a multiprocessor.

#include "one_pass/phi.cuh"

constexpr int kTokens = tuning_phi_bwd::tokens;
constexpr int kStages = tuning_phi_bwd::stages;
constexpr int kMainWarps = SIZE / 32;
// The loader is one warp; registers go from four warps to four.
constexpr int kThreads = 32 * (kMainWarps + 4);
// Those of a main warp hold kUnits * N * kOctets * 4 sums.
constexpr int kMainRegisters = kOctets > 3 ? 208 : 192;
constexpr int kLoaderRegisters = 256 - kMainRegisters;
constexpr int kUnits = 2;  // of 16 channels, of a warp

// ---- shared memory ----------------------------------------------------------------------------------

// A stage: X as [stream, box, token, 64 channels], y alike, and rows of the tokens: H_res and h_post, and r dm in two
// bfloat16 parts. The strides keep rows in different banks that are read at once.
constexpr u32 kBox = Tile<kTokens>::kBoxBytes;
constexpr u32 kPlane = Tile<kTokens>::kPlaneBytes;
constexpr u32 kY = N * kPlane;
constexpr u32 kMixing = kY + kPlane;
constexpr u32 kMixingStride = (N * N + N) * 4;
constexpr u32 kDm = kMixing + kTokens * kMixingStride;
constexpr u32 kDmBytes = 2 * kColumns * 2;
constexpr u32 kDmStride = kDmBytes + 16;
constexpr u32 kStageBytes = (kDm + kTokens * kDmStride + 1023) / 1024 * 1024;
constexpr u32 kFirstStage = 1024;  // behind the barriers
constexpr u32 kSharedBytes = kFirstStage + kStages * kStageBytes;
static_assert(kSharedBytes == tuning_phi_bwd::shared_bytes && kThreads == tuning_phi_bwd::threads,
              "");

struct Stages {
  u32 base;
  // Barriers: all copies of the loader's lanes are there; no main warp needs the stage any more.
  __device__ u32 full(u32 slot) const { return base + 8 * slot; }
  __device__ u32 empty(u32 slot) const { return base + 8 * (kStages + slot); }
  __device__ u32 at(u32 slot) const { return base + kFirstStage + slot * kStageBytes; }
};

struct Operands {
  const float4 *h_post, *h_res;
  const uint4* r_dm;
  float* d_phi;
  int tokens, hidden;

  __device__ int num_tiles() const { return (tokens + kTokens - 1) / kTokens; }
};

// ---- loader -----------------------------------------------------------------------------------------

__device__ inline void load_tiles(const Stages& stages, const BlockMaps& x, const BlockMaps& y,
                                  const Operands& from, int lane) {
  constexpr int kDmParts = kDmBytes / 16;  // of a token
  const u64 policy = evict_first();
  const Lines<kTokens> lines(blockIdx.x * SIZE, from.hidden);
  Ring<kStages> ring;
  for (int tile = blockIdx.y; tile < from.num_tiles(); tile += gridDim.y, ring.next()) {
    const u32 stage = stages.at(ring.slot), full = stages.full(ring.slot);
    const size_t first = size_t(tile) * kTokens;
    const int count = from.tokens - tile * kTokens;
    wait(stages.empty(ring.slot), ring.parity ^ 1);
    if (lane == 0) {
      arrive_and_expect(full, (N + 1) * kPlane);
      lines.copy_in<N>(stage, x, tile * kTokens, full, policy);
      lines.copy_in<1>(stage + kY, y, tile * kTokens, full, policy);
    }
#pragma unroll
    for (int row = lane; row < kTokens * N; row += 32) {
      copy_part(stage + kMixing + row / N * kMixingStride + row % N * 16,
                from.h_res + first * N + row, row / N < count);
    }
    if (lane < kTokens) {
      copy_part(stage + kMixing + lane * kMixingStride + N * N * 4, from.h_post + first + lane,
                lane < count);
    }
#pragma unroll
    for (int part = lane; part < kTokens * kDmParts; part += 32) {
      copy_part(stage + kDm + part / kDmParts * kDmStride + part % kDmParts * 16,
                from.r_dm + first * kDmParts + part, part / kDmParts < count);
    }
    arrive_behind_copies(full);
  }
}

// ---- main warps -------------------------------------------------------------------------------------

// X' of two channels and two neighbouring tokens, as A fragments: x[j] and y are channel g and channel g + 8, each
// with both tokens in a word. The order of the sums is that of the forward pass.
__device__ inline void mix(u32 (&x_new)[2], const u32 (&x)[N][2], const u32 (&y)[2],
                           const float (&h_res)[2][N], float2 h_post) {
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    float sums[2] = {h_post.x * low_of<Stream>(y[c]), h_post.y * high_of<Stream>(y[c])};
#pragma unroll
    for (int j = 0; j < N; ++j) {
      sums[0] += h_res[0][j] * low_of<Stream>(x[j][c]);
      sums[1] += h_res[1][j] * high_of<Stream>(x[j][c]);
    }
    x_new[c] = pair_of((Stream*)nullptr, sums[0], sums[1]);
  }
}

__device__ inline void sum_tiles(const Stages& stages, const Operands& to, int warp, int lane) {
  const u32 row = lane % 8, matrix = lane / 8, g = lane / 4, q = lane % 4;
  // Within a stage, of the first unit and the first eight tokens: 16 bytes are 8 channels.
  const u32 box = warp / 2 * kBox, first_unit = warp % 2 * 4;
  const u32 streams = matrix / 2 * kPlane + box + swizzled(row, first_unit + matrix % 2);
  const u32 y_rows = kY + box + swizzled(row, first_unit + matrix % 2);
  const u32 dm_rows = kDm + row * kDmStride + matrix * 16;

  float d_phi[kUnits][N][kOctets][4] = {};
  Ring<kStages> ring;
  for (int tile = blockIdx.y; tile < to.num_tiles(); tile += gridDim.y, ring.next()) {
    const u32 stage = stages.at(ring.slot);
    wait(stages.full(ring.slot), ring.parity);
#pragma unroll
    for (u32 eight = 0; eight < kTokens; eight += 8) {
      const u32 mixing = stage + kMixing + (eight + 2 * q) * kMixingStride;
      float h_post[2][N];
#pragma unroll
      for (u32 t = 0; t < 2; ++t) read_floats(h_post[t], mixing + t * kMixingStride + N * N * 4);
      u32 dm[2 * kOctets];  // the octets of the high parts, then those of the low parts
#pragma unroll
      for (int part = 0; part < 2 * kOctets; part += 4) {
        const u32 at = stage + dm_rows + part * 16 + eight * kDmStride;
        if (part + 2 < 2 * kOctets) {
          read_transposed(reinterpret_cast<u32(&)[4]>(dm[part]), at);
        } else {
          read_transposed(reinterpret_cast<u32(&)[2]>(dm[part]), at);
        }
      }
      u32 x[kUnits][N][2], y[kUnits][2];
#pragma unroll
      for (u32 unit = 0; unit < kUnits; ++unit) {
        const u32 at = (stage + streams + eight * kRowBytes) ^ unit * 32;
        read_transposed(reinterpret_cast<u32(&)[4]>(x[unit][0]), at);
        read_transposed(reinterpret_cast<u32(&)[4]>(x[unit][2]), at + 2 * kPlane);
        read_transposed(y[unit], (stage + y_rows + eight * kRowBytes) ^ unit * 32);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) {
        float h_res[2][N];  // row i
#pragma unroll
        for (u32 t = 0; t < 2; ++t) read_floats(h_res[t], mixing + t * kMixingStride + i * 16);
#pragma unroll
        for (u32 unit = 0; unit < kUnits; ++unit) {
          u32 x_new[2];
          mix(x_new, x[unit], y[unit], h_res, {h_post[0][i], h_post[1][i]});
          add_columns(d_phi[unit][i], x_new, dm, [](int part) { return part % kOctets; });
        }
      }
    }
    __syncwarp();
    if (lane == 0) arrive(stages.empty(ring.slot));
  }

  const int channel_of_warp = blockIdx.x * SIZE + warp * 32;
  const int channels = padded(to.hidden);
  const size_t first = size_t(blockIdx.y) * N * channels + channel_of_warp + g;
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
    if (channel_of_warp + unit * 16 >= to.hidden) return;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const size_t channel = first + size_t(i) * channels + unit * 16;
      store_d_phi(to.d_phi + channel * kColumns, d_phi[unit][i], q);
    }
  }
}

// ---- kernel -----------------------------------------------------------------------------------------

// r_dm: [tokens, 2, kColumns], bfloat16. d_phi: [gridDim.y, 4, padded(C), kColumns], to be summed. The maps have boxes of kTokens tokens and
// SIZE channels; gridDim.x is C / SIZE, rounded up.
KERNEL(phi_bwd, kThreads, tuning_phi_bwd::blocks)
(const __grid_constant__ BlockMaps x, const __grid_constant__ BlockMaps y, const float4* h_post,
 const float4* h_res, const uint4* r_dm, float* d_phi, int tokens, int hidden) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Stages stages{shared_address(shared)};
  const Operands operands{h_post, h_res, r_dm, d_phi, tokens, hidden};
  if (threadIdx.x == 0) {
    for (u32 slot = 0; slot < kStages; ++slot) {
      init_barrier(stages.full(slot), 1 + 32);
      init_barrier(stages.empty(slot), kMainWarps);
    }
    publish_barriers();
  }
  __syncthreads();
  if (warp < kMainWarps) {
    take_registers<kMainRegisters>();
    sum_tiles(stages, operands, warp, lane);
  } else {
    give_registers<kLoaderRegisters>();
    if (warp == kMainWarps) load_tiles(stages, x, y, operands, lane);
  }
}
