#include "jax-mhc-ffi/src/handler.h"

#include <array>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include "jax-mhc-ffi/src/lib.rs.h"

namespace jax_mhc {
namespace {

namespace ffi = xla::ffi;

std::string Name(ffi::DataType dtype) {
  // XLA's own operator<< is undefined for the types that later versions add.
  if (dtype > ffi::DataType::F8E8M0FNU) {
    return "type " + std::to_string(static_cast<int>(dtype));
  }
  std::ostringstream name;
  name << dtype;
  return name.str();
}

DType Supported(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::F32:
      return DType::F32;
    case ffi::DataType::F64:
      return DType::F64;
    case ffi::DataType::BF16:
      return DType::Bf16;
    case ffi::DataType::F16:
      return DType::F16;
    default:
      throw std::invalid_argument("expected F32, F64, BF16 or F16, got " + Name(dtype));
  }
}

Buffer View(const ffi::AnyBuffer& buffer) {
  const ffi::AnyBuffer::Dimensions dims = buffer.dimensions();
  return Buffer{static_cast<std::uint8_t*>(buffer.untyped_data()),
                rust::Slice<const std::int64_t>(dims.begin(), dims.size()),
                Supported(buffer.element_type())};
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
  std::size_t op;

  ffi::Error operator()(ffi::RemainingArgs args, ffi::RemainingRets rets,
                        ffi::Dictionary attributes, Context context) const try {
    const Outcome outcome = run_call(entry, op, Call(args, rets, attributes, context));
    switch (outcome.code) {
      case Code::Ok:
        return ffi::Error::Success();
      case Code::InvalidArgument:
        return ffi::Error::InvalidArgument(std::string(outcome.message));
      default:
        return ffi::Error::Internal(std::string(outcome.message));
    }
  } catch (const std::exception& error) {
    return ffi::Error::Internal(error.what());
  }
};

// XLA knows a handler by its address alone, so every op needs a function of its own.
template <Entry kEntry, std::size_t kOp>
XLA_FFI_Error* Handle(XLA_FFI_CallFrame* frame) {
  if constexpr (kEntry == Entry::Cpu) {
    static const auto handler = ffi::Ffi::Bind()
                                    .RemainingArgs()
                                    .RemainingRets()
                                    .Attrs()
                                    .Ctx<ffi::ThreadPool>()
                                    .To(Handler<ffi::ThreadPool>{kEntry, kOp});
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

// More than there are ops, so that the list of ops stays in Rust alone.
constexpr std::size_t kNumHandlers = 32;

template <Entry kEntry, std::size_t... kOps>
std::size_t Address(std::size_t op, std::index_sequence<kOps...>) {
  static constexpr std::array<XLA_FFI_Handler*, sizeof...(kOps)> kHandlers = {
      Handle<kEntry, kOps>...};
  return reinterpret_cast<std::size_t>(kHandlers.at(op));
}

}  // namespace

Buffer Call::arg(std::size_t index) const { return View(Unwrap(args_.get<ffi::AnyBuffer>(index))); }

Buffer Call::ret(std::size_t index) const {
  return View(*Unwrap(rets_.get<ffi::AnyBuffer>(index)));
}

template <typename T>
T Call::attribute(rust::Str name, const char* expected) const {
  const std::string_view key(name.data(), name.size());
  const ffi::ErrorOr<T> value = attributes_.get<T>(key);
  if (value.has_value()) return *value;
  throw std::invalid_argument(std::string("expected ") + expected + ", got " +
                              (attributes_.contains(key) ? "another type" : "none"));
}

rust::Str Call::string_attribute(rust::Str name) const {
  const auto text = attribute<std::string_view>(name, "a string");
  return rust::Str(text.data(), text.size());
}

std::int64_t Call::int64_attribute(rust::Str name) const {
  return attribute<std::int64_t>(name, "an int64");
}

double Call::float64_attribute(rust::Str name) const {
  return attribute<double>(name, "a float64");
}

void Call::schedule(rust::Box<Task> task) const {
  // The scheduled closure holds the task and nothing of this call, so it may run after the call.
  // The copy is for `Schedule`, which is not const.
  if (!pool_) throw std::logic_error("XLA lends no threads on a GPU");
  ffi::ThreadPool(*pool_).Schedule(
      [task = std::move(task)]() mutable { run_task(std::move(task)); });
}

std::size_t handler_address(Entry entry, std::size_t op) {
  constexpr auto kOps = std::make_index_sequence<kNumHandlers>();
  switch (entry) {
    case Entry::Cpu:
      return Address<Entry::Cpu>(op, kOps);
    case Entry::CudaInitialize:
      return Address<Entry::CudaInitialize>(op, kOps);
    default:
      return Address<Entry::CudaExecute>(op, kOps);
  }
}

}  // namespace jax_mhc
