#include "jax-mhc-ffi/src/handler.h"

#include <array>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include "jax-mhc-ffi/src/lib.rs.h"

namespace jax_mhc {
namespace {

namespace ffi = xla::ffi;

DType Supported(XLA_FFI_DataType dtype) {
  switch (dtype) {
    case XLA_FFI_DataType_F32: return DType::F32;
    case XLA_FFI_DataType_F64: return DType::F64;
    case XLA_FFI_DataType_BF16: return DType::Bf16;
    case XLA_FFI_DataType_F16: return DType::F16;
    default: throw Unexpected("F32, F64, BF16 or F16", Name(dtype));
  }
}

Buffer View(const XLA_FFI_Buffer& buffer) {
  if (buffer.rank < 0) throw Unexpected("a rank of 0 or more", std::to_string(buffer.rank));
  const rust::Slice<const std::int64_t> dims(buffer.dims, static_cast<std::size_t>(buffer.rank));
  return Buffer{static_cast<std::uint8_t*>(buffer.data), dims, Supported(buffer.dtype)};
}

// Throws what XLA says where `value` holds an error.
template <typename T>
T Unwrap(const ffi::ErrorOr<T>& value) {
  if (value.has_error()) throw std::invalid_argument(value.error().message());
  return *value;
}

// The body of every handler. `Context` is the pool or the stream that XLA lends.
template <typename Context>
struct Handler {
  Entry entry;
  std::size_t call;

  ffi::Error operator()(ffi::RemainingArgs args, ffi::RemainingRets rets,
                        ffi::Dictionary attributes, Context context) const try {
    const Outcome outcome = run_call(entry, call, Frame(args, rets, attributes, context));
    switch (outcome.code) {
      case Code::Ok: return ffi::Error::Success();
      case Code::InvalidArgument: return ffi::Error::InvalidArgument(std::string(outcome.message));
      case Code::ResourceExhausted:
        return ffi::Error(ffi::ErrorCode::kResourceExhausted, std::string(outcome.message));
      default: return ffi::Error::Internal(std::string(outcome.message));
    }
  } catch (const std::bad_alloc& error) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, error.what());
  } catch (const std::exception& error) {
    return ffi::Error::Internal(error.what());
  }
};

// XLA knows a handler by its address alone, so every call needs a function of its own.
template <Entry kEntry, std::size_t kOp>
XLA_FFI_Error* Handle(XLA_FFI_CallFrame* frame) {
  // As frame.h says: XLA's `Call` prints a stage that it does not expect. (With an extension a frame is a
  // question about the handler, in no stage.)
  const int stage = static_cast<int>(frame->stage);
  const bool is_known =
      XLA_FFI_ExecutionStage_INSTANTIATE <= stage && stage <= XLA_FFI_ExecutionStage_EXECUTE;
  if (frame->extension_start == nullptr && !is_known) {
    const std::string message = "expected a known stage, got " + std::to_string(stage);
    return ffi::internal::CreateError(frame->api, ffi::Error::InvalidArgument(message));
  }
  if constexpr (kEntry == Entry::Cpu) {
    static const auto handler =
        ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs().Ctx<ffi::ThreadPool>().To(
            Handler<ffi::ThreadPool>{kEntry, kOp});
    return handler->Call(frame);
  } else {
    constexpr auto kStage = kEntry == Entry::CudaInitialize ? ffi::ExecutionStage::kInitialize
                                                            : ffi::ExecutionStage::kExecute;
    // Launches alone, on memory that XLA owns: XLA may record them into a CUDA graph.
    static const auto handler =
        ffi::Ffi::Bind<kStage>()
            .RemainingArgs()
            .RemainingRets()
            .Attrs()
            .template Ctx<ffi::PlatformStream<void*>>()
            .To(Handler<void*>{kEntry, kOp}, {ffi::Traits::kCmdBufferCompatible});
    return handler->Call(frame);
  }
}

// The handler of names that are no more: an error, whatever the frame holds.
XLA_FFI_Error* HandleRetired(XLA_FFI_CallFrame* frame) {
  static const auto handler = ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs().To(
      [](ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary) {
        return ffi::Error::InvalidArgument(std::string(retired_message()));
      });
  return handler->Call(frame);
}

// More than there are calls, so that the list of calls stays in Rust alone.
constexpr std::size_t kNumHandlers = 32;

template <Entry kEntry, std::size_t... kCalls>
std::size_t Address(std::size_t call, std::index_sequence<kCalls...>) {
  static constexpr std::array<XLA_FFI_Handler*, sizeof...(kCalls)> kHandlers = {
      Handle<kEntry, kCalls>...};
  return reinterpret_cast<std::size_t>(kHandlers.at(call));
}

}  // namespace

Buffer Frame::arg(std::size_t index) const {
  return View(AsBuffer(Unwrap(args_.get<RawArg>(index)), XLA_FFI_ArgType_BUFFER));
}

Buffer Frame::ret(std::size_t index) const {
  return View(AsBuffer(*Unwrap(rets_.get<RawRet>(index)), XLA_FFI_RetType_BUFFER));
}

RawAttribute Frame::attribute(rust::Str name, const char* expected) const {
  const auto value = attributes_.get<RawAttribute>(std::string_view(name.data(), name.size()));
  if (!value.has_value()) throw Unexpected(expected, "none");
  return *value;
}

rust::Str Frame::string_attribute(rust::Str name) const {
  const std::string_view text = AsString(attribute(name, "a string"));
  try {
    return rust::Str(text.data(), text.size());
  } catch (const std::invalid_argument&) {
    throw Unexpected("a string of UTF-8", "bytes that are none");
  }
}

std::int64_t Frame::int64_attribute(rust::Str name) const {
  return AsScalar<std::int64_t, XLA_FFI_DataType_S64>(attribute(name, "S64"));
}

double Frame::float64_attribute(rust::Str name) const {
  return AsScalar<double, XLA_FFI_DataType_F64>(attribute(name, "F64"));
}

void Frame::schedule(rust::Box<Task> task) const {
  // The scheduled closure holds the task and nothing of this call, so it may run after the call.
  // The copy is for `Schedule`, which is not const.
  if (!pool_) throw std::logic_error("XLA lends no threads on a GPU");
  ffi::ThreadPool(*pool_).Schedule(
      [task = std::move(task)]() mutable { run_task(std::move(task)); });
}

std::size_t retired_handler_address() { return reinterpret_cast<std::size_t>(&HandleRetired); }

std::size_t handler_address(Entry entry, std::size_t call) {
  constexpr auto kCalls = std::make_index_sequence<kNumHandlers>();
  switch (entry) {
    case Entry::Cpu: return Address<Entry::Cpu>(call, kCalls);
    case Entry::CudaInitialize: return Address<Entry::CudaInitialize>(call, kCalls);
    default: return Address<Entry::CudaExecute>(call, kCalls);
  }
}

}  // namespace jax_mhc
