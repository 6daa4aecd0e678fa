// The shared memory of post_pre_bwd_one_pass.cu and given/post_given_bwd.cu from the tables of the mixing on. They include
// this behind `kReplies` and `kTableSlots`, where the replies and those tables begin.

#pragma once

#include "one_pass/post_pre_bwd_sizes.cuh"

constexpr u32 kAfterTables = kTableSlots + 2 * kTablesBytes;
constexpr u32 kEven = (kAfterTables + kSharedPhiBytes + 1023) / 1024 * 1024;
constexpr u32 kVectors = kEven + kStages * kHalf;
constexpr u32 kEvenGradient = kVectors + kStages * kPair;
constexpr u32 kOddGradient = kEvenGradient + kGradients * kHalf + kOddShift;
constexpr u32 kOdd = kOddGradient + kGradients * kHalf;
constexpr u32 kSharedBytes = kOdd + kStages * kHalf;
// On its way to registers phi lies where nothing of the first stage does. Where some of it stays in shared memory, the
// rest is behind that, and nothing comes to a stage before phi is in registers.
constexpr u32 kPhi = kSharedUnits == 0 ? kVectors + kPair : kAfterTables;
constexpr bool kStagesWaitForPhi = kSharedUnits > 0 && kHeldUnits > 0;
static_assert(kPhi + kAllPhiBytes <= (kSharedUnits == 0 ? kOdd : kSharedBytes), "");

// ---- what all warps know ----------------------------------------------------------------------------

// Maps of the streams, with boxes of kTileTokens tokens and SIZE channels: of every second stream (`_even`, `_odd`), or
// of y and the like.
struct Maps {
  const BlockMaps &x_even, &x_odd, &y, &d_u, &d_x_new_in_even, &d_x_new_in_odd;
  const BlockMaps &d_x_new_even, &d_x_new_odd, &d_y;  // d_x_new may lie where d_x_new_in does
};

// Addresses in a block's shared memory.
struct Stages : Place<kTileTokens> {
  using Place::Place;

  // Of a stage: the even and the odd streams; y, and d_u behind it. Of a slot: the same streams.
  __device__ u32 even(u32 stage) const { return shared + kEven + stage * kHalf; }
  __device__ u32 odd(u32 stage) const { return shared + kOdd + stage * kHalf; }
  __device__ u32 vectors(u32 stage) const { return shared + kVectors + stage * kPair; }
  __device__ u32 even_gradient(u32 slot) const { return shared + kEvenGradient + slot * kHalf; }
  __device__ u32 odd_gradient(u32 slot) const { return shared + kOddGradient + slot * kHalf; }
  __device__ u32 tables(int tile) const { return shared + kTableSlots + tile % 2 * kTablesBytes; }
  __device__ u32 reply(u32 slot, u32 token) const {
    return shared + kReplies + (slot * kTileTokens + token) * kReplyStride;
  }
};
