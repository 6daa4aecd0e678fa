// What all kernels share: types of the streams, loads and stores, sums over a warp, settings.
//
// A file is compiled once for every dtype of the streams and every size that has code of its own:
//   STREAM  bf16, f16 or f32
//   SIZE    the number of streams (in projection.cu: of groups of 8 columns), or the largest one
//   EXACT   whether SIZE is the number itself and not its bound; only kernels for a bound take rows that
//           are not aligned
//   SUFFIX  of the symbols, such as _n4_bf16

#pragma once

#define CONCAT_(a, b) a##b
#define CONCAT(a, b) CONCAT_(a, b)
#define KERNEL(name, ...) \
  extern "C" __global__ void __launch_bounds__(__VA_ARGS__) CONCAT(mhc_##name, SUFFIX)

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

struct bf16 {
  u16 bits;
};
struct f16 {
  u16 bits;
};
using f32 = float;

using Stream = STREAM;

constexpr u32 kAllLanes = 0xffffffff;

// The set that H_res is kept on, with the numbers of `Constraint` in contract/config.rs.
enum class Constraint : int { kBirkhoff = 0, kNone = 1, kIdentity = 2, kPermutations = 3 };

// The settings of a call (contract/config.rs has their meaning; gpu/launch.rs the same struct).
struct Settings {
  Constraint constraint;
  int sinkhorn_iters;
  float sinkhorn_eps;
  int clamp;      // divisions by max(sum, eps) and not by sum + eps
  int row_first;  // row_column
  float norm_eps;
  int norm_eps_outside;
  float pre_eps;
  float post_scale;
};
static_assert(sizeof(Settings) == 9 * 4, "gpu/launch.rs has the same fields");

// Which coefficients a token has (contract/layout.rs; gpu/launch.rs the same struct).
struct Layout {
  int n, num_post, num_res;

  __device__ int num() const { return n + num_post + num_res; }
  // Which of alpha's gates belongs to column c.
  __device__ int gate(int c) const { return (c >= n) + (c >= n + num_post); }
};

// ---- values of the streams ----------------------------------------------------------------------

__device__ inline float wide(bf16 v) { return __uint_as_float(u32(v.bits) << 16); }
__device__ inline float wide(f16 v) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
}
__device__ inline float wide(f32 v) { return v; }

// Two values in one word, the first in the lower half; rounded to nearest even.
__device__ inline u32 pair_of(bf16*, float a, float b) {
  u32 word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(b), "f"(a));
  return word;
}
__device__ inline u32 pair_of(f16*, float a, float b) {
  u32 word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(b), "f"(a));
  return word;
}

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

// V <= 8 values from row + at on, zero from row + end on. ALIGNED: see `aligned`; then all V values are
// there or none.
template <bool ALIGNED, int V, class S>
__device__ inline void load(Pack<S, V>& pack, const S* row, int at, int end) {
  constexpr int kWords = Pack<S, V>::kWords;
  if constexpr (ALIGNED) {
    constexpr int kStep = kWords < 4 ? kWords : 4;
    using Word = typename Vector<kStep>::type;
#pragma unroll
    for (int w = 0; w < kWords; w += kStep) {
      Word part = {};
      if (at < end) part = *reinterpret_cast<const Word*>(row + at + w * 4 / int(sizeof(S)));
      *reinterpret_cast<Word*>(&pack.words[w]) = part;
    }
  } else {
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
  float result;
  asm("rcp.approx.f32 %0, %1;" : "=f"(result) : "f"(v));
  const float error = fmaf(-v, result, 1.f);
  return fabsf(error) < 1.f ? fmaf(result, error, result) : result;
}
__device__ inline float square_root(float v) {
  float result;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(result) : "f"(v));
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
template <int HALF>
__device__ inline void halve(float (&values)[32], int lane) {
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
