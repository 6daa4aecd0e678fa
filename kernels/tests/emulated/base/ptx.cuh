// The instructions of kernels/device/base/ptx.cuh on a CPU: `emulator.h`.

#pragma once

#include "base/types.cuh"
#include "emulator.h"

// ---- numbers ---------------------------------------------------------------------------------------

inline float of_bf16(u16 v) { return __uint_as_float(u32(v) << 16); }
inline u16 to_bf16(float v) {
  u32 word = __float_as_uint(v);
  if (v != v) return 0x7fff;
  word += 0x7fff + (word >> 16 & 1);
  return u16(word >> 16);
}
// Compilers convert by a call. The exponents' offsets differ by 112; infinities and NaN have the largest exponent.
inline float of_f16(u16 v) {
  const float magnitude = __uint_as_float((v & 0x7fffu) << 13) * 0x1p112f;
  const u32 largest = (v & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0;
  return __uint_as_float(__float_as_uint(magnitude) | largest | (v & 0x8000u) << 16);
}
inline u16 to_f16(float v) { return bits<u16>(_Float16(v)); }

inline float wide(f16 v) { return of_f16(v.bits); }
inline u32 pair_of(bf16*, float a, float b) { return to_bf16(a) | u32(to_bf16(b)) << 16; }
inline u32 pair_of(f16*, float a, float b) { return to_f16(a) | u32(to_f16(b)) << 16; }
inline float approximate_reciprocal(float v) { return 1.f / v; }
inline float approximate_reciprocal_of_normal(float v) { return 1.f / v; }
inline float approximate_root(float v) { return sqrtf(v); }
inline float approximate_inverse_root(float v) { return 1.f / sqrtf(v); }

// ---- tensor cores ----------------------------------------------------------------------------------

// d += a b with HALVES * 8 columns of a.
template <int HALVES, float (*WIDE)(u16)>
void multiply(float (&d)[4], const u32* a, const u32* b) {
  u32 own[6] = {};
  for (int i = 0; i < 2 * HALVES; ++i) own[i] = a[i];
  for (int i = 0; i < HALVES; ++i) own[4 + i] = b[i];
  const auto all = emulated::exchange(own, 6);
  const int g = emulated::lane() / 4, q = emulated::lane() % 4;
  double left[2][8 * HALVES], right[2][8 * HALVES];
  for (int i = 0; i < 2; ++i) {
    for (int k = 0; k < 8 * HALVES; ++k) {
      left[i][k] = WIDE(u16(all[4 * g + k % 8 / 2][k / 8 * 2 + i] >> k % 2 * 16));
      right[i][k] = WIDE(u16(all[4 * (2 * q + i) + k % 8 / 2][4 + k / 8] >> k % 2 * 16));
    }
  }
  for (int e = 0; e < 4; ++e) {
    double sum = 0;
    for (int k = 0; k < 8 * HALVES; ++k) sum += left[e / 2][k] * right[e % 2][k];
    d[e] = float(d[e] + sum);
  }
}
inline void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, uint2 b) {
  const u32 a[4] = {a0, a1, a2, a3}, both[2] = {b.x, b.y};
  multiply<2, of_bf16>(d, a, both);
}
inline void mma_k8(float (&d)[4], u32 a0, u32 a1, u32 b) {
  const u32 a[2] = {a0, a1};
  multiply<1, of_bf16>(d, a, &b);
}
inline void mma_tf32(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, uint2 b) {
  const u32 own[6] = {a0, a1, a2, a3, b.x, b.y};
  const auto all = emulated::exchange(own, 6);
  const int g = emulated::lane() / 4, q = emulated::lane() % 4;
  const auto wide = [](u32 word) { return double(__uint_as_float(word & 0xffffe000)); };
  for (int e = 0; e < 4; ++e) {
    double sum = 0;
    for (int k = 0; k < 8; ++k) {
      const u32 left = all[4 * g + k % 4][k / 4 * 2 + e / 2];
      sum += wide(left) * wide(all[4 * (2 * q + e % 2) + k % 4][4 + k / 4]);
    }
    // Tensor cores drop the last bits of a sum: so long sums show here.
    sum += d[e];
    d[e] = float(sum);
    if (std::abs(double(d[e])) > std::abs(sum)) d[e] = std::nextafter(d[e], 0.f);
  }
}
inline void mma_half(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, uint2 b) {
  const u32 a[4] = {a0, a1, a2, a3}, both[2] = {b.x, b.y};
  multiply<2, of_f16>(d, a, both);
}
inline void mma_half(float (&d)[4], const u32 (&a)[2], const u32 (&b)[1]) {
  multiply<1, of_f16>(d, a, b);
}

// ---- shared memory ----------------------------------------------------------------------------------

template <class T>
T read_shared(u32 at) {
  T v;
  memcpy(&v, emulated::at(at, sizeof v, sizeof v), sizeof v);
  return v;
}
template <class T>
void write_shared(u32 at, T v) {
  memcpy(emulated::at(at, sizeof v, sizeof v), &v, sizeof v);
}
inline uint4 read4(u32 at) { return read_shared<uint4>(at); }
inline uint2 read2(u32 at) { return read_shared<uint2>(at); }
inline u32 read1(u32 at) { return read_shared<u32>(at); }
inline void write4(u32 at, uint4 v) { write_shared(at, v); }
inline void write2(u32 at, uint2 v) { write_shared(at, v); }
inline void write1(u32 at, u32 v) { write_shared(at, v); }

// Calls `use(i, row, at)` for the two halves of a lane's word of matrix i: the row's 16 bytes, and the bytes there.
template <int MATRICES, bool TRANSPOSED, class Use>
void for_halves(u32 at, Use use) {
  const auto all = emulated::exchange(&at, 1);
  const int g = emulated::lane() / 4, q = emulated::lane() % 4;
  for (int i = 0; i < MATRICES; ++i) {
    for (int half = 0; half < 2; ++half) {
      const int row = TRANSPOSED ? 2 * q + half : g, column = TRANSPOSED ? g : 2 * q + half;
      use(i, half, emulated::at(all[8 * i + row][0], 16, 16) + 2 * column);
    }
  }
}
template <int MATRICES, bool TRANSPOSED>
void load_matrices(u32* m, u32 at) {
  u32 words[MATRICES] = {};
  for_halves<MATRICES, TRANSPOSED>(at, [&](int i, int half, const unsigned char* from) {
    u16 v;
    memcpy(&v, from, 2);
    words[i] |= u32(v) << 16 * half;
  });
  std::copy(words, words + MATRICES, m);
}
template <int MATRICES, bool TRANSPOSED>
void store_matrices(u32 at, const u32* m) {
  for_halves<MATRICES, TRANSPOSED>(at, [&](int i, int half, unsigned char* to) {
    const u16 v = u16(m[i] >> 16 * half);
    memcpy(to, &v, 2);
  });
}
inline void read_matrices(u32 (&m)[4], u32 at) { load_matrices<4, false>(m, at); }
inline void read_matrices(u32 (&m)[2], u32 at) { load_matrices<2, false>(m, at); }
inline void read_matrix(u32& m, u32 at) { load_matrices<1, false>(&m, at); }
inline void read_transposed(u32 (&m)[4], u32 at) { load_matrices<4, true>(m, at); }
inline void read_transposed(u32 (&m)[2], u32 at) { load_matrices<2, true>(m, at); }
inline void write_matrices(u32 at, const u32 (&m)[4]) { store_matrices<4, false>(at, m); }
inline void write_matrices(u32 at, const u32 (&m)[2]) { store_matrices<2, false>(at, m); }
inline void write_transposed(u32 at, const u32 (&m)[4]) { store_matrices<4, true>(at, m); }
inline void write_transposed(u32 at, const u32 (&m)[2]) { store_matrices<2, true>(at, m); }

// ---- products of warpgroups --------------------------------------------------------------------------

inline u64 lines_at(u32 at) { return u64(1) << 62 | u64(64) << 32 | (at & 0x3ffff) >> 4; }
inline u64 transposed_lines_at(u32 at) { return lines_at(at) | u64(64) << 16; }
inline void begin_products() {}
inline void commit_products() {}
inline void finish_products() {}

// A value of the lines, each 1024 bytes behind those 8 before it.
inline u16 of_lines(u64 lines, int line, int value) {
  u32 at = u32(lines & 0x3fff) * 16 + line / 8 * 1024 + line % 8 * 128 + 2 * value;
  at ^= at >> 3 & 0x70;
  u16 v;
  memcpy(&v, emulated::at(emulated::block().rank << 20 | at, 2, 2), 2);
  return v;
}
// Calls `left(row, k)` for the two rows of a lane.
template <int SUMS, class Left, class Wide>
void multiply_lines(float (&d)[SUMS], u64 lines, bool adds, Left left, Wide wide) {
  const int g = emulated::lane() / 4, q = emulated::lane() % 4;
  for (int s = 0; s < SUMS; ++s) {
    const int row = g + s % 4 / 2 * 8, column = s / 4 * 8 + 2 * q + s % 2;
    double sum = 0;
    for (int k = 0; k < 16; ++k) {
      sum += double(wide(left(row, k))) * double(wide(of_lines(lines, column, k)));
    }
    d[s] = float((adds ? d[s] : 0.f) + sum);
  }
}
template <int SUMS, class Wide>
void multiply_fragments(float (&d)[SUMS], const u32 (&a)[4], u64 lines, bool adds, Wide wide) {
  const auto all = emulated::exchange(a, 4);
  u16 own[2][16];
  for (int h = 0; h < 2; ++h) {
    for (int k = 0; k < 16; ++k) {
      const u32 word = all[emulated::lane() / 4 * 4 + k % 8 / 2][k / 8 * 2 + h];
      own[h][k] = u16(word >> k % 2 * 16);
    }
  }
  const auto left = [&](int row, int k) { return own[row / 8][k]; };
  multiply_lines(d, lines, adds, left, wide);
}
template <int SUMS>
void multiply(float (&d)[SUMS], const u32 (&a)[4], u64 lines, bool adds) {
  multiply_fragments(d, a, lines, adds, of_bf16);
}
template <int SUMS>
void multiply_half(float (&d)[SUMS], const u32 (&a)[4], u64 lines, bool adds) {
  multiply_fragments(d, a, lines, adds, of_f16);
}
template <int SUMS>
void multiply(float (&d)[SUMS], u64 transposed, u64 lines, bool adds) {
  const int first = emulated::current->index / 32 % 4 * 16;
  const auto left = [&](int row, int k) { return of_lines(transposed, k, first + row); };
  multiply_lines(d, lines, adds, left, of_bf16);
}

// ---- barriers ----------------------------------------------------------------------------------------

inline void sync_threads(int number, int count) {
  emulated::gather(emulated::block().named[number], count);
}
template <int COUNT>
void sync_threads(int number) {
  sync_threads(number, COUNT);
}

inline emulated::Barrier& barrier_at(u32 at) {
  emulated::at(at, 8, 8);
  return emulated::cluster->blocks[at >> 20].barriers[((at & 0xfffff) - emulated::kFirst) / 8];
}
inline emulated::Barrier& started_barrier_at(u32 at) {
  emulated::Barrier& barrier = barrier_at(at);
  if (barrier.count < 0) emulated::fail("a barrier that nobody has started");
  return barrier;
}
inline void count(emulated::Barrier& barrier, int arrivals, long bytes) {
  barrier.pending -= arrivals;
  barrier.bytes += bytes;
  if (barrier.pending < 0) emulated::fail("more arrivals than a barrier expects");
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
  emulated::has_progress = true;
}
inline void init_barrier(u32 at, u32 count) {
  emulated::Barrier& barrier = barrier_at(at);
  if (barrier.count >= 0) emulated::fail("a barrier is started twice");
  barrier.count = barrier.pending = int(count);
}
inline void publish_barriers() {}
inline void arrive(u32 at) { count(started_barrier_at(at), 1, 0); }
inline void arrive_and_expect(u32 at, u32 bytes) { count(started_barrier_at(at), 1, bytes); }
inline void complete(u32 at, long bytes) { count(started_barrier_at(at), 0, -bytes); }
inline void wait(u32 at, u32 parity) {
  const emulated::Barrier& barrier = started_barrier_at(at);
  while (barrier.phase % 2 == parity) emulated::yield();
  emulated::has_progress = true;
}
inline void wait_for_cluster(u32 at, u32 parity) { wait(at, parity); }

// ---- clusters ----------------------------------------------------------------------------------------

inline u32 cluster_rank() { return emulated::block().rank; }
inline u32 cluster_size() { return u32(emulated::cluster->blocks.size()); }
inline void cluster_arrive() {
  emulated::Gathering& gathering = emulated::cluster->gathering;
  emulated::current->cluster_generation = gathering.generation;
  if (++gathering.arrived < int(emulated::cluster->num_threads * cluster_size())) return;
  gathering.arrived = 0;
  ++gathering.generation;
  emulated::has_progress = true;
}
inline void cluster_wait() {
  const emulated::Gathering& gathering = emulated::cluster->gathering;
  while (gathering.generation == emulated::current->cluster_generation) emulated::yield();
  emulated::has_progress = true;
}
inline u32 in_block(u32 at, u32 rank) { return (at & 0xfffff) | rank << 20; }
inline void arrive_in_block(u32 at) { arrive(at); }
inline void send(u32 at, float4 v, u32 barrier) {
  write_shared(at, v);
  complete(barrier, sizeof v);
}
inline void send(u32 at, float2 v, u32 barrier) {
  write_shared(at, v);
  complete(barrier, sizeof v);
}
inline void send(u32 at, float v, u32 barrier) {
  write_shared(at, v);
  complete(barrier, sizeof v);
}

// ---- copies ------------------------------------------------------------------------------------------

struct alignas(64) TensorMap {
  u64 words[16];
};

// Values of a map: [tokens, streams, hidden], every `step`-th stream from `first` on, of each the channels from `start`
// on that lie before `end`, in boxes.
struct Map {
  void* values;
  int tokens, streams, hidden, first, step;
  int box_tokens, box_channels, box_streams;
  int element_bytes = sizeof(STREAM);
  int start = 0, end = hidden;

  TensorMap tensor_map() const { return {{reinterpret_cast<u64>(this)}}; }
  int box_bytes() const { return box_tokens * box_channels * box_streams * element_bytes; }
};

// Calls `use(value, place, bytes)` for every value of a box, null outside of the tensor, and its place in shared memory.
template <class Use>
void for_box(u32 shared, const Map& map, int token, int box, int stream, Use use) {
  if (shared % 128) emulated::fail("a box that is not aligned");
  const int line = 128 / map.element_bytes, boxes = map.box_channels / line;
  for (int i = 0; i < map.box_tokens * map.box_channels * map.box_streams; ++i) {
    const int c = i % line, t = i / line % map.box_tokens, b = i / line / map.box_tokens % boxes;
    const int s = i / line / map.box_tokens / boxes;
    const u32 start = shared + (i / line) * 128;
    const u32 place = (start + map.element_bytes * c) ^ (start >> 7 & 7) << 4;
    const int own_stream = map.first + map.step * (stream + s);
    const int channel = map.start + (box + b) * line + c;
    const bool is_there = token + t < map.tokens && own_stream < map.streams && channel < map.end;
    const size_t row = size_t(token + t) * map.streams + own_stream;
    char* values = static_cast<char*>(map.values);
    const size_t element = row * map.hidden + channel;
    use(is_there ? values + element * map.element_bytes : nullptr, place, map.element_bytes);
  }
}
inline const Map& map_of(const TensorMap& map) {
  return *reinterpret_cast<const Map*>(map.words[0]);
}
inline u64 evict_first() { return 0; }
inline void copy_in(u32 to, const TensorMap& map, int token, int box, int stream, u32 barrier,
                    u64) {
  for_box(to, map_of(map), token, box, stream, [](const void* value, u32 place, int bytes) {
    char* to = reinterpret_cast<char*>(emulated::at(place, bytes, bytes));
    value ? memcpy(to, value, bytes) : memset(to, 0, bytes);
  });
  complete(barrier, map_of(map).box_bytes());
}
inline void copy_in(u32 to, const void* from, u32 bytes, u32 barrier) {
  if (bytes == 0 || bytes % 16 || reinterpret_cast<u64>(from) % 16) emulated::fail("a bulk copy");
  memcpy(emulated::at(to, bytes, 16), from, bytes);
  complete(barrier, bytes);
}
inline void copy_to_both(u32 to, const void* from, u32 bytes, u32 barrier) {
  if (cluster_size() != 2) emulated::fail("a copy to both blocks of a cluster");
  for (u32 rank : {0, 1}) copy_in(in_block(to, rank), from, bytes, in_block(barrier, rank));
}
inline void copy_out(const TensorMap& map, int token, int box, int stream, u32 from) {
  for_box(from, map_of(map), token, box, stream, [](void* value, u32 place, int bytes) {
    if (value) memcpy(value, emulated::at(place, bytes, bytes), bytes);
  });
}
inline void prefetch(const TensorMap&) {}
inline void prefetch(const TensorMap&, int, int, int) {}
inline void prefetch(const void* from, u32 bytes) {
  if (bytes == 0 || bytes % 16 || uintptr_t(from) % 16) emulated::fail("no such prefetch");
  for (u32 b = 0; b < bytes; b += 16) *(volatile const char*)((const char*)from + b);
}
inline void commit_copies() {}
template <int LEFT>
void wait_for_reads() {}
inline void finish_copies() {}
inline void fence_for_copies() {}
inline void copy_part(u32 to, const void* from, bool exists) {
  write4(to, exists ? *static_cast<const uint4*>(from) : uint4{});
}
inline void arrive_behind_copies(u32 barrier) { arrive(barrier); }
inline void copy_async(void* to, const void* from, int bytes = 16) {
  const u64 start = reinterpret_cast<u64>(to) - reinterpret_cast<u64>(emulated::static_memory);
  if (start + 16 > emulated::kSharedBytes || start % 16 || reinterpret_cast<u64>(from) % 16) {
    emulated::fail("a copy of 16 bytes");
  }
  memset(to, 0, 16);
  memcpy(to, from, bytes);
}
inline void copy_word_async(void* to, const void* from) { memcpy(to, from, 4); }
inline void commit_async() {}
template <int PENDING>
void wait_for_async() {}

// ---- the place of a thread; global memory and registers ------------------------------------------------

inline u32 lane_id() { return emulated::lane(); }
inline u32 thread_id() { return emulated::current->index; }
inline u32 cluster_id() { return emulated::cluster->index; }
inline u32 num_clusters() { return emulated::cluster->num_clusters; }
inline float2 load_pair(const float* from) { return *reinterpret_cast<const float2*>(from); }
inline float load_single(const float* from) { return *from; }
inline void write_through(void* at, uint4 v) { memcpy(at, &v, sizeof v); }
template <int COUNT>
void take_registers() {}
template <int COUNT>
void give_registers() {}
inline void keep(u32&) {}
inline void keep(float&) {}
inline void pin(float, float, float, float) {}
