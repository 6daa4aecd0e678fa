// Types of numbers.

#pragma once

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

constexpr u32 kAllLanes = 0xffffffff;
