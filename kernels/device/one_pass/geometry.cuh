// The place of a block in a one-pass kernel: its slice of the channels, and its cluster's tiles of tokens.
//
// The block of rank b owns the channels [b * SIZE, (b + 1) * SIZE) of all streams, as far as there are so many: those of
// the last block that are not there are zeros when the copy engine brings them, and are left out when it takes them.
// Cluster k of `tile_step` clusters has the tiles k, k + tile_step and so on.

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

template <int TOKENS>
struct Place {
  u32 shared;  // address of the block's shared memory
  u32 rank,
      ranks;   // of the block in its cluster; the number of the cluster's blocks, from 1 to 16
  int hidden;  // C, a multiple of kBoxChannels
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
  __device__ int first_box() const { return rank * kBoxes; }
  // The first token of this cluster's tile i.
  __device__ int first_token(int i) const { return (first_tile + i * tile_step) * TOKENS; }
  // This cluster's number of all tiles.
  __device__ int share_of(int tiles) const {
    return (tiles - first_tile + tile_step - 1) / tile_step;
  }
};
