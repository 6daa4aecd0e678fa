// A call of a handler in plain structs, which Rust and Python can fill.

#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

// An operand or a result. `kind` is an XLA_FFI_ArgType (or RetType), `dtype` an XLA_FFI_DataType; both
// may hold numbers that no version of XLA knows.
struct FrameBuffer {
  std::int32_t kind;
  std::int32_t dtype;
  std::int64_t rank;
  const std::int64_t* dims;
  void* data;
};

// `kind` is an XLA_FFI_AttrType. `value` points to a scalar of `dtype`, to `size` characters of a
// string or to `size` elements of an array; a dictionary is empty.
struct FrameAttribute {
  const char* name;
  std::size_t name_size;
  std::int32_t kind;
  std::int32_t dtype;
  const void* value;
  std::size_t size;
};

using FrameTask = void(void* data);

// The threads that XLA lends. Without `schedule` a task runs where it is scheduled.
struct FramePool {
  std::int64_t num_threads;
  void (*schedule)(void* context, FrameTask* task, void* data);
  void* context;
};

struct FrameCall {
  std::size_t handler;
  const FrameBuffer* args;
  std::size_t num_args;
  const FrameBuffer* rets;
  std::size_t num_rets;
  const FrameAttribute* attributes;
  std::size_t num_attributes;
  const FramePool* pool;
  // Room for what the handler says where it refuses; cut to fit, with a final zero.
  char* message;
  std::size_t message_size;
};

// Calls the handler: 0, or the XLA_FFI_Error_Code of its error.
std::int32_t jax_mhc_call_frame(const FrameCall* call);
}
