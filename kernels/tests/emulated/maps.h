// Maps of the streams by which blocks of SIZE channels take their parts of tiles (one_pass/geometry.cuh): those that
// kernels/src/gpu/launch.rs makes. And sums for d_phi that blocks leave.

#pragma once

#include "check.h"
#include "one_pass/geometry.cuh"

struct StreamMaps {
  Map boxes, lines, rest;

  StreamMaps() = default;
  // Of every `step`-th stream from `first` on, in boxes of so many tokens.
  StreamMaps(Stream* values, int tokens, int streams, int hidden, int box_tokens, int first = 0,
             int step = 1) {
    const int in_box = (streams - first + step - 1) / step;
    boxes = {values, tokens, streams, hidden, first, step, box_tokens, SIZE, in_box};
    boxes.end = hidden / kBoxChannels * kBoxChannels;
    if (boxes.end == hidden) return;
    const int num_whole = (hidden - 1) % SIZE / kBoxChannels;
    lines = rest = boxes;
    lines.box_streams = rest.box_streams = 1;
    lines.box_channels = num_whole * kBoxChannels, rest.box_channels = SIZE - lines.box_channels;
    rest.start = boxes.end, rest.end = hidden;
  }
  BlockMaps block_maps() const {
    return {boxes.tensor_map(), lines.tensor_map(), rest.tensor_map()};
  }
};

// Numbers of one sum for d_phi, and the sum of `num` such sums for number i of d_phi.
inline size_t sum_numbers(int hidden) { return size_t(N) * padded(hidden) * kColumns; }
inline double sum_of_d_phi(const float* sums, int num, int hidden, size_t i) {
  const size_t of_stream = size_t(hidden) * kColumns;
  const size_t place = i / of_stream * padded(hidden) * kColumns + i % of_stream;
  return sum_of_arrays(sums, num, sum_numbers(hidden), place);
}
