// Copies from global to shared memory that nobody waits for at once (cp.async).

#pragma once

#include "base/common.cuh"

// Until all of the thread's groups have come but the last `pending`, up to 4, a number that is known at run time.
__device__ inline void wait_for_async(int pending) {
  switch (pending) {
    case 0: return wait_for_async<0>();
    case 1: return wait_for_async<1>();
    case 2: return wait_for_async<2>();
    case 3: return wait_for_async<3>();
    default: return wait_for_async<4>();
  }
}
