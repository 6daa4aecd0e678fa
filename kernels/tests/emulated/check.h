// What the checks of emulated kernels share: operands at the edge of pages that nobody may touch, random numbers, and
// errors against float64.

#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include "base/common.cuh"

using emulated::fail;

// Room for values, full of NaN, that ends where a page begins that nobody may touch, and so does the page before.
template <class T>
T* guarded(size_t num) {
  const size_t page = 4096, bytes = (num * sizeof(T) + 15) / 16 * 16;
  const size_t pages = (bytes + page - 1) / page + 2;
  char* start = static_cast<char*>(
      mmap(nullptr, pages * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  mprotect(start, page, PROT_NONE);
  mprotect(start + (pages - 1) * page, page, PROT_NONE);
  char* at = start + (pages - 1) * page - bytes;
  memset(at, 0xff, bytes);
  return reinterpret_cast<T*>(at);
}

inline std::mt19937 numbers(7);
inline float normal() {
  static std::normal_distribution<float> distribution;
  return distribution(numbers);
}
template <class Make>
float* floats(size_t num, Make make) {
  float* values = guarded<float>(num);
  for (size_t i = 0; i < num; ++i) values[i] = make(i);
  return values;
}
inline void set(u16& value, float v) { value = to_bf16(v); }
inline void set(bf16& value, float v) { value.bits = to_bf16(v); }
inline void set(f16& value, float v) { value.bits = to_f16(v); }
inline void set(float& value, float v) { value = v; }
template <class T = u16>
T* streams(size_t num) {
  T* values = guarded<T>(num);
  for (size_t i = 0; i < num; ++i) set(values[i], normal());
  return values;
}

// The sum of an element over arrays of a size that lie behind each other.
inline double sum_of_arrays(const float* arrays, int num, size_t size, size_t element) {
  double sum = 0;
  for (int i = 0; i < num; ++i) sum += arrays[i * size + element];
  return sum;
}

inline double logistic(double z) { return 1 / (1 + std::exp(-z)); }

// The relative error of an array: L2 norms.
struct Error {
  const char* name;
  double limit;
  double difference = 0, whole = 0;

  void add(double got, double exact) {
    difference += (got - exact) * (got - exact);
    whole += exact * exact;
  }
  ~Error() {
    const double error = std::sqrt(difference / whole);
    printf("%s %.1e\n", name, error);
    if (!(error <= limit)) fail("too large an error");
  }
};
// One rounding to bfloat16 or to float16, and sums of products in float16 or in bfloat16 parts; everything in float32.
constexpr double kRoundingError = 1.8e-3, kHalfRoundingError = kRoundingError / 8;
constexpr double kProductsError = 3e-4, kFloatError = 1e-5;
constexpr double kFloat32Error = 3e-7;
// The one of three for the dtype of the streams.
constexpr double of_stream(double of_bf16, double of_f16, double of_f32) {
  return std::is_same_v<STREAM, float> ? of_f32 : std::is_same_v<STREAM, f16> ? of_f16 : of_bf16;
}

// A call: the width, tokens, clusters, and whether the cotangent of the streams is deferred, or which of some kernels it
// is; the seed of the order in which warps go on; and whether float64 gets another phi than the kernel, which has to be
// found.
struct Sizes {
  int hidden, tokens, clusters, deferred;
  unsigned seed;
  bool is_spoiled;

  explicit Sizes(char** argv)
      : hidden(atoi(argv[1])),
        tokens(atoi(argv[2])),
        clusters(atoi(argv[3])),
        deferred(atoi(argv[4])),
        seed(unsigned(atoi(argv[5]))),
        is_spoiled(atoi(argv[6])) {}
  void spoil(const float* phi) const {
    if (is_spoiled) const_cast<float*>(phi)[0] += 10.f;
  }
  size_t values() const { return size_t(tokens) * hidden; }
  int ranks(int channels) const { return (hidden + channels - 1) / channels; }
};

inline Settings settings() {
  Settings own;
  memset(static_cast<void*>(&own), 0, sizeof own);
  own.sinkhorn_iters = 3;
  own.sinkhorn_eps = 1e-6f;
  own.pre_eps = 1e-3f;
  own.norm_eps = 1e-6f;
  own.post_scale = 2;
  own.post_eps = 2e-3f;
  return own;
}
