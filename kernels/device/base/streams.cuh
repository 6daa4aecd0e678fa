// Loads of all streams of some channels of a token, and stores that the lanes of a warp do together, whether rows are
// aligned or not.

#pragma once

#include "base/common.cuh"

// V <= 8 values from `at` on of N rows of `width` values that lie behind each other, of which there are n; zeros where
// there are none. Where rows are not aligned, the vectors that values lie in come without a branch, so that those of many
// rows are on their way at once: none lies outside of those of all rows.
template <bool ALIGNED, int N, int V, class S>
__device__ inline void load_rows(Pack<S, V> (&packs)[N], const S* rows, int n, int width, int at) {
  if constexpr (ALIGNED) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      load<true>(packs[i], rows + i * width, at, i < n ? width : 0);
    }
  } else {
    constexpr int kWords = Pack<S, V>::kWords, kStep = kWords < 4 ? kWords : 4;
    constexpr int kWindow = kWords + kStep, kWordValues = 4 / int(sizeof(S));
    // Rows at once: so many that there are registers for them.
    constexpr int kMost = 64 / kWindow, kRows = N < kMost ? N : kMost;
    using Word = typename Vector<kStep>::type;
    constexpr u32 kVector = 4 * kStep / sizeof(S);
    // Places are counted in values from the vector on in which the first row begins.
    const u32 before = u64(rows) % sizeof(Word) / sizeof(S);
    const Word* const start = reinterpret_cast<const Word*>(rows - before);
    const u32 last = (before + u32(n) * u32(width) - 1) / kVector;
#pragma unroll
    for (int from = 0; from < N; from += kRows) {
      Word vectors[kRows][kWindow / kStep];
      const auto place_of = [&](int i) {
        return before + u32(from + i < n ? from + i : 0) * u32(width) + u32(at);
      };
#pragma unroll
      for (int i = 0; i < kRows && from + i < N; ++i) {
#pragma unroll
        for (int v = 0; v < kWindow / kStep; ++v) {
          vectors[i][v] = start[min(place_of(i) / kVector + v, last)];
        }
      }
#pragma unroll
      for (int i = 0; i < kRows && from + i < N; ++i) {
        u32(&words)[kWords] = packs[from + i].words, window[kWindow];
#pragma unroll
        for (int w = 0; w < kWindow; w += kStep) {
          *reinterpret_cast<Word*>(&window[w]) = vectors[i][w / kStep];
        }
        shift_words(words, window, int(place_of(i) % kVector * sizeof(S)));
        const int left = from + i < n ? width - at : 0;
        if (left >= V) continue;
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          const int here = left - w * kWordValues;
          words[w] = here >= kWordValues ? words[w] : here == 1 ? words[w] & 0xffff : 0;
        }
      }
    }
  }
}
template <bool ALIGNED, int V, class S>
__device__ inline void load_row(Pack<S, V>& pack, const S* row, int width, int at) {
  Pack<S, V> packs[1];
  load_rows<ALIGNED>(packs, row, 1, width, at);
  pack = packs[0];
}

// `store` by all lanes of a warp, some of which may have no values. Where rows are not aligned and neighbouring lanes have
// neighbouring values, each takes the aligned 16 bytes in which its own begin.
template <bool ALIGNED, int V, class S>
__device__ inline void store_together(const Pack<S, V>& pack, S* row, int at, int end) {
  if constexpr (ALIGNED || Pack<S, V>::kWords != 4) {
    store<ALIGNED>(pack, row, at, end);
  } else {
    const int lane = threadIdx.x % 32;
    const u64 address = u64(row + at);
    const int shift = address % 16;
    const bool is_full = at + V <= end;
    // Where the values of the lane before end: at no value's place if it has fewer than V.
    const u32 own_end = u32(address) + (is_full ? 16 : 1);
    const bool follows = __shfl_sync(kAllLanes, own_end, lane + 31) == u32(address);
    const bool joins = is_full && (shift == 0 || (lane > 0 && follows));
    u32 words[4], window[8];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      window[w] = __shfl_sync(kAllLanes, pack.words[w], lane + 31);
      window[4 + w] = pack.words[w];
    }
    const u32 next_joins = __shfl_sync(kAllLanes, u32(joins), lane + 1);
    shift_words(words, window, (16 - shift) % 16);
    if (joins) {
      const bool is_own = shift == 0;
      *reinterpret_cast<uint4*>(address - shift) = {
          is_own ? window[4] : words[0], is_own ? window[5] : words[1],
          is_own ? window[6] : words[2], is_own ? window[7] : words[3]};
    }
    // Values that are left: those before the next 16 bytes, and those from there on.
    const bool has_first = !joins, has_rest = shift > 0 && (lane == 31 || !next_joins || !is_full);
    if (!has_first && !has_rest) return;
    const auto is_left = [&](int byte) { return byte < 16 - shift ? has_first : has_rest; };
    if (is_full && shift % 4 == 0) {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        if (is_left(4 * w)) reinterpret_cast<u32*>(row + at)[w] = pack.words[w];
      }
    } else if constexpr (sizeof(S) == 4) {
#pragma unroll
      for (int e = 0; e < V; ++e) {
        if (at + e < end && is_left(4 * e)) row[at + e] = pack[e];
      }
    } else {
#pragma unroll
      for (int e = 0; e < V; ++e) {
        if (at + e < end && is_left(2 * e)) {
          row[at + e] = S{u16(pack.words[e / 2] >> (e % 2 * 16))};
        }
      }
    }
  }
}
