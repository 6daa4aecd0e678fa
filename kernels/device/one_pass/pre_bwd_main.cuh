// The main warps of pre_bwd_one_pass.cu, which includes this behind its sizes and its `Block`.
//
//   d_x[j] = sum over i of h_res[i, j] d_x_in[i] + h_pre[j] d_u + (r dm) phi^T - f X[j]
//   d_phi  = sum over tokens of vec(X)^T (r dm), where kSumsPhi
//
// and with a norm of the layer's input (NORM)
//
//   u      = sum over i of h_pre[i] X[i], again, and the cotangent of u in place of d_u
//   dw     = sum over tokens of g rho u

#pragma once

// A fragment of phi (phi.cuh) with its way through shared memory.
struct PhiFragment {
  u32 words[kPhiWords];

  // This lane's elements, from the first on; zeros for those channels that are not among so many from its own on.
  __device__ static void load(float2 (&values)[kPhiWords], const float* first, int channels) {
#pragma unroll
    for (int w = 0; w < kPhiWords; ++w) {
      const float* at = first + w % 2 * 8 * kColumns + w / 2 * 8;
      values[w] = w % 2 * 8 < channels ? *reinterpret_cast<const float2*>(at) : float2{};
    }
  }
  __device__ void set(const float2 (&values)[kPhiWords], float scale) {
    round_phi(words, values, scale);
  }
  __device__ void write(u32 at) const {
#pragma unroll
    for (int w = 0; w < kPhiWords; w += 2) write2(at + w * 128, {words[w], words[w + 1]});
  }
  __device__ void read(u32 at) {
#pragma unroll
    for (int w = 0; w < kPhiWords; w += 2) {
      const uint2 v = read2(at + w * 128);
      words[w] = v.x, words[w + 1] = v.y;
    }
  }
};

// The first channel of this thread in a turn, which may lie behind the last; it has the eighth from there on, too. Asks
// for its place, so that it need not be kept in registers meanwhile.
__device__ inline int channel_at(int turn) {
  const u32 thread = thread_id();
  const int warp = thread / 32;
  const int unit = turn * kMainWarps + (turn < kTurns ? warp : warp / 2);
  return cluster_rank() * SIZE + unit * 16 + thread % 32 / 4;
}

// Channels from this thread's first one in a turn to the last; none, or less, where that lies behind it. For all of a warp
// alike there are some, and more than 8.
__device__ inline int channels_left(int turn, int hidden) { return hidden - channel_at(turn); }
__device__ inline bool is_there(int turn, int hidden) { return channels_left(turn, hidden) > 0; }

// Where this thread's elements of fragment f of phi or d_phi begin, if they are there, in streams of so many channels; asks
// for its place, too.
__device__ inline int fragment_at(int f, int hidden) {
  const u32 thread = thread_id();
  const int warp = thread / 32, turn = f / N;
  const int stream = f % N + (turn < kTurns ? 0 : warp % 2 * 2);
  return (stream * hidden + channel_at(turn)) * kColumns + thread % 4 * 2;
}

// Where this thread's part of its first fragment of phi in shared memory begins; asks for its place, too.
__device__ inline u32 phi_of_thread() {
  const u32 thread = thread_id();
  return shared_address(shared) + kPhi + thread / 32 * kFragmentBytes + thread % 32 * 8;
}

// From a unit of a warp to that of its next turn.
constexpr u32 kTurnBytes = kMainWarps / kBoxUnits * kBoxBytes;

// A row of the transpose of h_res.
constexpr u32 kHRow = N * sizeof(float);

// A main warp. Lane 4 g + q has the channels g and g + 8 of a unit, and the tokens 2 q and 2 q + 1.
template <bool NORM>
struct Differentiation {
  // Units at once, for which shared memory is read once for what belongs to tokens, and whether X is read once for d_x
  // and d_phi: reads of shared memory are what limits main warps.
  static constexpr int kAtOnce = NORM ? NormTuned::at_once : Tuned::at_once;
  static constexpr bool kReadsXOnce =
      kSumsPhi && (NORM ? NormTuned::reads_x_once : Tuned::reads_x_once);
  // Fragments of phi; the others are in shared memory.
  PhiFragment held[kHeld > 0 ? kHeld : 1];
  float d_phi[kSumsPhi ? kSums : 1][kOctets][4];
  const float* norm_scale;
  float* d_norm_scale_partials;
  int hidden;
  // Sums for the gradient of w, where there are registers for them: lane 4 g + q has channel g + q % 2 * 8 of one of
  // two turns each.
  float d_w[(kTurns + kShared + 1) / 2];
  // Places: of the tile's X and d_u, and d_x_in; of the replies from matrix rows of this lane on, and from its first
  // token on; of phi.
  u32 stage, d_x_in_at, row_replies, own_replies, phi_at;

  // UNITS units of a warp's turns from TURN on, or two streams of one from `first` on. `at`: of this lane's matrix row in
  // a pair of streams of the first unit; where only one is read, of a lane whose row is wanted it is in the first.
  template <int TURN, int UNITS, int STREAMS>
  __device__ void differentiate(u32 at, int first) {
    const auto pair_at = [&](int k) { return at + k * kTurnBytes; };
    // r dm and the rest of it; and both in one as B of phi dm: k is a column.
    u32 dm[2 * kOctets];
    read_dm<false>(dm);
    const u32 column_replies = own_replies + (lane_id() / 4 - lane_id() % 4 * 2) * kReplyRow;
    const float scale = inverse_of_unit(read_float(column_replies + kUnit));
    HalfDm half_dm;
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet)
      set_octet(half_dm, octet, dm[octet], dm[kOctets + octet], scale);
    // d_u of channels g and g + 8, and where it is normalised the cotangent of u.
    u32 d_u[UNITS][2] = {};
    float du[UNITS][2][2];
    if constexpr (NORM) {
      // u = sum over i of h_pre[i] X[i],  du = rho w g - f u,  dw = sum over tokens of g rho u
      float4 h[2];
      uint2 factors[2];
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        h[t] = read_float4(own_replies + t * kReplyRow + kHPre);
        factors[t] = read2(own_replies + t * kReplyRow + kRho);
      }
#pragma unroll
      for (int k = 0; k < UNITS; ++k) {
        u32 x[2][4];
        read_transposed(x[0], stage + pair_at(k));
        read_transposed(x[1], stage + 2 * kPlaneBytes + pair_at(k));
        read_transposed(d_u[k], stage + kDU + pair_at(k));
        float d_scale[2] = {};
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          // Nobody reads what becomes of a channel behind the last.
          const float scale =
              load_single(norm_scale + min(channel_at(TURN + k) + 8 * c, hidden - 1));
#pragma unroll
          for (int t = 0; t < 2; ++t) {
            const auto of = [&](u32 v) { return t == 0 ? low_of<Stream>(v) : high_of<Stream>(v); };
            const float rho = __uint_as_float(factors[t].x),
                        minus_f = __uint_as_float(factors[t].y), g = of(d_u[k][c]);
            const float u = h[t].x * of(x[0][c]) + h[t].y * of(x[0][2 + c]) + h[t].z * of(x[1][c]) +
                            h[t].w * of(x[1][2 + c]);
            d_scale[c] += g * (rho * u);
            du[k][c][t] = rho * (scale * g) + minus_f * u;
          }
        }
        const u32 q = lane_id() % 4;
        float sum = q % 2 ? d_scale[1] : d_scale[0];
        sum += __shfl_xor_sync(kAllLanes, q % 2 ? d_scale[0] : d_scale[1], 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        const int turn = TURN + k;
        if constexpr (kHoldsDW) {
          if (q / 2 == turn % 2) d_w[turn / 2] += sum;
        } else if (q < 2 && first == 0 && is_there(turn, hidden)) {
          // The first of two warps that share a unit.
          *d_w_at(turn) += sum;
        }
      }
    }
    const auto cotangent = [&](int k, int c, int t) {
      if constexpr (NORM) {
        return du[k][c][t];
      } else {
        return t == 0 ? low_of<Stream>(d_u[k][c]) : high_of<Stream>(d_u[k][c]);
      }
    };
    const float unit_of_phi = read_float(phi_unit());
    // -f and the unit of both products.
    float minus_f[2], unit[2];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const uint2 factors = read2(own_replies + t * kReplyRow + kMinusF);
      minus_f[t] = __uint_as_float(factors.x), unit[t] = unit_of_phi * __uint_as_float(factors.y);
    }
    if constexpr (kReadsXOnce) read_dm<true>(dm);
    [[maybe_unused]] u32 d_x_in[UNITS][N / 2][4], added[UNITS][2];
#pragma unroll
    for (int k = 0; k < UNITS; ++k) {
      if constexpr (!NORM) read_transposed(d_u[k], stage + kDU + pair_at(k));
      if constexpr (kMixes) {
#pragma unroll
        for (int i = 0; i < N; i += 2)
          read_transposed(d_x_in[k][i / 2], d_x_in_at + i * kPlaneBytes + pair_at(k));
      }
    }
    // A shared unit: its other warp writes what this one reads.
    if constexpr (kMixes && STREAMS < N) wait_for_partner();
    // d_x[j] = (r dm) phi^T + h_pre[j] d_u - f X[j] + sum over i of h_res[i, j] d_x_in[i]
    const u32 first_replies = own_replies + first * sizeof(float),
              first_h = own_replies + kHRes + first * kHRow;
#pragma unroll
    for (int j = 0; j < STREAMS; ++j) {
      const u32 plane = (first + j) * kPlaneBytes;
      u32 x[UNITS][2];
      float sums[UNITS][4] = {};
#pragma unroll
      for (int k = 0; k < UNITS; ++k) {
        read_transposed(x[k], stage + pair_at(k) + plane);
        if constexpr (!kMixes) read_transposed(added[k], d_x_in_at + pair_at(k) + plane);
        const int f = (TURN + k) * N + j;
        PhiFragment phi;
        if (f < kHeld) {
          phi = held[f < kHeld ? f : 0];
        } else {
          phi.read(phi_at + (f - kHeld) * kMainWarps * kFragmentBytes);
        }
        add_product(sums[k], phi.words, half_dm);
      }
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const auto of = [&](u32 v) { return t == 0 ? low_of<Stream>(v) : high_of<Stream>(v); };
        const float h_pre = read_float(first_replies + t * kReplyRow + kHPre + 4 * j);
        float hs[N];
        if constexpr (kMixes) read_floats(hs, first_h + t * kReplyRow + j * kHRow);
#pragma unroll
        for (int k = 0; k < UNITS; ++k) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& sum = sums[k][2 * c + t];
            sum = unit[t] * sum + h_pre * cotangent(k, c, t) + minus_f[t] * of(x[k][c]);
            if constexpr (kMixes) {
#pragma unroll
              for (int i = 0; i < N; ++i) sum += hs[i] * of(d_x_in[k][i / 2][i % 2 * 2 + c]);
            } else {
              sum += of(added[k][c]);
            }
          }
        }
      }
#pragma unroll
      for (int k = 0; k < UNITS; ++k) {
        u32 d_x[2];
#pragma unroll
        for (int c = 0; c < 2; ++c)
          d_x[c] = pair_of((Stream*)nullptr, sums[k][2 * c], sums[k][2 * c + 1]);
        write_transposed(d_x_in_at + pair_at(k) + plane, d_x);
        if constexpr (kReadsXOnce) add_d_phi((TURN + k) * N + j, x[k], dm);
      }
      // So that the compiler does not begin with the next stream before, for which it would spill registers on sm_100f.
      if constexpr (NORM) __syncwarp();
    }
    if constexpr (kSumsPhi && !kReadsXOnce) {
      // X is read again, which takes fewer registers.
      read_dm<true>(dm);
#pragma unroll
      for (int k = 0; k < UNITS; ++k) {
#pragma unroll
        for (int s = 0; s < STREAMS; s += 2) {
          u32 x[4];
          read_transposed(x, stage + pair_at(k) + (first + s) * kPlaneBytes);
          const int f = (TURN + k) * N + s;
          add_d_phi(f, {x[0], x[1]}, dm);
          add_d_phi(f + 1, {x[2], x[3]}, dm);
        }
      }
    }
  }

  // d_phi = sum over tokens of vec(X)^T (r dm), with r dm as B: k is a token. Of fragment f, a constant. Units of r dm
  // would have to be the same for all tokens, so that float16 streams are cut into parts of bfloat16 here, and lose none
  // of their bits.
  __device__ void add_d_phi(int f, const u32 (&x)[2], const u32 (&dm)[2 * kOctets]) {
    constexpr int kParts = kStreamParts<Stream>;
    u32 parts[2][kParts];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if constexpr (kParts == 1) {
        parts[c][0] = x[c];
      } else {
        split(low_of<Stream>(x[c]), high_of<Stream>(x[c]), parts[c]);
      }
    }
    const auto add = [&](float (&sums)[kOctets][4]) {
#pragma unroll
      for (int p = kParts - 1; p >= 0; --p) {
        const u32 first = parts[0][p], second = parts[1][p];
#pragma unroll
        for (int octet = 0; octet < kOctets; ++octet)
          mma(sums[octet], first, second, first, second, {dm[octet], dm[kOctets + octet]});
      }
    };
    if (f < kSums) {
      add(d_phi[f < kSums ? f : 0]);
    } else {
      float sums[kOctets][4];
      read_sums(sums);
      add(sums);
      write_sums(sums);
    }
  }

  // r dm, then what it lost, an octet of columns a matrix; from matrix FIRST on.
  template <bool TRANSPOSED, int FIRST = 0>
  __device__ void read_dm(u32 (&dm)[2 * kOctets]) const {
    constexpr int kPart = 2 * kOctets - FIRST < 4 ? 2 : 4;
    u32 part[kPart];
    if constexpr (TRANSPOSED) {
      read_transposed(part, row_replies + FIRST * 16);
    } else {
      read_matrices(part, row_replies + FIRST * 16);
    }
#pragma unroll
    for (int e = 0; e < kPart; ++e) dm[FIRST + e] = part[e];
    if constexpr (FIRST + kPart < 2 * kOctets) read_dm<TRANSPOSED, FIRST + kPart>(dm);
  }

  // Channels of `d_norm_scale_partials` that lane 4 g + q, q < 2, adds up in a turn.
  __device__ float* d_w_at(int turn) const {
    return d_norm_scale_partials +
           (cluster_id() * cluster_size() * SIZE + u32(channel_at(turn)) + lane_id() % 2 * 8);
  }

  __device__ void write_d_w(int lane) const {
#pragma unroll
    for (int turn = 0; turn < kTurns + kShared; ++turn) {
      // Both warps of a shared unit write the same.
      if (lane % 4 / 2 == turn % 2 && is_there(turn, hidden)) *d_w_at(turn) = d_w[turn / 2];
    }
  }

  // Asks for its place like `fragment_at`.
  __device__ static u32 phi_unit() {
    const u32 thread = thread_id();
    return shared_address(shared) + kPhiUnits + thread / 32 * sizeof(float);
  }

  // Asks for its place like `fragment_at`.
  __device__ static u32 sums_at() {
    const u32 thread = thread_id();
    return shared_address(shared) + kSumsAt + thread / 32 * kSumsBytes + thread % 32 * 16;
  }
  __device__ static void read_sums(float (&sums)[kOctets][4]) {
    const u32 at = sums_at();
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
      const float4 v = read_float4(at + octet * 512);
      sums[octet][0] = v.x, sums[octet][1] = v.y, sums[octet][2] = v.z, sums[octet][3] = v.w;
    }
  }
  __device__ static void write_sums(const float (&sums)[kOctets][4]) {
    const u32 at = sums_at();
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
      const float (&s)[4] = sums[octet];
      write_float4(at + octet * 512, {s[0], s[1], s[2], s[3]});
    }
  }

  __device__ static void wait_for_partner() { sync_threads<64>(1 + threadIdx.x / 64); }

  template <int TURN>
  __device__ void take_turns(u32 at) {
    if constexpr (TURN < kTurns) {
      constexpr int kNow = kTurns - TURN < kAtOnce ? kTurns - TURN : kAtOnce;
      differentiate<TURN, kNow, N>(at + TURN * kTurnBytes, 0);
      take_turns<TURN + kNow>(at);
    }
  }
};

template <bool NORM>
__device__ inline void differentiate_tiles(const Block& block, const Args& args, int warp,
                                           int lane) {
  const int hidden = args.hidden;
  Differentiation<NORM> main;
  // All of it at once, before the sums need the registers; without sums phi stays in them, and is loaded twice.
  constexpr int kAtOnce = kSumsPhi ? kFragments : N;
  static_assert(kFragments % kAtOnce == 0);
  float2 values[kAtOnce][kPhiWords];
  const auto load = [&](int first) {
#pragma unroll
    for (int f = first; f < first + kAtOnce; ++f) {
      const float* at = args.phi + fragment_at(f, hidden);
      PhiFragment::load(values[f - first], at, channels_left(f / N, hidden));
    }
  };
  u32 largest = 0;
#pragma unroll
  for (int first = 0; first < kFragments; first += kAtOnce) {
    load(first);
#pragma unroll
    for (int w = 0; w < kAtOnce * kPhiWords; ++w) {
      const float2 v = values[w / kPhiWords][w % kPhiWords];
      largest = max(largest, max(magnitude(v.x), magnitude(v.y)));
    }
    // Not to begin with the next before.
    if (kAtOnce < kFragments) __syncwarp();
  }
  const float unit = half_unit(__reduce_max_sync(kAllLanes, largest)),
              scale = inverse_of_unit(unit);
  write_float(main.phi_unit(), unit);
#pragma unroll
  for (int first = 0; first < kFragments; first += kAtOnce) {
    if (kAtOnce < kFragments) load(first);
#pragma unroll
    for (int f = first; f < first + kAtOnce; ++f) {
      PhiFragment fragment;
      fragment.set(values[f - first], scale);
      if (f < kHeld) {
        main.held[f < kHeld ? f : 0] = fragment;
      } else {
        fragment.write(phi_of_thread() + (f - kHeld) * kMainWarps * kFragmentBytes);
      }
    }
    if (kAtOnce < kFragments) __syncwarp();
  }
#pragma unroll
  for (int e = 0; e < kSums * kOctets * 4; ++e)
    main.d_phi[e / (kOctets * 4)][e / 4 % kOctets][e % 4] = 0.f;
  if constexpr (NORM) {
    main.norm_scale = args.norm_scale, main.d_norm_scale_partials = args.d_norm_scale_partials;
    main.hidden = hidden;
#pragma unroll
    for (float& sum : main.d_w) sum = 0.f;
    if constexpr (!kHoldsDW) main.write_d_w(lane);
  }
  if constexpr (kSumsInShared > 0) main.write_sums({});
  __syncwarp();
  if (lane == 0) arrive(block.barrier(kPhiRead, 0));
  cluster_wait();

#pragma unroll 1
  for (int tile = 0; tile < block.num_tiles; ++tile) {
    // From the number of the tile, so that it is all that has to be kept.
    const u32 slot = tile % kStages, parity = tile / kStages % 2;
    const u32 d_x_in_slot = tile % kDXInSlots, d_x_in_parity = tile / kDXInSlots % 2;
    wait(block.barrier(kFull, slot), parity);
    if constexpr (kMixes) wait(block.barrier(kTableFull, slot), parity);
    wait(block.barrier(kDXInFull, d_x_in_slot), d_x_in_parity);
    wait_for_cluster(block.barrier(kReplyFull, slot), parity);
    main.stage = block.stage(slot), main.d_x_in_at = block.d_x_in_at(d_x_in_slot);
    const u32 replies = block.replies(slot);
    main.phi_at = phi_of_thread();
    // Asked for again, like all that can be.
    const u32 lane = lane_id(), q = lane % 4, matrix = lane / 8, row = lane % 8;
    main.row_replies = replies + row * kReplyRow + matrix * 16,
    main.own_replies = replies + 2 * q * kReplyRow;
    // Of a pair of streams: the matrices of the first, then those of the second.
    const auto pair_at = [&](int unit) {
      return matrix / 2 * kPlaneBytes + swizzled(row, unit % kBoxUnits * 2 + matrix % 2) +
             unit / kBoxUnits * kBoxBytes;
    };
    main.template take_turns<0>(pair_at(warp));
    if constexpr (kShared) {
      main.template differentiate<kTurns, 1, 2>(pair_at(kTurns * kMainWarps + warp / 2),
                                                warp % 2 * 2);
    }
    fence_for_copies();
    __syncwarp();
    if (lane_id() == 0) arrive(block.barrier(kDone, slot));
  }

  if constexpr (kSumsPhi) {
    const int channels = padded(hidden);
    float* partial =
        static_cast<float*>(args.d_phi) + (long long)cluster_id() * N * channels * kColumns;
    float last[kOctets][4] = {};
    if constexpr (kSumsInShared > 0) main.read_sums(last);
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      if (!is_there(f / N, hidden)) continue;
      float* out = partial + fragment_at(f, channels);
      store_d_phi(out, f < kSums ? main.d_phi[f < kSums ? f : 0] : last);
    }
  }
  if constexpr (NORM && kHoldsDW) main.write_d_w(lane);
}
