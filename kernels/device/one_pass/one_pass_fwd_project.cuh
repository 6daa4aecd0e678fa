// The projecting warps of one_pass_fwd.cu, which includes this behind its sizes and its `Block`.
//
//   X'[i] = h_post[i] y + sum over j of H_res[i, j] X[j], in post_pre
//   a block's parts of vec(X) phi and of the sum of X^2, or with a layer norm of G[i, j] = <X[i], X[j]>          [14]

#pragma once

#include "one_pass/geometry.cuh"

// Row i of H_res, and h_post[i].
struct MixingRow {
  float h_res[N], h_post;
};

// X'[i] = h_post[i] y + sum over j of H_res[i, j] X[j], for a word of channels of a token. row: gives row i.
template <class Row>
__device__ inline void mix(u32 (&x)[N], u32 y, Row row) {
  using Word = Pack<Stream, kWordChannels>;
  Word values[N + 1];
#pragma unroll
  for (int j = 0; j <= N; ++j) values[j].words[0] = j < N ? x[j] : y;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const MixingRow h = row(i);
    float sums[kWordChannels];
#pragma unroll
    for (int e = 0; e < kWordChannels; ++e) {
      sums[e] = h.h_post * values[N][e];
#pragma unroll
      for (int j = 0; j < N; ++j) sums[e] += h.h_res[j] * values[j][e];
    }
    Word mixed;
    mixed.set(sums);
    x[i] = mixed.words[0];
  }
}

template <bool POST_PRE, bool NORM>
__device__ inline void Block<POST_PRE, NORM>::project(int warp, int lane) const {
  take_registers<P::Tuned::project_registers>();

  // Fragments that lie in registers.
  using Phi = Slice<Stream>;
  constexpr int kInRegisters = Phi::kFragments * kSlices - P::kSharedFragments;
  Phi slices[kSlices];
  Units<Stream> units;
  const auto shared_fragment = [&](int fragment) {
    return shared + P::kFragments + (fragment - kInRegisters) * kFragmentBytes + 16 * thread_id();
  };
  const auto write_shared_fragments = [&](int slice) {
#pragma unroll
    for (int f = 0; f < Phi::kFragments; ++f) {
      const int fragment = Phi::kFragments * slice + f;
      if (fragment >= kInRegisters) write4(shared_fragment(fragment), slices[slice].fragments[f]);
    }
  };
  const auto whole_slice = [&](int slice) {
    Phi phi = slices[slice];
#pragma unroll
    for (int f = 0; f < Phi::kFragments; ++f) {
      const int fragment = Phi::kFragments * slice + f;
      if (fragment >= kInRegisters) phi.fragments[f] = read4(shared_fragment(fragment));
    }
    return phi;
  };
  // Whether there are registers left for what can as well be read when it is needed.
  constexpr bool kSpare = P::kSharedFragments == 0, kKeepsHRes = kSpare || !NORM;
  const int own_channel = kUnitChannels * warp + kWordChannels * (lane % 4);
  const u32 own_rows = own_channel * P::kPhiRowBytes + lane / 4 * 4;
  const int boxes = (this->channels() + kBoxChannels - 1) / kBoxChannels;
#pragma unroll
  for (int part = 0; part < kBoxSlices; ++part) {
    const int first_pair = part * (Phi::kStreams / 2),
              last_pair = first_pair + Phi::kStreams / 2 - 1;
#pragma unroll
    for (int of_pair = 0; of_pair < P::kPairPieces; ++of_pair) {
      const int first = first_pair * P::kPairPieces + of_pair;
      const int last = last_pair * P::kPairPieces + of_pair;
#pragma unroll
      for (int piece = first; piece <= last; piece += P::kPairPieces)
        wait(barrier(kPhiFull, piece), 0);
#pragma unroll
      for (int k = 0; k < P::kPieceBoxes; ++k) {
        const u32 at = phi_piece(first) + own_rows + k * kBoxChannels * P::kPhiRowBytes;
        const int box = of_pair * P::kPieceBoxes + k, slice = kBoxSlices * box + part;
        // Boxes behind C are of no stream, or of the next.
        slices[slice] = {};
        if (box < boxes) slices[slice] = Phi::read(at, P::kPhiRowBytes, P::kPhiBytes);
        units.add(slices[slice]);
        write_shared_fragments(slice);
      }
      __syncwarp();
      if ((last + 1) % P::kPiecesAtOnce == 0 && lane == 0) arrive(barrier(kPhiEmpty));
    }
  }
  if constexpr (!Units<Stream>::kAreOne) {
    units.find();
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      slices[slice] = whole_slice(slice);
      units.cut(slices[slice]);
      write_shared_fragments(slice);
    }
  }
  cluster_wait();

  const int g = lane / 4;
  // Lane l points at the 16 bytes of token l % 8 of stream l / 8.
  const auto matrices_of = [&](int lane, int warp) {
    return lane / 8 * P::kStreamBytes + swizzled(lane % 8, warp);
  };
  u32 matrices = matrices_of(lane, warp);
  Ring<P::kStages> ring;
#pragma unroll 1
  for (int i = 0; has_tile(i); ++i, ring.next()) {
    wait(barrier(kFull, ring.slot), ring.parity);
    const u32 here = stage(ring.slot);
    // Beside the parts of phi there is no register to keep it.
    if (sizeof(Stream) == 4) matrices = matrices_of(lane_id(), thread_id() / 32);
    const auto read_h_res = [&](float (&row)[N], int i) {
      read_floats(row, mixing(ring.slot) + (g * N + i) * N * 4);
    };
    const auto read_h_post = [&](int i) {
      return read_float(mixing(ring.slot) + P::kHPost + (g * N + i) * 4);
    };
    MixingRow rows[N] = {};
    if constexpr (POST_PRE) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (kKeepsHRes) read_h_res(rows[i].h_res, i);
        if (kSpare) rows[i].h_post = read_h_post(i);
      }
    }
    const auto row = [&](int i) {
      MixingRow row = rows[i];
      if (!kKeepsHRes) read_h_res(row.h_res, i);
      if (!kSpare) row.h_post = read_h_post(i);
      return row;
    };

    constexpr int kOctets = P::kTokens / 8, kSteps = kBoxes * kOctets;
    // In post_pre the next box is on its way to registers while this one is mixed.
    constexpr bool kAhead = POST_PRE && kSpare;
    Sums<Stream> sums[kOctets];
    typename Choose<NORM, Products<Stream>, Squares<Stream>>::Type products[kOctets];
    u32 next[N], next_y = 0;
    const auto address = [&](int step) {
      return here + matrices + step / kOctets * P::kBoxBytes + step % kOctets * 8 * kRowBytes;
    };
    const auto read = [&](int step) {
      read_matrices(next, address(step));
      if constexpr (POST_PRE) read_matrix(next_y, address(step) + P::kY);
    };
    if (kAhead) read(0);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (!kAhead) read(step);
      u32 x[N];
#pragma unroll
      for (int j = 0; j < N; ++j) x[j] = next[j];
      const u32 y = next_y;
      if (kAhead && step + 1 < kSteps) read(step + 1);
      if constexpr (POST_PRE) {
        mix(x, y, row);
        write_matrices(address(step), x);
      }
#pragma unroll
      for (int part = 0; part < kBoxSlices; ++part) {
        const int slice = step / kOctets * kBoxSlices + part;
#pragma unroll
        for (int f = 0; f < Phi::kFragments; ++f) {
          if (Phi::kFragments * slice + f < kInRegisters)
            Phi::keep_whole(slices[slice].fragments[f]);
        }
        sums[step % kOctets].add(whole_slice(slice), x, part * Phi::kStreams);
      }
      if constexpr (!NORM) products[step % kOctets].add(x);
    }
    const u32 slot = i % 2;
    wait(barrier(kPartialEmpty, slot), (i / 2 & 1) ^ 1);
    const u32 own_sums =
        shared + P::kPartials + slot * P::kPartialBytes + warp * P::kTokens * P::kSumsBytes;
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
      sums[octet].template store<P::kSumsBytes>(own_sums + 8 * octet * P::kSumsBytes, lane, units);
    }
    if constexpr (NORM) {
      // Afterwards, for it takes many registers.
      __syncwarp();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (step / kOctets % 2) continue;
        u32 x[N], y[N] = {};
        read_matrices(x, address(step));
        if (step + kOctets < kSteps) read_matrices(y, address(step + kOctets));
        products[step % kOctets].add(x, y);
      }
    }
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
      const u32 at = own_sums + 8 * octet * P::kSumsBytes + P::kSquares;
      products[octet].template store<P::kSumsBytes>(at, lane);
    }
    __syncwarp();
    if (lane == 0) arrive(barrier(kPartialFull, slot));
  }
}
