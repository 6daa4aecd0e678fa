// XLA's side of a call, as much of it as a handler for CPUs needs.

#include "frame.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "xla/ffi/api/c_api.h"

// XLA's own are opaque, too.
struct XLA_FFI_Error {
  XLA_FFI_Error_Code code;
  std::string message;
};

struct XLA_FFI_ExecutionContext {
  const FramePool* pool;
};

namespace {

XLA_FFI_Error* CreateError(XLA_FFI_Error_Create_Args* args) {
  return new XLA_FFI_Error{args->errc, args->message};
}

void GetMessage(XLA_FFI_Error_GetMessage_Args* args) {
  args->message = args->error->message.c_str();
}

void DestroyError(XLA_FFI_Error_Destroy_Args* args) { delete args->error; }

XLA_FFI_Error* Schedule(XLA_FFI_ThreadPool_Schedule_Args* args) {
  const FramePool& pool = *args->ctx->pool;
  if (pool.schedule == nullptr) {
    args->task(args->data);
  } else {
    pool.schedule(pool.context, args->task, args->data);
  }
  return nullptr;
}

XLA_FFI_Error* NumThreads(XLA_FFI_ThreadPool_NumThreads_Args* args) {
  *args->num_threads = args->ctx->pool->num_threads;
  return nullptr;
}

// Whatever else a handler asks of XLA is null: a call of it would show at once.
XLA_FFI_Api MakeApi() {
  XLA_FFI_Api api = {};
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  api.api_version.struct_size = XLA_FFI_Api_Version_STRUCT_SIZE;
  api.api_version.major_version = XLA_FFI_API_MAJOR;
  api.api_version.minor_version = XLA_FFI_API_MINOR;
  api.XLA_FFI_Error_Create = CreateError;
  api.XLA_FFI_Error_GetMessage = GetMessage;
  api.XLA_FFI_Error_Destroy = DestroyError;
  api.XLA_FFI_ThreadPool_Schedule = Schedule;
  api.XLA_FFI_ThreadPool_NumThreads = NumThreads;
  return api;
}

// Operands or results as XLA lays them out: an array of kinds, an array of pointers.
template <typename Kind>
struct Buffers {
  std::vector<XLA_FFI_Buffer> buffers;
  std::vector<void*> pointers;
  std::vector<Kind> kinds;

  void Fill(const FrameBuffer* from, std::size_t num) {
    buffers.resize(num);
    pointers.resize(num);
    kinds.resize(num);
    for (std::size_t i = 0; i < num; ++i) {
      buffers[i] = {XLA_FFI_Buffer_STRUCT_SIZE,
                    nullptr,
                    static_cast<XLA_FFI_DataType>(from[i].dtype),
                    from[i].data,
                    from[i].rank,
                    const_cast<std::int64_t*>(from[i].dims)};
      pointers[i] = &buffers[i];
      kinds[i] = static_cast<Kind>(from[i].kind);
    }
  }
};

struct Attributes {
  // What an attribute points to; the kind says which of them.
  struct Value {
    XLA_FFI_Scalar scalar;
    XLA_FFI_ByteSpan text;
    XLA_FFI_Array array;
    XLA_FFI_Attrs dictionary;
  };
  std::vector<Value> values;
  std::vector<XLA_FFI_ByteSpan> names;
  std::vector<XLA_FFI_ByteSpan*> name_pointers;
  std::vector<XLA_FFI_AttrType> kinds;
  std::vector<void*> pointers;

  void Fill(const FrameAttribute* from, std::size_t num) {
    values.resize(num);
    names.resize(num);
    name_pointers.resize(num);
    kinds.resize(num);
    pointers.resize(num);
    for (std::size_t i = 0; i < num; ++i) {
      const auto dtype = static_cast<XLA_FFI_DataType>(from[i].dtype);
      void* const data = const_cast<void*>(from[i].value);
      Value& value = values[i];
      names[i] = {from[i].name, from[i].name_size};
      name_pointers[i] = &names[i];
      kinds[i] = static_cast<XLA_FFI_AttrType>(from[i].kind);
      switch (kinds[i]) {
        case XLA_FFI_AttrType_STRING:
          value.text = {static_cast<const char*>(data), from[i].size};
          pointers[i] = &value.text;
          break;
        case XLA_FFI_AttrType_ARRAY:
          value.array = {dtype, from[i].size, data};
          pointers[i] = &value.array;
          break;
        case XLA_FFI_AttrType_DICTIONARY:
          value.dictionary = {};
          value.dictionary.struct_size = XLA_FFI_Attrs_STRUCT_SIZE;
          pointers[i] = &value.dictionary;
          break;
        default: value.scalar = {dtype, data}; pointers[i] = &value.scalar;
      }
    }
  }
};

}  // namespace

std::int32_t jax_mhc_call_frame(const FrameCall* call) {
  static const XLA_FFI_Api api = MakeApi();
  // Kept from call to call: millions of calls need no new memory.
  thread_local Buffers<XLA_FFI_ArgType> args;
  thread_local Buffers<XLA_FFI_RetType> rets;
  thread_local Attributes attributes;
  args.Fill(call->args, call->num_args);
  rets.Fill(call->rets, call->num_rets);
  attributes.Fill(call->attributes, call->num_attributes);

  XLA_FFI_ExecutionContext context = {call->pool};
  XLA_FFI_CallFrame frame = {};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = &api;
  frame.ctx = &context;
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args.struct_size = XLA_FFI_Args_STRUCT_SIZE;
  frame.args.size = static_cast<std::int64_t>(call->num_args);
  frame.args.types = args.kinds.data();
  frame.args.args = args.pointers.data();
  frame.rets.struct_size = XLA_FFI_Rets_STRUCT_SIZE;
  frame.rets.size = static_cast<std::int64_t>(call->num_rets);
  frame.rets.types = rets.kinds.data();
  frame.rets.rets = rets.pointers.data();
  frame.attrs.struct_size = XLA_FFI_Attrs_STRUCT_SIZE;
  frame.attrs.size = static_cast<std::int64_t>(call->num_attributes);
  frame.attrs.types = attributes.kinds.data();
  frame.attrs.names = attributes.name_pointers.data();
  frame.attrs.attrs = attributes.pointers.data();

  XLA_FFI_Error* const error = reinterpret_cast<XLA_FFI_Handler*>(call->handler)(&frame);
  if (error == nullptr) return 0;
  const std::int32_t code = error->code;
  if (call->message_size > 0) {
    const std::size_t size = std::min(error->message.size(), call->message_size - 1);
    std::memcpy(call->message, error->message.data(), size);
    call->message[size] = '\0';
  }
  delete error;
  return code;
}
