// Instructions that CUDA C++ has no name for, a function each: nothing else is written in PTX. A header of the same name
// earlier in the compiler's path runs the kernels without a GPU (kernels/tests/emulated).

#pragma once

#include "base/types.cuh"

// ---- numbers ---------------------------------------------------------------------------------------

__device__ inline float wide(f16 v) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
}
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
// To a unit in the last place or so.
__device__ inline float approximate_reciprocal(float v) {
  float result;
  asm("rcp.approx.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}
// An approximate reciprocal, zero for what is no normal number.
__device__ inline float approximate_reciprocal_of_normal(float v) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}
__device__ inline float approximate_root(float v) {
  float result;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}
__device__ inline float approximate_inverse_root(float v) {
  float result;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}

// ---- tensor cores ----------------------------------------------------------------------------------

// Fragments are those of base/matrix.cuh.
__device__ inline void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, uint2 b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b.x), "r"(b.y));
}
// Products with 8 columns of A, two values of a stream in a word.
__device__ inline void mma_k8(float (&d)[4], u32 a0, u32 a1, u32 b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(b));
}
// Products with 8 columns of A in tf32: float32 without the last 13 bits.
__device__ inline void mma_tf32(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, uint2 b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b.x), "r"(b.y));
}
// The fragments of `mma`.
__device__ inline void mma_half(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, uint2 b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
      "%9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b.x), "r"(b.y));
}
__device__ inline void mma_half(float (&d)[4], const u32 (&a)[2], const u32 (&b)[1]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, "
      "%2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}

// ---- products of warpgroups ------------------------------------------------------------------------

// Four warps, the first of which has a number that is a multiple of four, multiply together and wait later. Such a product
// reads shared memory by lines of 128 bytes, swizzled as the copy engine does it, groups of 8 of which lie behind each
// other, from a multiple of 1024 bytes on. `lines_at` names some (a matrix descriptor): rows of 64 neighbours of the sum,
// of which a product takes the 16 from this place on; `transposed_lines_at` names 16 lines of 64 rows each.
__device__ inline u64 lines_at(u32 at) {
  constexpr u64 kGroup = 1024 / 16, kSwizzle = 1;
  return (at & 0x3ffff) >> 4 | u64(1) << 16 | kGroup << 32 | kSwizzle << 62;
}
__device__ inline u64 transposed_lines_at(u32 at) {
  constexpr u64 kGroup = 1024 / 16, kSwizzle = 1;
  return (at & 0x3ffff) >> 4 | kGroup << 16 | kGroup << 32 | kSwizzle << 62;
}
// Before products, and where registers of theirs have been written since the last ones.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// The end of a group: all products since the last one.
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until all groups are over.
__device__ inline void finish_products() {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// Numbers of operands of an instruction, and a product's sums as the first of them.
#define TEN(t) \
  "%" t "0, %" t "1, %" t "2, %" t "3, %" t "4, %" t "5, %" t "6, %" t "7, %" t "8, %" t "9"
#define NUMBERS_40 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, " TEN("1") ", " TEN("2") ", " TEN("3")
#define NUMBERS_70 NUMBERS_40 ", " TEN("4") ", " TEN("5") ", " TEN("6")
#define SUMS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS_32(d, i)                                                                     \
  SUMS_4(d, i), SUMS_4(d, i + 4), SUMS_4(d, i + 8), SUMS_4(d, i + 12), SUMS_4(d, i + 16), \
      SUMS_4(d, i + 20), SUMS_4(d, i + 24), SUMS_4(d, i + 28)
#define SUMS_40(d, i) SUMS_32(d, i), SUMS_4(d, i + 32), SUMS_4(d, i + 36)
// An instruction for 64 rows, so many columns, factors of a dtype, and operands; the last one says whether it adds.
#define PRODUCT(columns, dtype, operands, adds)                                                    \
  "{\n.reg .pred adds;\nsetp.ne.b32 adds, " adds ", 0;\nwgmma.mma_async.sync.aligned.m64n" columns \
  "k16.f32." dtype "." dtype " " operands ";\n}"

// d = a b, or d += a b: a warp has 16 of the 64 rows, in the fragments of base/matrix.cuh, as many of d as there are
// octets of columns; the lines have the columns of b as rows.
__device__ inline void multiply(float (&d)[40], const u32 (&a)[4], u64 lines, bool adds) {
  asm volatile(
      PRODUCT("80", "bf16", "{" NUMBERS_40 "}, {%40, %41, %42, %43}, %44, adds, 1, 1, 0", "%45")
      : SUMS_40(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(lines), "r"(int(adds)));
}
__device__ inline void multiply(float (&d)[72], const u32 (&a)[4], u64 lines, bool adds) {
  asm volatile(
      PRODUCT("144", "bf16", "{" NUMBERS_70 ", %70, %71}, {%72, %73, %74, %75}, %76, adds, 1, 1, 0",
              "%77")
      : SUMS_32(d, 0), SUMS_40(d, 32)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(lines), "r"(int(adds)));
}
// The product of a warpgroup in float16.
__device__ inline void multiply_half(float (&d)[32], const u32 (&a)[4], u64 lines, bool adds) {
  asm volatile(PRODUCT("64", "f16",
                       "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, " TEN("1") ", " TEN(
                           "2") ", %30, %31}, "
                                "{%32, %33, %34, %35}, %36, adds, 1, 1, 0",
                       "%37")
               : SUMS_32(d, 0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(lines), "r"(int(adds)));
}
// Products of bfloat16 with transposed lines of a.
__device__ inline void multiply(float (&d)[72], u64 transposed, u64 lines, bool adds) {
  asm volatile(
      PRODUCT("144", "bf16", "{" NUMBERS_70 ", %70, %71}, %72, %73, adds, 1, 1, 1, 0", "%74")
      : SUMS_32(d, 0), SUMS_40(d, 32)
      : "l"(transposed), "l"(lines), "r"(int(adds)));
}
__device__ inline void multiply(float (&d)[80], u64 transposed, u64 lines, bool adds) {
  asm volatile(
      PRODUCT("160", "bf16", "{" NUMBERS_70 ", " TEN("7") "}, %80, %81, adds, 1, 1, 1, 0", "%82")
      : SUMS_40(d, 0), SUMS_40(d, 40)
      : "l"(transposed), "l"(lines), "r"(int(adds)));
}

#undef TEN
#undef NUMBERS_40
#undef NUMBERS_70
#undef SUMS_4
#undef SUMS_32
#undef SUMS_40
#undef PRODUCT

// ---- shared memory ---------------------------------------------------------------------------------

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
__device__ inline void write_matrices(u32 at, const u32 (&m)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(at), "r"(m[0]),
               "r"(m[1])
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

// ---- barriers --------------------------------------------------------------------------------------

// Until so many threads are here, whole warps, with the same number of a barrier from 1 to 15.
template <int COUNT>
__device__ inline void sync_threads(int number) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(COUNT) : "memory");
}
__device__ inline void sync_threads(int number, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(count) : "memory");
}

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
// A wait for what other blocks of the cluster have written.
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

// ---- clusters --------------------------------------------------------------------------------------

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
// A place of this block's shared memory in that of block `rank`.
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
// An arrival at a barrier of another block, by an address from `in_block`, which says that this thread has read its shared
// memory. What it wrote may not be there for the other block: a release at the scope of the cluster waits for all stores
// before, which cost a quarter of the time of the warps that multiply (warpgroups.cu).
__device__ inline void arrive_in_block(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// A send of 8 bytes.
__device__ inline void send(u32 at, float2 v, u32 barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
          at),
      "f"(v.x), "f"(v.y), "r"(barrier)
      : "memory");
}
// A send of 4 bytes.
__device__ inline void send(u32 at, float v, u32 barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(at), "f"(v),
      "r"(barrier)
      : "memory");
}

// ---- copies that nobody waits for at once --------------------------------------------------------

// 16 bytes, both addresses multiples of 16: `bytes` of them from there, and zeros.
__device__ inline void copy_async(void* to, const void* from, int bytes = 16) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(u32(__cvta_generic_to_shared(to))),
      "l"(from), "r"(bytes)
      : "memory");
}

// 4 bytes.
__device__ inline void copy_word_async(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(u32(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
}

// The end of a group: the thread's copies since the last one.
__device__ inline void commit_async() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all of the thread's groups have come but the last PENDING.
template <int PENDING>
__device__ inline void wait_for_async() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---- the copy engine -------------------------------------------------------------------------------

// A copy engine's map of a tensor (CUtensorMap), by value as a kernel's argument.
struct alignas(64) TensorMap {
  u64 words[16];
};

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
// A copy to both blocks of a cluster of two, to one place and for one barrier in each.
__device__ inline void copy_to_both(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "h"(u16(3))
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
// Bytes in a row to the L2 cache, in multiples of 16.
__device__ inline void prefetch(const void* from, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
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

// 16 bytes to shared memory, or zeros where there are none. `arrive_behind_copies`: what the lane has copied so is there.
__device__ inline void copy_part(u32 to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(exists ? 16 : 0)
               : "memory");
}
__device__ inline void arrive_behind_copies(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

// ---- the place of a thread, asked for again --------------------------------------------------------

// Special registers of a thread that these read every time: what is computed from them need not be kept in registers of
// the kernel meanwhile, of which it has too few.
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

// ---- global memory and registers -------------------------------------------------------------------

// w of neighbours. It stays in the L1 cache, so that it need not be kept in registers: hence volatile.
__device__ inline float2 load_pair(const float* from) {
  float2 v;
  asm volatile("ld.global.nc.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(from));
  return v;
}
__device__ inline float load_single(const float* from) {
  float v;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(from));
  return v;
}
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
// Makes the compiler keep a number that it would compute anew for every tile.
__device__ inline void keep(u32& number) { asm volatile("" : "+r"(number)); }
__device__ inline void keep(float& number) { asm volatile("" : "+f"(number)); }
// Makes the compiler have the values here.
__device__ inline void pin(float a, float b, float c, float d) {
  asm volatile("" ::"f"(a), "f"(b), "f"(c), "f"(d));
}
