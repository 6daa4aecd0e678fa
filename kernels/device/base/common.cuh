// What all kernels share: types of the streams, loads and stores, sums over a warp, settings.
//
// A file is compiled once for every dtype of the streams and every size that has code of its own:
//   STREAM  bf16, f16 or f32
//   SIZE    the number of streams (in projection.cu: of groups of 8 columns), or the largest one
//   EXACT   whether SIZE is the number itself and not its bound; only kernels for a bound take rows that
//           are not aligned
//   SUFFIX  of the symbols, such as _n4_bf16
//
// The build writes into generated.cuh SIZE and EXACT, Constraint, SettingsFields and LayoutFields, and the rows of
// kernels/tuning.rs for the size: tuning_<function>, and HAS_<function>, as not every size has every kernel.

#pragma once

#include "base/ptx.cuh"
#include "generated.cuh"

#define CONCAT_(a, b) a##b
#define CONCAT(a, b) CONCAT_(a, b)
#define KERNEL(name, ...) \
  extern "C" __global__ void __launch_bounds__(__VA_ARGS__) CONCAT(mhc_##name, SUFFIX)

using Stream = STREAM;

// The one of two types that a condition picks.
template <bool FIRST, class A, class B>
struct Choose {
  using Type = A;
};
template <class A, class B>
struct Choose<false, A, B> {
  using Type = B;
};

// The settings of a call (kernels/src/gpu/structs.rs).
using Settings = SettingsFields;

// Which coefficients a token has.
struct Layout : LayoutFields {
  __device__ int num() const { return n + num_post + num_res; }
  // Which of alpha's gates belongs to column c.
  __device__ int gate(int c) const { return (c >= n) + (c >= n + num_post); }
};

// ---- values of the streams ----------------------------------------------------------------------

__device__ inline float wide(bf16 v) { return __uint_as_float(u32(v.bits) << 16); }
__device__ inline float wide(f32 v) { return v; }

// V consecutive values as they lie in memory.
template <class S, int V>
struct Pack {
  static constexpr int kWords = V * int(sizeof(S)) / 4;
  u32 words[kWords];

  __device__ float operator[](int e) const {
    if constexpr (sizeof(S) == 4) {
      return __uint_as_float(words[e]);
    } else {
      return wide(S{u16(words[e / 2] >> (e % 2 * 16))});
    }
  }
  __device__ void set(const float (&v)[V]) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if constexpr (sizeof(S) == 4) {
        words[w] = __float_as_uint(v[w]);
      } else {
        words[w] = pair_of((S*)nullptr, v[2 * w], v[2 * w + 1]);
      }
    }
  }
};

template <int kWords>
struct Vector;
template <>
struct Vector<1> {
  using type = u32;
};
template <>
struct Vector<2> {
  using type = uint2;
};
template <>
struct Vector<4> {
  using type = uint4;
};

// Whether every 8 values of a row start at a multiple of 16 bytes, and no row ends within them.
__device__ inline bool aligned(int hidden) { return hidden % 8 == 0; }

// The words that begin `shift` bytes behind the first of a window. All indices are constants, so that both stay in
// registers.
template <int WORDS, int WINDOW>
__device__ inline void shift_words(u32 (&words)[WORDS], u32 (&window)[WINDOW], int shift) {
#pragma unroll
  for (int step = 8; step >= 4; step /= 2) {
    if (WINDOW - WORDS < step / 4) continue;
#pragma unroll
    for (int w = 0; w + step / 4 < WINDOW; ++w) {
      window[w] = shift & step ? window[w + step / 4] : window[w];
    }
  }
#pragma unroll
  for (int w = 0; w < WORDS; ++w) {
    words[w] = shift & 2 ? __funnelshift_r(window[w], window[w + 1], 16) : window[w];
  }
}

// V <= 8 values from row + at on, zero from row + end on. ALIGNED: see `aligned`; then all V values are
// there or none. Otherwise the aligned vectors are read that they lie in, where these lie in the row or before it;
// before the first row, which is aligned, there is nothing to read.
template <bool ALIGNED, int V, class S>
__device__ inline void load(Pack<S, V>& pack, const S* row, int at, int end) {
  constexpr int kWords = Pack<S, V>::kWords, kStep = kWords < 4 ? kWords : 4;
  using Word = typename Vector<kStep>::type;
  if constexpr (ALIGNED) {
#pragma unroll
    for (int w = 0; w < kWords; w += kStep) {
      Word part = {};
      if (at < end) part = *reinterpret_cast<const Word*>(row + at + w * 4 / int(sizeof(S)));
      *reinterpret_cast<Word*>(&pack.words[w]) = part;
    }
  } else {
    constexpr int kVector = 4 * kStep / int(sizeof(S));
    const int shift = u64(row + at) % (4 * kStep);
    const Word* from = reinterpret_cast<const Word*>(u64(row + at) - shift);
    if (at + V + kVector <= end) {
      u32 window[kWords + kStep];
#pragma unroll
      for (int w = 0; w <= kWords; w += kStep) {
        *reinterpret_cast<Word*>(&window[w]) = from[w / kStep];
      }
      return shift_words(pack.words, window, shift);
    }
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if constexpr (sizeof(S) == 4) {
        pack.words[w] = at + w < end ? __float_as_uint(wide(row[at + w])) : 0;
      } else {
        const int e = at + 2 * w;
        const u32 low = e < end ? row[e].bits : 0;
        const u32 high = e + 1 < end ? row[e + 1].bits : 0;
        pack.words[w] = low | high << 16;
      }
    }
  }
}

template <bool ALIGNED, int V, class S>
__device__ inline void store(const Pack<S, V>& pack, S* row, int at, int end) {
  constexpr int kWords = Pack<S, V>::kWords;
  if constexpr (ALIGNED) {
    constexpr int kStep = kWords < 4 ? kWords : 4;
    using Word = typename Vector<kStep>::type;
    if (at >= end) return;
#pragma unroll
    for (int w = 0; w < kWords; w += kStep) {
      *reinterpret_cast<Word*>(row + at + w * 4 / int(sizeof(S))) =
          *reinterpret_cast<const Word*>(&pack.words[w]);
    }
  } else {
    // Words where these are aligned.
    if (sizeof(S) == 2 && at + V <= end && u64(row + at) % 4 == 0) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) reinterpret_cast<u32*>(row + at)[w] = pack.words[w];
      return;
    }
#pragma unroll
    for (int e = 0; e < V; ++e) {
      if (at + e >= end) return;
      if constexpr (sizeof(S) == 4) {
        row[at + e] = pack[e];
      } else {
        row[at + e] = S{u16(pack.words[e / 2] >> (e % 2 * 16))};
      }
    }
  }
}

// ---- arithmetic -----------------------------------------------------------------------------------

// Division and roots that round correctly call a function for numbers at the ends of the range. These
// round as well for nearly all others, and have the right limits.
__device__ inline float reciprocal(float v) {
  const float result = approximate_reciprocal(v);
  const float error = fmaf(-v, result, 1.f);
  return fabsf(error) < 1.f ? fmaf(result, error, result) : result;
}
__device__ inline float square_root(float v) {
  const float result = approximate_root(v);
  const float error = fmaf(-result, result, v);
  return fabsf(error) < v ? fmaf(error, 0.5f * reciprocal(result), result) : result;
}

// ---- sums over a warp ---------------------------------------------------------------------------

// The same bits in every lane: both partners of a step add the same two numbers.
__device__ inline float warp_sum(float v) {
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
  return v;
}

// One step of `warp_sums`: of 2 * HALF values a lane keeps the half that its bit says.
template <int HALF, int NUM>
__device__ inline void halve(float (&values)[NUM], int lane) {
  const bool upper = lane & HALF;
#pragma unroll
  for (int v = 0; v < HALF; ++v) {
    const float keep = upper ? values[v + HALF] : values[v];
    const float give = upper ? values[v] : values[v + HALF];
    values[v] = keep + __shfl_xor_sync(kAllLanes, give, HALF);
  }
}

// Sums of 32 values each over the lanes; lane l gets the sum of values[l]. Takes 31 exchanges and not
// 160.
__device__ inline float warp_sums(float (&values)[32], int lane) {
  halve<16>(values, lane);
  halve<8>(values, lane);
  halve<4>(values, lane);
  halve<2>(values, lane);
  halve<1>(values, lane);
  return values[0];
}
