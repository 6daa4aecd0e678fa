// Copies from global to shared memory that nobody waits for at once (cp.async).

#pragma once

#include "base/common.cuh"

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
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all of the thread's groups have come but the last PENDING.
template <int PENDING>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// The same for a number that is known at run time, up to 4.
__device__ inline void wait_for_copies(int pending) {
  switch (pending) {
    case 0: return wait_for_copies<0>();
    case 1: return wait_for_copies<1>();
    case 2: return wait_for_copies<2>();
    case 3: return wait_for_copies<3>();
    default: return wait_for_copies<4>();
  }
}
