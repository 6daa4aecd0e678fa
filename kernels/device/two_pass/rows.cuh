// Some values of some tokens in shared memory, on their way from X to the tensor cores.

#pragma once

#include "base/copies.cuh"

// VALUES of each of TOKENS. Rows of memory that are not aligned come in aligned pieces, one more than there are values
// for, and are shifted when they are read.
template <bool ALIGNED, int TOKENS, int VALUES>
struct Rows {
  static constexpr int kPieces = VALUES * int(sizeof(Stream)) / 16 + (ALIGNED ? 0 : 1);
  static constexpr int kRowBytes = 16 * kPieces;
  static constexpr int kBytes = TOKENS * kRowBytes;

  char* bytes;

  // The pieces of a row are in an order that lets the lanes of a warp read from all banks at once: with 32 values those
  // of 8 tokens, a quarter of a row each, or the same quarter of 8 tokens; with 64 values those of every second of 8
  // tokens, an eighth each.
  __device__ static int place(int row, int piece) {
    if constexpr (ALIGNED && VALUES == 64) {
      const int pair = row / 2;
      piece ^= sizeof(Stream) == 2 ? pair % 4 * 2 : pair % 2 + pair / 2 % 2 * 4;
    } else if constexpr (ALIGNED) {
      piece ^= sizeof(Stream) == 2 ? row / 2 % 4 : row % 2;
    }
    return row * kRowBytes + piece * 16;
  }
  __device__ char* piece(int row, int piece) const { return bytes + place(row, piece); }

  // Values of `token` that lie before the first of a row in its piece.
  __device__ static int shift(const Stream* x, long long token, int width) {
    return ALIGNED ? 0 : u64(x + token * width) % 16 / sizeof(Stream);
  }

  // Values k to k + VALUES of the tokens from `first` on, by THREADS threads; zero behind the last token and behind the
  // last value of an aligned row.
  template <int THREADS>
  __device__ void copy(const Stream* x, long long first, int tokens, int k, int width,
                       int thread) const {
    constexpr int kPieceValues = 16 / sizeof(Stream);
#pragma unroll
    for (int i = 0; i < (TOKENS * kPieces + THREADS - 1) / THREADS; ++i) {
      const int at = i * THREADS + thread, row = at / kPieces, p = at % kPieces;
      if (TOKENS * kPieces % THREADS && row >= TOKENS) break;
      const bool is_token = first + row < tokens;
      const Stream* from = x + (first + row) * width + k;
      if constexpr (ALIGNED) {
        const bool exists = is_token && k + p * kPieceValues < width;
        copy_async(piece(row, p), exists ? from + p * kPieceValues : x, exists ? 16 : 0);
      } else {
        const u64 address = u64(from) / 16 * 16 + 16 * p;
        const long long left = (long long)(u64(x + (long long)tokens * width) - address);
        const int here = !is_token || left < 0 ? 0 : left < 16 ? int(left) : 16;
        copy_async(piece(row, p), here > 0 ? (const void*)address : x, here);
      }
    }
  }

  // The 8 values from 8 * octet on; `left` of the row are there, and zeros.
  __device__ void read(Pack<Stream, 8>& pack, int row, int octet, int shift, int left) const {
    constexpr int kWords = Pack<Stream, 8>::kWords;
    if constexpr (ALIGNED) {
#pragma unroll
      for (int w = 0; w < kWords; w += 4) {
        *reinterpret_cast<uint4*>(&pack.words[w]) =
            *reinterpret_cast<const uint4*>(piece(row, octet * (kWords / 4) + w / 4));
      }
    } else {
      // Whole pieces, which are in different banks for the lanes of a warp.
      u32 window[kWords + 4];
#pragma unroll
      for (int w = 0; w < kWords + 4; w += 4) {
        *reinterpret_cast<uint4*>(&window[w]) =
            *reinterpret_cast<const uint4*>(piece(row, octet * (kWords / 4) + w / 4));
      }
      shift_words(pack.words, window, shift * int(sizeof(Stream)));
      if (left >= VALUES) return;
      // What follows in memory is another token's.
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const int e = octet * 8 + w * 8 / kWords;
        if (e >= left) {
          pack.words[w] = 0;
        } else if (sizeof(Stream) == 2 && e + 1 >= left) {
          pack.words[w] &= 0xffff;
        }
      }
    }
  }
};
