// The place of a block in a one-pass kernel: its slice of the channels, and its cluster's tiles of tokens.
//
// The block of rank b owns the channels [b * SIZE, (b + 1) * SIZE) of all streams, as far as there are so many: those of
// the last block that are not there are zeros when the copy engine brings them, and are left out when it takes them.
// Cluster k of `tile_step` clusters has the tiles k, k + tile_step and so on. C is a multiple of 8.

#pragma once

#include "one_pass/one_pass.cuh"

constexpr int N = NUM_STREAMS;
constexpr int kColumns = COLUMNS;  // of phi

// Boxes of a block in one stream.
constexpr int kBoxes = SIZE / kBoxChannels;
static_assert(SIZE % kBoxChannels == 0, "whole boxes");

// Bytes of a box of TOKENS tokens, and of a plane: the boxes of one stream.
template <int TOKENS>
struct Tile {
  static constexpr u32 kBoxBytes = TOKENS * kRowBytes;
  static constexpr u32 kPlaneBytes = kBoxes * kBoxBytes;
};

// Maps of a tensor by which a block takes its part of a tile (`Lines`). `boxes` have all streams, and of each whole lines
// alone. Where C is no whole number of lines, the last block takes one stream at a time: by `lines` its whole lines, by
// `rest` all that is behind them, which is zero from C on.
struct BlockMaps {
  TensorMap boxes, lines, rest;
};

// A block's lines of a stream, and copies of a tile's planes of them, which lie behind each other. Whoever knows that all are
// whole (MAY_HAVE_REST = false) has fewer instructions between copies.
template <int TOKENS, bool MAY_HAVE_REST = true>
struct Lines {
  using Of = Tile<TOKENS>;
  int box;        // the first one
  int num_whole;  // of them, where there is a rest
  bool has_rest;

  __device__ Lines(int first_channel, int hidden)
      : box(first_channel / kBoxChannels), num_whole((hidden - first_channel) / kBoxChannels) {
    const int channels = hidden - first_channel;
    has_rest = MAY_HAVE_REST && channels > 0 && channels < SIZE && channels % kBoxChannels > 0;
  }

  template <int STREAMS>
  __device__ void copy_in(u32 to, const BlockMaps& maps, int token, u32 full, u64 policy) const {
    if (!MAY_HAVE_REST || !has_rest) return ::copy_in(to, maps.boxes, token, box, 0, full, policy);
#pragma unroll 1
    for (int stream = 0; stream < STREAMS; ++stream, to += Of::kPlaneBytes) {
      if (num_whole > 0) ::copy_in(to, maps.lines, token, box, stream, full, policy);
      ::copy_in(to + num_whole * Of::kBoxBytes, maps.rest, token, 0, stream, full, policy);
    }
  }
  template <int STREAMS>
  __device__ void copy_out(const BlockMaps& maps, int token, u32 from) const {
    ::copy_out(maps.boxes, token, box, 0, from);
    if (!MAY_HAVE_REST || !has_rest) return;
    from += num_whole * Of::kBoxBytes;
#pragma unroll 1
    for (int stream = 0; stream < STREAMS; ++stream, from += Of::kPlaneBytes)
      ::copy_out(maps.rest, token, 0, stream, from);
  }
  template <int STREAMS>
  __device__ void prefetch(const BlockMaps& maps, int token) const {
    ::prefetch(maps.boxes, token, box, 0);
    if (!MAY_HAVE_REST || !has_rest) return;
#pragma unroll 1
    for (int stream = 0; stream < STREAMS; ++stream) ::prefetch(maps.rest, token, 0, stream);
  }
};

// Channels of a stream in sums over tokens that are in memory: C, or half of a unit of 16 more, which is nobody's.
__device__ inline int padded(int hidden) { return (hidden + 15) / 16 * 16; }

template <int TOKENS>
struct Place {
  u32 shared;  // address of the block's shared memory
  u32 rank,
      ranks;   // of the block in its cluster; the number of the cluster's blocks, from 1 to 16
  int hidden;  // C
  int first_tile, tile_step;

  __device__ Place(const void* memory, int hidden)
      : shared(shared_address(memory)),
        rank(cluster_rank()),
        ranks(cluster_size()),
        hidden(hidden),
        first_tile(cluster_id()),
        tile_step(num_clusters()) {}

  // Channels that this block has of a stream.
  __device__ int channels() const { return min(SIZE, hidden - int(first_channel())); }
  __device__ u32 first_channel() const { return rank * SIZE; }
  template <bool MAY_HAVE_REST = true>
  __device__ Lines<TOKENS, MAY_HAVE_REST> lines() const {
    return {int(first_channel()), hidden};
  }
  // The first token of this cluster's tile i.
  __device__ int first_token(int i) const { return (first_tile + i * tile_step) * TOKENS; }
  // This cluster's number of all tiles.
  __device__ int share_of(int tiles) const {
    return (tiles - first_tile + tile_step - 1) / tile_step;
  }
};
