// A cluster of thread blocks on a CPU, for the kernels of kernels/device as they are: a thread is a fiber, and the order in
// which warps go on is random. Words of CUDA C++ that the kernels use.
//
// What it finds: wrong values, reads and writes outside of operands and of shared memory, bytes or arrivals that a
// barrier does not expect, waits without an end. What it does not: the order in which a GPU makes writes visible, and
// speed.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __CUDA_ARCH__ 900

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};

template <class A, class B>
constexpr auto max(A a, B b) {
  using T = decltype(a + b);
  return T(a) > T(b) ? T(a) : T(b);
}
template <class A, class B>
constexpr auto min(A a, B b) {
  using T = decltype(a + b);
  return T(a) < T(b) ? T(a) : T(b);
}
template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(unsigned v) { return bits<float>(v); }
inline unsigned __float_as_uint(float v) { return bits<unsigned>(v); }
template <class T>
T __ldg(const T* from) {
  return *from;
}
inline int __clz(unsigned v) { return v ? __builtin_clz(v) : 32; }
inline unsigned __funnelshift_r(unsigned low, unsigned high, int shift) {
  return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t both = uint64_t(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i)
    result |= unsigned(both >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return result;
}

namespace emulated {

[[noreturn]] inline void fail(const char* what) {
  printf("%s\n", what);
  fflush(stdout);
  _exit(2);
}

struct Block;

// Threads that wait for each other: the last to come begins the next generation.
struct Gathering {
  int arrived = 0;
  unsigned generation = 0;
};

struct Warp {
  Block* block;
  Gathering gathering;
  unsigned values[2][32][8];  // of this exchange and of the one before
};

struct Thread {
  void* stack_pointer;
  unsigned index;
  Warp* warp;
  bool is_done = false;
  unsigned cluster_generation = 0;
};

// A barrier of shared memory (mbarrier).
struct Barrier {
  int count = -1, pending = 0;
  long bytes = 0;
  unsigned phase = 0;
};

// An address of shared memory is rank << 20 plus the place, which begins here: zero is no address.
constexpr unsigned kFirst = 1024, kSharedBytes = 232448;

struct Block {
  unsigned rank, index;
  std::unique_ptr<unsigned char[]> memory{new unsigned char[kFirst + kSharedBytes]};
  std::vector<Barrier> barriers{kSharedBytes / 8};
  std::map<int, Gathering> named;
  Gathering all;
};

struct Cluster {
  std::vector<Block> blocks;
  unsigned index, num_clusters, num_threads;
  Gathering gathering;
};

inline Cluster* cluster;
// Shared memory of blocks that run one at a time and reach it by pointers; null where addresses are enough.
inline unsigned char* static_memory;
// The row of blocks that runs, and how many there are.
inline unsigned row_of_blocks = 0, num_rows = 1;
inline Thread* current;
// Whether a thread got on since this was last unset.
inline bool has_progress;
inline void* scheduler;

extern "C" void emulated_switch(void** from, void* to);
asm(R"(
.text
.globl emulated_switch
emulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

// Other threads' turn.
inline void yield() { emulated_switch(&current->stack_pointer, scheduler); }

inline unsigned lane() { return current->index % 32; }
inline Block& block() { return *current->warp->block; }

inline void gather(Gathering& gathering, int threads) {
  const unsigned generation = gathering.generation;
  if (++gathering.arrived == threads) {
    gathering.arrived = 0;
    ++gathering.generation;
  }
  while (gathering.generation == generation) yield();
  has_progress = true;
}

// The values of all lanes.
inline unsigned (*exchange(const unsigned* own, int num))[8] {
  Warp& warp = *current->warp;
  unsigned (*values)[8] = warp.values[warp.gathering.generation % 2];
  for (int i = 0; i < num; ++i) values[lane()][i] = own[i];
  gather(warp.gathering, 32);
  return values;
}

inline unsigned char* at(unsigned address, unsigned bytes, unsigned alignment) {
  const unsigned rank = address >> 20, place = address & 0xfffff;
  const bool is_there = rank < cluster->blocks.size() && place >= kFirst &&
                        place + bytes <= kFirst + kSharedBytes && place % alignment == 0;
  if (!is_there) fail("an address outside of shared memory, or not aligned");
  if (static_memory) return static_memory + (place - kFirst);
  return cluster->blocks[rank].memory.get() + place;
}

inline void (*thread_body)();
inline void run_thread() {
  thread_body();
  current->is_done = true;
  has_progress = true;
  yield();
}

// Runs cluster `index` of `num_clusters`, whose blocks are `ranks`, with shared memory full of NaN.
inline void run_cluster(unsigned index, unsigned num_clusters, unsigned ranks, unsigned num_threads,
                        void (*body)(), unsigned seed) {
  constexpr size_t kStackBytes = 96 << 10;
  std::mt19937 random(seed);
  Cluster own{std::vector<Block>(ranks), index, num_clusters, num_threads, {}};
  cluster = &own;
  thread_body = body;
  std::vector<Warp> warps(ranks * num_threads / 32);
  std::vector<Thread> threads(ranks * num_threads);
  std::vector<std::unique_ptr<char[]>> stacks;
  for (unsigned t = 0; t < threads.size(); ++t) {
    Block& block = own.blocks[t / num_threads];
    block.rank = t / num_threads;
    block.index = index * ranks + block.rank;
    if (t % num_threads == 0) memset(block.memory.get(), 0xff, kFirst + kSharedBytes);
    if (static_memory) memset(static_memory, 0xff, kSharedBytes);
    warps[t / 32].block = &block;
    stacks.emplace_back(new char[kStackBytes]);
    uintptr_t top = reinterpret_cast<uintptr_t>(stacks.back().get() + kStackBytes) & ~uintptr_t(15);
    void** stack = reinterpret_cast<void**>(top);
    *--stack = nullptr;
    *--stack = reinterpret_cast<void*>(run_thread);
    for (int saved = 0; saved < 6; ++saved) *--stack = nullptr;
    threads[t].stack_pointer = stack;
    threads[t].index = t % num_threads;
    threads[t].warp = &warps[t / 32];
  }
  std::vector<unsigned> live(warps.size());
  for (unsigned w = 0; w < live.size(); ++w) live[w] = w;
  for (long idle = 0; !live.empty();) {
    const size_t which = random() % live.size();
    bool any = false, is_done = false;
    do {
      has_progress = false;
      is_done = true;
      for (unsigned l = 0; l < 32; ++l) {
        Thread& thread = threads[live[which] * 32 + l];
        if (thread.is_done) continue;
        is_done = false;
        current = &thread;
        emulated_switch(&scheduler, thread.stack_pointer);
      }
      any |= has_progress;
    } while (has_progress && !is_done && random() % 8);
    if (is_done) {
      live[which] = live.back();
      live.pop_back();
    }
    idle = any || is_done ? 0 : idle + 1;
    if (idle > 400000) fail("all threads wait");
  }
}

}  // namespace emulated

// ---- words of CUDA C++ -----------------------------------------------------------------------------

struct Index {
  struct Number {
    unsigned (*value)();
    operator unsigned() const { return value(); }
  } x, y;
};
inline const Index threadIdx{{[] { return emulated::current->index; }}};
inline const Index blockIdx{{[] { return emulated::block().index; }},
                            {[] { return emulated::row_of_blocks; }}};
inline const Index blockDim{{[] { return emulated::cluster->num_threads; }}};
inline const Index gridDim{
    {[] { return emulated::cluster->num_clusters * unsigned(emulated::cluster->blocks.size()); }},
    {[] { return emulated::num_rows; }}};

inline void __syncwarp() { emulated::exchange(nullptr, 0); }
inline void __syncthreads() {
  emulated::gather(emulated::block().all, emulated::cluster->num_threads);
}
template <class T>
T __shfl_sync(unsigned, T v, int from, int width = 32) {
  const unsigned own = bits<unsigned>(v);
  const auto values = emulated::exchange(&own, 1);
  return bits<T>(values[emulated::lane() / width * width + from % width][0]);
}
template <class T>
T __shfl_xor_sync(unsigned, T v, int mask) {
  const unsigned own = bits<unsigned>(v);
  return bits<T>(emulated::exchange(&own, 1)[emulated::lane() ^ mask][0]);
}
inline unsigned __reduce_max_sync(unsigned, unsigned v) {
  const auto values = emulated::exchange(&v, 1);
  unsigned most = 0;
  for (int l = 0; l < 32; ++l) most = max(most, values[l][0]);
  return most;
}
// Kernels without pointers have one array in dynamic shared memory, at its start.
inline unsigned __cvta_generic_to_shared(const void* pointer) {
  const unsigned start = emulated::block().rank << 20 | emulated::kFirst;
  if (!emulated::static_memory) return start;
  return start + unsigned(static_cast<const unsigned char*>(pointer) - emulated::static_memory);
}
inline void* __cvta_shared_to_generic(unsigned address) { return emulated::at(address, 1, 1); }
