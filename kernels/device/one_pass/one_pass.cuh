// What the one-pass kernels share: persistent clusters of thread blocks, with the streams in shared memory.
//
// A cluster takes tiles of kTileTokens tokens in turn. Its block of rank b owns the channels
// [b * SIZE, (b + 1) * SIZE) of all N streams, so that it can project its slice of X and use it again while it
// is on the chip; the projections' partial sums meet through distributed shared memory. X is read from memory
// once.
//
// Blocks are pipelines of warps with different tasks. Whatever goes from one to another goes through a
// ring of buffers with a barrier for `full` and one for `empty`:
//
//   copies in      from memory to shared memory by the copy engine (TMA), a whole tile at once
//   exchange       partial sums to the block that owns the token (`send`), its reply to all blocks
//   copies out     results, by the copy engine or by plain stores
//
// Wants sm_90a or a later architecture with the same suffix (setmaxnreg).

#pragma once

#include "base/matrix.cuh"

constexpr u32 kTileTokens = 8;
// Channels of one row of a copied box: 128 bytes, what the copy engine swizzles.
constexpr int kBoxChannels = 64;
constexpr u32 kRowBytes = 128;

// A copy engine's map of a tensor (CUtensorMap), by value as a kernel's argument.
struct alignas(64) TensorMap {
  u64 words[16];
};

// ---- shared memory ----------------------------------------------------------------------------------

// Addresses of shared memory are 32 bits wide, as the instructions want them.
__device__ inline u32 shared_address(const void* pointer) {
  return u32(__cvta_generic_to_shared(pointer));
}

__device__ inline uint4 read4(u32 at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(at)
               : "memory");
  return v;
}
__device__ inline uint2 read2(u32 at) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at) : "memory");
  return v;
}
__device__ inline u32 read1(u32 at) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
  return v;
}
__device__ inline void write4(u32 at, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}
__device__ inline void write2(u32 at, uint2 v) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(v.x), "r"(v.y) : "memory");
}
__device__ inline void write1(u32 at, u32 v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(v) : "memory");
}
__device__ inline float4 read_float4(u32 at) {
  const uint4 v = read4(at);
  return {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
}
__device__ inline float read_float(u32 at) { return __uint_as_float(read1(at)); }
__device__ inline void read_floats(float (&values)[4], u32 at) {
  const float4 v = read_float4(at);
  values[0] = v.x, values[1] = v.y, values[2] = v.z, values[3] = v.w;
}
__device__ inline void write_float4(u32 at, float4 v) {
  write4(at,
         {__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w)});
}
__device__ inline void write_float(u32 at, float v) { write1(at, __float_as_uint(v)); }

// Four 8 x 8 matrices, two, or one; lane l gives the address of row l % 8 of matrix l / 8. Row g, columns 2q and
// 2q + 1 go to lane 4 g + q; with `transposed` rows 2q and 2q + 1 of column g.
__device__ inline void read_matrices(u32 (&m)[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(at)
               : "memory");
}
__device__ inline void read_matrices(u32 (&m)[2], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(m[0]), "=r"(m[1])
               : "r"(at)
               : "memory");
}
__device__ inline void read_matrix(u32& m, u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(m)
               : "r"(at)
               : "memory");
}
__device__ inline void read_transposed(u32 (&m)[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(at)
               : "memory");
}
__device__ inline void read_transposed(u32 (&m)[2], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(m[0]), "=r"(m[1])
               : "r"(at)
               : "memory");
}
__device__ inline void write_matrices(u32 at, const u32 (&m)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
               "r"(m[0]), "r"(m[1]), "r"(m[2]), "r"(m[3])
               : "memory");
}
__device__ inline void write_transposed(u32 at, const u32 (&m)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
               "r"(m[0]), "r"(m[1]), "r"(m[2]), "r"(m[3])
               : "memory");
}
__device__ inline void write_transposed(u32 at, const u32 (&m)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(at),
               "r"(m[0]), "r"(m[1])
               : "memory");
}

// Where the 16 bytes `unit` (of 8) of row `row` lie, both within a swizzled box whose start is a multiple of
// 1024 bytes.
__device__ inline u32 swizzled(u32 row, u32 unit) {
  return row * kRowBytes + ((unit ^ (row & 7)) << 4);
}

// ---- barriers ----------------------------------------------------------------------------------------

// One phase ends when `count` arrivals and all announced bytes are there. Waiting for phase p (its parity)
// returns once p is over.
__device__ inline void init_barrier(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// After the barriers of a block are there, before any other block may use them.
__device__ inline void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void arrive_and_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ inline void wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
// The same where what is waited for was written by other blocks of the cluster.
__device__ inline void wait_for_cluster(u32 barrier, u32 parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Slot and parity of a ring of SLOTS buffers; the parity is that of the `full` barrier of this use, and
// its opposite the one of `empty`.
template <int SLOTS>
struct Ring {
  u32 slot = 0, parity = 0;
  __device__ void next() {
    if (++slot == SLOTS) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// ---- clusters ----------------------------------------------------------------------------------------

__device__ inline u32 cluster_rank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ inline u32 cluster_size() {
  u32 size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The start of a block, by all threads: its barriers are there. Each waits with `cluster_wait` for those of the others
// before it sends anything.
__device__ inline void start_cluster() {
  __syncthreads();
  cluster_arrive();
}
// The end of a block that others may still send to: its shared memory stays until all of them are here.
__device__ inline void end_cluster() {
  __syncwarp();
  cluster_arrive();
  cluster_wait();
}
// The same place in the shared memory of block `rank`.
__device__ inline u32 in_block(u32 at, u32 rank) {
  u32 there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
  return there;
}
// 16 bytes to another block; they count for the barrier there. Both are addresses from `in_block`.
__device__ inline void send(u32 at, float4 v, u32 barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(at),
      "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier)
      : "memory");
}

// The same with 4 bytes.
__device__ inline void send(u32 at, float v, u32 barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(at), "f"(v),
      "r"(barrier)
      : "memory");
}

// ---- the copy engine -----------------------------------------------------------------------------------

// Lines that nobody reads again soon.
__device__ inline u64 evict_first() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// A box of a tensor [stream, channels / 64, token, 64], whose coordinates are those of its first element. What
// lies outside of the tensor is zero, and counts for the barrier like the rest.
__device__ inline void copy_in(u32 to, const TensorMap& map, int token, int box, int stream,
                               u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(to),
      "l"(&map), "r"(0), "r"(token), "r"(box), "r"(stream), "r"(barrier), "l"(policy)
      : "memory");
}
// `bytes` in a row, in multiples of 16.
__device__ inline void copy_in(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
// A map itself, for the first copy not to wait for it.
__device__ inline void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// A box to the L2 cache, for `copy_in` to find it there.
__device__ inline void prefetch(const TensorMap& map, int token, int box, int stream) {
  asm volatile(
      "cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];" ::"l"(&map), "r"(0),
      "r"(token), "r"(box), "r"(stream)
      : "memory");
}
// The other way; what lies outside is not written. Wants `fence_for_copies` by all who wrote the box.
__device__ inline void copy_out(const TensorMap& map, int token, int box, int stream, u32 from) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::
          "l"(&map),
      "r"(from), "r"(0), "r"(token), "r"(box), "r"(stream)
      : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until all but the last `LEFT` groups have read shared memory; `finish_copies`: until all is in memory.
template <int LEFT>
__device__ inline void wait_for_reads() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(LEFT) : "memory");
}
__device__ inline void finish_copies() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// Makes this thread's writes to shared memory visible to the copy engine.
__device__ inline void fence_for_copies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- the place of a thread, asked for again ------------------------------------------------------------

// Special registers of a thread that these read every time: what is computed from them need not be kept in registers of
// the kernel meanwhile, of which it has too few.
__device__ inline u32 lane_id() {
  u32 lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}
__device__ inline u32 thread_id() {
  u32 thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}
__device__ inline u32 cluster_id() {
  u32 id;
  asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(id));
  return id;
}
__device__ inline u32 num_clusters() {
  u32 num;
  asm volatile("mov.u32 %0, %%nclusterid.x;" : "=r"(num));
  return num;
}

// ---- global memory and registers -------------------------------------------------------------------------

__device__ inline void write_through(void* at, uint4 v) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

// The registers of each thread of this warpgroup from here on. All warpgroups together may have no more than
// the kernel started with.
template <int COUNT>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
