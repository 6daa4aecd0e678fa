// d_x beside many bfloat16 streams, to which d_x_in is added as it is, by warpgroups:
//
//   phi_back_lines      phi in float16, in units of octets of channels
//   project_back_lines  d_x = d_x_in + h_pre d_u + (r dm) phi^T - f X
//
// A block keeps phi of 256 channels, and a warpgroup goes through tiles of 64 tokens, of which its warps have r dm in
// registers, 16 tokens each. While 64 channels of them are multiplied, what is added to the next 64 is on its way.

#include "one_pass/one_pass.cuh"

constexpr int kHexets = SIZE / 2;
// Columns of a line, and lines of a channel.
constexpr int kLine = 64, kLines = (SIZE * 8 + kLine - 1) / kLine;
// Channels that are multiplied at once, a group, and the bytes of their phi: [line of columns][place of the channel].
constexpr int kGroup = 64;
constexpr u32 kLinesBytes = kGroup * kRowBytes, kGroupBytes = kLines * kLinesBytes;
constexpr int kUnits = 8;  // pieces of 16 bytes of a line

// The place of a channel of a group among the columns of the product, such that a lane has two octets of channels: q and
// q + 4 of the columns 2 q and 2 q + 1 of 8 in turn, 4 times each.
__device__ inline int place_of(int channel) {
  const int octet = channel / 8, own = channel % 8;
  return (octet / 4 * 4 + own / 2) * 8 + octet % 4 * 2 + own % 2;
}

// A warp has an octet of channels. lines: [group][line of columns][place]; units: those of the octets.
KERNEL(phi_back_lines, tuning_phi_back_lines::threads)
(const float* phi, uint4* lines, float* units, int width, int columns) {
  const int octet = blockIdx.x * (tuning_phi_back_lines::threads / 32) + threadIdx.x / 32;
  if (octet >= width / 8) return;
  const int lane = threadIdx.x % 32;
  const float* own = phi + (long long)octet * 8 * columns;
  const float unit = unit_of(own, 8 * columns), scale = inverse_of_unit(unit);
  if (lane == 0) units[octet] = unit;
  uint4* group = lines + (long long)(octet / 8) * (kGroupBytes / 16);
  for (int at = lane; at < 8 * kLines * kUnits; at += 32) {
    const int channel = at / (kLines * kUnits), piece = at % (kLines * kUnits);
    u32 words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int c = piece * 8 + 2 * w;
      const float* from = own + channel * columns + c;
      words[w] = half_pair((c < columns ? from[0] : 0.f) * scale,
                           (c + 1 < columns ? from[1] : 0.f) * scale);
    }
    const int place = place_of(octet % 8 * 8 + channel);
    group[(piece / kUnits * kGroup + place) * kUnits + (piece % kUnits ^ place % 8)] = {
        words[0], words[1], words[2], words[3]};
  }
}

// ---- project_back_lines -----------------------------------------------------------------------------

extern __shared__ __align__(1024) unsigned char memory[];

constexpr int kThreads = tuning_project_back_lines::threads;
constexpr int kWarpgroups = kThreads / 128, kTokens = 64;
constexpr int kGroups = tuning_project_back_lines::channels / kGroup;
static_assert(tuning_project_back_lines::tokens == kTile && kTokens == 4 * kTile);
static_assert(kGroups * kGroupBytes + 8 <= tuning_project_back_lines::shared_bytes);

struct Operands {
  const Stream *x, *d_u, *d_x_in;
  const float *h_pre, *units;
  const float2* factors;
  Stream* d_x;
  int tokens, n, hidden;
};

// Numbers that a lane adds to a group: of the tokens g and g + 8 of its warp the octets q and q + 4.
struct Added {
  Pack<Stream, 8> x[2][2], d_u[2][2], d_x_in[2][2];
  float h_pre[2], units[2];

  __device__ void load(const Operands& from, int warp_token, int group) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const int first = group * kGroup, stream = first / from.hidden, channel = first % from.hidden;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const long long token = min(warp_token + g + 8 * h, from.tokens - 1);
      h_pre[h] = from.h_pre[token * from.n + stream];
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        const int own = 8 * (q + 4 * o);
        const long long at = token * from.n * from.hidden + first + own;
        ::load<true>(x[h][o], from.x + at, 0, 1);
        ::load<true>(d_u[h][o], from.d_u + token * from.hidden + channel + own, 0, 1);
        d_x_in[h][o] = {};
        if (from.d_x_in) ::load<true>(d_x_in[h][o], from.d_x_in + at, 0, 1);
      }
    }
#pragma unroll
    for (int o = 0; o < 2; ++o) units[o] = from.units[first / 8 + q + 4 * o];
  }

  __device__ void finish(const Operands& to, const float (&sums)[32], const float2 (&factors)[2],
                         int warp_token, int group) const {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int token = warp_token + g + 8 * h;
      if (token >= to.tokens) continue;
      Stream* row = to.d_x + (long long)token * to.n * to.hidden + group * kGroup;
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        const float unit = units[o] * factors[h].y;
        float values[8];
#pragma unroll
        for (int v = 0; v < 8; ++v) {
          const float sum = sums[(4 * o + v / 2) * 4 + 2 * h + v % 2];
          values[v] = sum * unit + h_pre[h] * d_u[h][o][v];
          values[v] -= factors[h].x * x[h][o][v];
          values[v] += d_x_in[h][o][v];
        }
        Pack<Stream, 8> result;
        result.set(values);
        store<true>(result, row + 8 * (q + 4 * o), 0, 1);
      }
    }
  }
};

// Grid: blocks of 256 channels; sets of tiles. d_x_in: null for none, or d_x itself. A stream has whole groups.
KERNEL(project_back_lines, kThreads, 1)
(const Stream* x, const uint4* lines, const float* units, u32* rows, int num_columns,
 const float* h_pre, const float2* all_factors, const Stream* d_u, const Stream* d_x_in,
 Stream* d_x, int tokens, int n, int hidden) {
  const Operands operands{x, d_u, d_x_in, h_pre, units, all_factors, d_x, tokens, n, hidden};
  const Fragments dm{rows, nullptr, num_columns};
  const u32 phi = shared_address(memory), is_there = phi + kGroups * kGroupBytes;
  const int first_group = blockIdx.x * kGroups;
  const int groups = min(kGroups, n * hidden / kGroup - first_group);
  if (threadIdx.x == 0) {
    init_barrier(is_there, 1);
    publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    arrive_and_expect(is_there, groups * kGroupBytes);
    for (int group = 0; group < groups; ++group) {
      copy_in(phi + group * kGroupBytes,
              lines + (long long)(first_group + group) * (kGroupBytes / 16), kGroupBytes, is_there);
    }
  }

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
  const int tiles = (tokens + kTokens - 1) / kTokens, step = gridDim.y * kWarpgroups;
  const int warp_tiles = (tokens + kTile - 1) / kTile, hexets = dm.hexets();
  int tile = blockIdx.y * kWarpgroups + warp / 4, group = 0;
  const auto warp_tile = [&](int tile) { return tile * (kTokens / kTile) + warp % 4; };

  u32 r_dm[kHexets][4];
  float2 factors[2];
  // Of a tile; zero behind the last token and behind the last column.
  const auto load_tile = [&] {
    const int own = warp_tile(tile);
    const uint4* from = dm.row_fragments<1>(own) + lane;
#pragma unroll
    for (int hexet = 0; hexet < kHexets; ++hexet) {
      uint4 four = {};
      if (own < warp_tiles && hexet < hexets) four = from[hexet * 32];
      r_dm[hexet][0] = four.x, r_dm[hexet][1] = four.y;
      r_dm[hexet][2] = four.z, r_dm[hexet][3] = four.w;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      factors[h] = all_factors[min(own * kTile + g + 8 * h, tokens - 1)];
    }
  };

  Added added;
  if (tile < tiles) added.load(operands, warp_tile(tile) * kTile, first_group);
  wait(is_there, 0);
  while (tile < tiles) {
    if (group == 0) load_tile();
    float sums[32];
    begin_products();
#pragma unroll
    for (int hexet = 0; hexet < kHexets; ++hexet) {
      const u32 at = phi + group * kGroupBytes + hexet / 4 * kLinesBytes + hexet % 4 * 32;
      multiply_half(sums, r_dm[hexet], lines_at(at), hexet > 0);
    }
    commit_products();
    const int token = warp_tile(tile) * kTile, own_group = first_group + group;
    if (++group == groups) {
      group = 0;
      tile += step;
    }
    Added next;
    if (tile < tiles) next.load(operands, warp_tile(tile) * kTile, first_group + group);
    finish_products();
#pragma unroll
    for (int s = 0; s < 32; ++s) keep(sums[s]);
    added.finish(operands, sums, factors, token, own_group);
    added = next;
  }
}
