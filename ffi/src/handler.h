// A call from XLA, in the terms that cxx can hand to Rust.

#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "jax-mhc-ffi/src/frame.h"
#include "rust/cxx.h"
#include "xla/ffi/api/ffi.h"

namespace jax_mhc {

enum class Entry : std::uint8_t;
struct Buffer;
struct Task;

// The decoded call frame. Everything it hands out belongs to XLA and lives until the handler
// returns. Methods that can fail throw, and cxx turns that into a Rust `Err`.
class Frame {
 public:
  Frame(xla::ffi::RemainingArgs args, xla::ffi::RemainingRets rets, xla::ffi::Dictionary attributes,
        xla::ffi::ThreadPool pool)
      : args_(args), rets_(rets), attributes_(attributes), pool_(pool) {}
  Frame(xla::ffi::RemainingArgs args, xla::ffi::RemainingRets rets, xla::ffi::Dictionary attributes,
        void* stream)
      : args_(args), rets_(rets), attributes_(attributes), stream_(stream) {}

  std::size_t num_args() const { return args_.size(); }
  std::size_t num_rets() const { return rets_.size(); }
  std::size_t num_attributes() const { return attributes_.size(); }

  Buffer arg(std::size_t index) const;
  Buffer ret(std::size_t index) const;

  rust::Str string_attribute(rust::Str name) const;
  std::int64_t int64_attribute(rust::Str name) const;
  double float64_attribute(rust::Str name) const;

  // On a CPU; 0 where XLA offers no threads.
  std::int64_t num_threads() const { return pool_ ? pool_->num_threads() : 0; }
  void schedule(rust::Box<Task> task) const;

  // The address of the stream that the work goes to, on a GPU.
  std::size_t stream() const { return reinterpret_cast<std::size_t>(stream_); }

 private:
  RawAttribute attribute(rust::Str name, const char* expected) const;

  xla::ffi::RemainingArgs args_;
  xla::ffi::RemainingRets rets_;
  xla::ffi::Dictionary attributes_;
  std::optional<xla::ffi::ThreadPool> pool_;
  void* stream_ = nullptr;
};

// The address of the handler of the call with this index; throws where there are fewer handlers.
std::size_t handler_address(Entry entry, std::size_t call);

// The address of the handler of calls that are no more, on every platform.
std::size_t retired_handler_address();

// The version of the FFI that the handlers are compiled against.
constexpr std::int32_t api_major() { return XLA_FFI_API_MAJOR; }
constexpr std::int32_t api_minor() { return XLA_FFI_API_MINOR; }

}  // namespace jax_mhc
