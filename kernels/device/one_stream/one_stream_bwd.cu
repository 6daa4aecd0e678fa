// pre_bwd and post_pre_bwd of one stream, which is read once with its cotangent; sum_one_stream adds up what is left of
// the gradients of the parameters. In post_pre_bwd X is X' = H_res X + h_post y, formed again, and d_x the cotangent of
// X', of which those of y, h_post and H_res follow. A head is a pre with one column; it has no d_x_in, and no cotangents
// of coefficients.

#include "one_stream/one_stream.cuh"

struct Backward {
  const Stream *x, *d_u, *d_x_in, *y;
  const float *phi, *alpha, *bias;
  // Numbers of the tokens, those of post *_old; h_res is null where d_x_in is not deferred, and what there is not, too.
  const float *m, *r, *h_res, *d_h_pre, *d_h_post, *d_h_res, *h_post_old, *h_res_old;
  Stream *d_x, *d_y;
  float *d_h_post_old, *d_h_res_old, *d_phi, *gates;
  int tokens, hidden, columns;
};

// Numbers of a token in a slot: those that come there, and what the last warp makes of the first seven in their place.
// With d = <d_u, X> + d_h_pre, of which all else that waits for the sum over the channels follows:
//
//   r dm[0] = slope_r_dm d      f = f_rest + f_slope d
enum Number { kM = 0, kR = 3, kDHPre = 4, kDH = 4, kHRes = 7, kHPostOld = 8, kHResOld = 9 };
enum Made { kHPre = 0, kSlopeRDm = 1, kRDm = 2, kFRest = 5, kFSlope = 6 };

// The cotangent of the logit of H_res. Where all logits give the same it is zero, and what is not finite shows.
__device__ inline float d_z_res(const Settings& settings, float z, float d_h_res) {
  if (is_normalised(settings)) return (d_h_res - d_h_res) + (z - z);
  return settings.constraint == Constraint::kBirkhoff ? d_h_res * expf(z) : d_h_res;
}

// kSets sets of blockDim.x * V channels, of which a thread has V each. phi is in registers where there is one set, else
// in shared memory.
template <class Tuning, bool POST, int kSets>
__device__ inline void backward(const Backward& b, const Settings& settings) {
  constexpr bool kIsWide = kSets > 1;
  constexpr int kTokens = kIsWide ? int(Tuning::wide_tokens) : int(Tuning::tokens);
  constexpr int kStages = kIsWide ? int(Tuning::wide_stages) : int(Tuning::stages);
  extern __shared__ __align__(128) unsigned char memory[];
  const u32 start = shared_address(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  // <d_u, X>, then <d_x, y> and <d_x, X> of post.
  using Dots = Partials<kTokens>;
  using OfPost = Partials<2 * kTokens>;
  const Dots dots{start + kLineBytes};
  const OfPost of_post{dots.start + Dots::kWarpBytes * Dots::warps()};
  static_assert(Dots::kWarpBytes + OfPost::kWarpBytes <= kLineBytes);
  const u32 phi_at = start + kLineBytes * (1 + Dots::warps());
  const u32 phi_bytes = kIsWide ? kMostColumns * 4 * b.hidden : 0;
  Tiles<3 + POST, kTokens, true> tiles{{b.x, b.d_u, b.d_x_in}, b.tokens, b.hidden, kStages, start,
                                       phi_at + phi_bytes};
  if constexpr (POST) tiles.arrays[3] = b.y;
  const auto number = [&](long long token, int i) -> const float* {
    if (i < kR) return i < b.columns ? b.m + token * b.columns + i : nullptr;
    const float* const arrays[] = {b.r,     b.d_h_pre,    b.d_h_post, b.d_h_res,
                                   b.h_res, b.h_post_old, b.h_res_old};
    const float* array = nullptr;
#pragma unroll
    for (int a = 0; a < (POST ? 7 : 5); ++a) array = i == kR + a ? arrays[a] : array;
    return array ? array + token : nullptr;
  };

  dots.clear();
  if constexpr (POST) of_post.clear();
  tiles.start();
  if (warp == 0) {
    for (int slot = 0; slot + 1 < kStages; ++slot) {
      tiles.fetch(blockIdx.x + slot * gridDim.x, slot, number);
    }
  }

  const auto channel = [&](int set) { return int(threadIdx.x + set * blockDim.x) * V; };
  const auto has_channels = [&](int set) { return channel(set) < b.hidden; };
  // phi of the thread's channels.
  const auto load_phi = [&](int k, int set, int v) {
    const bool exists = has_channels(set) && k < b.columns;
    return exists ? b.phi[(channel(set) + v) * b.columns + k] : 0.f;
  };
  float phi[kMostColumns][V], d_phi[kSets][kMostColumns][V] = {};
  // In shared memory a thread has 16 bytes, its neighbour the next ones.
  const auto phi_place = [&](int k, int set, int v) {
    return phi_at + (k * V + v) * 4 * (b.hidden / V) + channel(set) / V * 16;
  };
#pragma unroll
  for (int set = 0; set < kSets; ++set) {
#pragma unroll
    for (int k = 0; k < kMostColumns; ++k) {
#pragma unroll
      for (int v = 0; v < V; ++v) phi[k][v] = load_phi(k, set, v);
      if (!kIsWide || !has_channels(set)) continue;
#pragma unroll
      for (int v = 0; v < V; v += 4) {
        write_float4(phi_place(k, set, v),
                     {phi[k][v], phi[k][v + 1], phi[k][v + 2], phi[k][v + 3]});
      }
    }
  }

  // The last warp has a lane for a column of a token, whose sums over tiles are for the gates.
  const bool makes = warp == warps - 1;
  const int k = lane % 4, token = lane / 4 % kTokens;
  const bool is_column = k < b.columns;
  const float alpha = is_column ? b.alpha[k] : 0.f, bias = is_column ? b.bias[k] : 0.f;
  float sum_d_z = 0.f, sum_d_z_m = 0.f;
  const auto store_of_post = [&](int tile, int turn) {
    const float sum = of_post.total(turn);
    const int value = lane / OfPost::kLanes;
    const long long own_token = (long long)tile * kTokens + value / 2;
    if (lane % OfPost::kLanes > 0 || own_token >= b.tokens) return;
    (value % 2 ? b.d_h_res_old : b.d_h_post_old)[own_token] = sum;
  };

  int slot = 0, parity = 0, turn = 0;
  for (int tile = blockIdx.x; tile < tiles.num(); tile += gridDim.x) {
    const int first = tile * kTokens, here = min(kTokens, b.tokens - first);
    wait(tiles.barrier(slot), parity);
    const auto channels = [&](int array, int t, int set) {
      return channels_of(tiles.row(slot, array, t), channel(set) / V * 16, has_channels(set));
    };
    const auto stream = [&](int t, const Pack<Stream, V>& x, const Pack<Stream, V>& y) {
      if constexpr (!POST) return x;
      const u32 numbers = tiles.numbers(slot, t);
      return new_stream(x, y, read_float(numbers + kHResOld * 4),
                        read_float(numbers + kHPostOld * 4));
    };

    float own_dots[kTokens] = {};
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
#pragma unroll
      for (int set = 0; set < kSets; ++set) {
        const Pack<Stream, V> d_u = channels(1, t, set);
        const Pack<Stream, V> x = stream(t, channels(0, t, set), channels(POST ? 3 : 0, t, set));
#pragma unroll
        for (int v = 0; v < V; ++v) own_dots[t] += d_u[v] * x[v];
      }
    }
    dots.add(own_dots, turn);
    // The cotangent of the lane's logit: that of h_pre is over d, until d is there.
    float m = 0.f, d_z = 0.f;
    if (makes) {
      const u32 numbers = tiles.numbers(slot, token);
      const auto of_token = [&](int i) { return read_float(numbers + i * 4); };
      // A token behind the last one has none of this.
      const bool counts = is_column && token < here;
      m = counts ? of_token(kM + k) : 0.f;
      const float d_h = counts ? of_token(kDH + k) : 0.f, r = of_token(kR);
      const float z = alpha * m + bias, s = sigmoid(z), slope = s * sigmoid(-z);
      d_z = !counts  ? 0.f
            : k == 0 ? slope
            : k == 1 ? d_h * settings.post_scale * slope
                     : d_z_res(settings, z, d_h);
      const float dm = alpha * d_z, own_f = r_slope(settings, r, b.hidden) * dm * m;
      // Those of the other columns of the lane's token.
      const float f_rest = __shfl_sync(kAllLanes, own_f, lane / 4 * 4 + 1) +
                           __shfl_sync(kAllLanes, own_f, lane / 4 * 4 + 2);
      __syncwarp();
      if (lane < 4 * kTokens && k < kMostColumns) {
        write_float(numbers + (k == 0 ? kSlopeRDm : kRDm + k - 1) * 4, r * dm);
        if (k == 0) {
          write_float(numbers + kHPre * 4, s + settings.pre_eps);
          write_float(numbers + kFRest * 4, f_rest);
          write_float(numbers + kFSlope * 4, own_f);
          if (!b.h_res) write_float(numbers + kHRes * 4, 1.f);
          if (!POST && !b.d_h_pre) write_float(numbers + kDHPre * 4, 0.f);
        }
      }
    }
    __syncthreads();
    if (warp == 0) {
      const int free = slot == 0 ? kStages - 1 : slot - 1;
      tiles.fetch(tile + (kStages - 1) * gridDim.x, free, number);
    }
    if (makes) {
      const float d = dots.total(turn, token) + read_float(tiles.numbers(slot, token) + kDHPre * 4);
      if (k == 0) d_z = token < here ? d_z * d : 0.f;
      sum_d_z += d_z;
      sum_d_z_m += d_z * m;
      if (POST && tile != blockIdx.x) store_of_post(tile - gridDim.x, turn ^ 1);
    }

    float sums[2 * kTokens] = {};
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (t >= here) break;
      const u32 numbers = tiles.numbers(slot, t);
      const float4 low = read_float4(numbers), high = read_float4(numbers + 16);
      const float d = dots.total(turn, t) + high.x;
      const float h_pre = low.x, f = high.y + high.z * d, h_res = high.w;
      const float r_dm[kMostColumns] = {low.y * d, low.z, low.w};
      const float h_post = POST ? read_float(numbers + kHPostOld * 4) : 0.f;
#pragma unroll
      for (int set = 0; set < kSets; ++set) {
        if (!has_channels(set)) continue;
        float values[V] = {};
#pragma unroll
        for (int c = 0; c < kMostColumns; ++c) {
#pragma unroll
          for (int v = 0; v < V; v += 4) {
            float own_phi[4] = {phi[c][v], phi[c][v + 1], phi[c][v + 2], phi[c][v + 3]};
            if constexpr (kIsWide) read_floats(own_phi, phi_place(c, set, v));
#pragma unroll
            for (int e = 0; e < 4; ++e) values[v + e] += r_dm[c] * own_phi[e];
          }
        }
        const Pack<Stream, V> d_u = channels(1, t, set);
        const Pack<Stream, V> d_x_in = POST || b.d_x_in ? channels(2, t, set) : Pack<Stream, V>{};
#pragma unroll
        for (int v = 0; v < V; ++v) values[v] += h_res * d_x_in[v] + h_pre * d_u[v];
        const Pack<Stream, V> old_x = channels(0, t, set), y = channels(POST ? 3 : 0, t, set);
        const Pack<Stream, V> x = stream(t, old_x, y);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          values[v] -= f * x[v];
#pragma unroll
          for (int c = 0; c < kMostColumns; ++c) d_phi[set][c][v] += r_dm[c] * x[v];
        }
        Pack<Stream, V> d_x;
        d_x.set(values);
        const long long at = (long long)(first + t) * b.hidden + channel(set);
        store(d_x, b.d_x + at);
        if constexpr (POST) {
#pragma unroll
          for (int v = 0; v < V; ++v) {
            values[v] = h_post * d_x[v];
            sums[2 * t] += d_x[v] * y[v];
            sums[2 * t + 1] += d_x[v] * old_x[v];
          }
          Pack<Stream, V> d_y;
          d_y.set(values);
          store(d_y, b.d_y + at);
        }
      }
    }
    if constexpr (POST) of_post.add(sums, turn);
    turn ^= 1;
    if (++slot == kStages) {
      slot = 0;
      parity ^= 1;
    }
    if (POST && tile + int(gridDim.x) >= tiles.num()) {
      __syncthreads();
      if (makes) store_of_post(tile, turn ^ 1);
    }
  }

  // A row [columns + 3] of sums for the gates.
#pragma unroll
  for (int step = 4; step < 4 * kTokens; step *= 2) {
    sum_d_z += __shfl_xor_sync(kAllLanes, sum_d_z, step);
    sum_d_z_m += __shfl_xor_sync(kAllLanes, sum_d_z_m, step);
  }
  if (makes && lane < kMostColumns) {
    float* gates = b.gates + blockIdx.x * (b.columns + 3);
    if (is_column) gates[k] = sum_d_z;
    gates[b.columns + k] = sum_d_z_m;
  }
  // The block's sums for d_phi, as that lies.
  float* out = b.d_phi + (long long)blockIdx.x * b.hidden * b.columns;
#pragma unroll
  for (int set = 0; set < kSets; ++set) {
    if (!has_channels(set)) continue;
    if (b.columns == kMostColumns) {
      float flat[kMostColumns * V];
#pragma unroll
      for (int i = 0; i < kMostColumns * V; ++i) {
        flat[i] = d_phi[set][i % kMostColumns][i / kMostColumns];
      }
#pragma unroll
      for (int i = 0; i < kMostColumns * V; i += 4) {
        reinterpret_cast<float4*>(out + channel(set) * kMostColumns)[i / 4] = {
            flat[i], flat[i + 1], flat[i + 2], flat[i + 3]};
      }
      continue;
    }
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int c = 0; c < kMostColumns; ++c) {
        if (c < b.columns) out[(channel(set) + v) * b.columns + c] = d_phi[set][c][v];
      }
    }
  }
}

template <class Tuning, bool POST>
__device__ inline void backward(const Backward& b, const Settings& settings) {
  if (b.hidden > int(blockDim.x) * V) {
    backward<Tuning, POST, 2>(b, settings);
  } else {
    backward<Tuning, POST, 1>(b, settings);
  }
}

// d_phi: [blocks, hidden, columns], gates: [blocks, columns + 3]. d_x may lie where d_x_in lies.
KERNEL(pre_bwd_one_stream, tuning_pre_bwd_one_stream::threads, 1)
(const Stream* x, const Stream* d_u, const Stream* d_x_in, const float* phi, const float* alpha,
 const float* bias, const float* m, const float* r, const float* h_res, const float* d_h_pre,
 const float* d_h_post, const float* d_h_res, Stream* d_x, float* d_phi, float* gates, int tokens,
 int hidden, int columns, Settings settings) {
  const Backward b{x,       d_u,     d_x_in,  nullptr,  phi,     alpha,   bias,    m,
                   r,       h_res,   d_h_pre, d_h_post, d_h_res, nullptr, nullptr, d_x,
                   nullptr, nullptr, nullptr, d_phi,    gates,   tokens,  hidden,  columns};
  backward<tuning_pre_bwd_one_stream, false>(b, settings);
}

KERNEL(post_pre_bwd_one_stream, tuning_post_pre_bwd_one_stream::threads, 1)
(const Stream* x, const Stream* d_u, const Stream* d_x_in, const Stream* y, const float* phi,
 const float* alpha, const float* bias, const float* m, const float* r, const float* h_res,
 const float* d_h_pre, const float* d_h_post, const float* d_h_res, const float* h_post_old,
 const float* h_res_old, Stream* d_x, Stream* d_y, float* d_h_post_old, float* d_h_res_old,
 float* d_phi, float* gates, int tokens, int hidden, int columns, Settings settings) {
  const Backward b{x,           d_u,        d_x_in,    y,      phi,     alpha,
                   bias,        m,          r,         h_res,  d_h_pre, d_h_post,
                   d_h_res,     h_post_old, h_res_old, d_x,    d_y,     d_h_post_old,
                   d_h_res_old, d_phi,      gates,     tokens, hidden,  columns};
  backward<tuning_post_pre_bwd_one_stream, true>(b, settings);
}
