// The values of a call frame as they lie there: a code that says what each is, and an address.
//
// XLA's own decoding prints the code of a type that it did not expect, by an operator<< that is undefined
// for codes without a name: those of a newer XLA, and whatever a broken program holds. So nothing is
// decoded by XLA; what a value is, is looked at here.

#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

#include "xla/ffi/api/ffi.h"

namespace jax_mhc {

// An operand.
struct RawArg {
  XLA_FFI_ArgType type;
  void* value;
};

// A result.
struct RawRet {
  XLA_FFI_RetType type;
  void* value;
};

// An attribute.
struct RawAttribute {
  XLA_FFI_AttrType type;
  void* value;
};

// What an error says that was expected, and what there is.
inline std::invalid_argument Unexpected(const std::string& expected, const std::string& got) {
  return std::invalid_argument("expected " + expected + ", got " + got);
}

// The name of a scalar type, or its code where it has none.
inline std::string Name(XLA_FFI_DataType dtype) {
  const int code = static_cast<int>(dtype);
  // Between them lie the codes of XLA's tuple and opaque, which the FFI leaves out.
  const bool has_name = (XLA_FFI_DataType_INVALID <= code && code <= XLA_FFI_DataType_F64) ||
                        (XLA_FFI_DataType_C64 <= code && code <= XLA_FFI_DataType_F8E8M0FNU);
  if (!has_name) return "type " + std::to_string(code);
  std::ostringstream name;
  name << dtype;
  return name.str();
}

// What an attribute is, in words.
inline std::string Name(const RawAttribute& attribute) {
  switch (static_cast<int>(attribute.type)) {
    case XLA_FFI_AttrType_ARRAY:
      return "an array of " + Name(static_cast<const XLA_FFI_Array*>(attribute.value)->dtype);
    case XLA_FFI_AttrType_DICTIONARY: return "a dictionary";
    case XLA_FFI_AttrType_SCALAR:
      return Name(static_cast<const XLA_FFI_Scalar*>(attribute.value)->dtype);
    case XLA_FFI_AttrType_STRING: return "a string";
    default: return "an attribute of kind " + std::to_string(static_cast<int>(attribute.type));
  }
}

// A buffer of a call; `Raw` is RawArg or RawRet.
template <typename Raw>
const XLA_FFI_Buffer& AsBuffer(const Raw& raw, int buffer_type) {
  const int type = static_cast<int>(raw.type);
  if (type != buffer_type) throw Unexpected("a buffer", "a value of kind " + std::to_string(type));
  return *static_cast<const XLA_FFI_Buffer*>(raw.value);
}

inline std::string_view AsString(const RawAttribute& attribute) {
  if (attribute.type != XLA_FFI_AttrType_STRING) throw Unexpected("a string", Name(attribute));
  const auto* span = static_cast<const XLA_FFI_ByteSpan*>(attribute.value);
  return {span->ptr, span->len};
}

// A number of type `T`, whose code is `dtype`.
template <typename T, XLA_FFI_DataType dtype>
T AsScalar(const RawAttribute& attribute) {
  const auto* scalar = static_cast<const XLA_FFI_Scalar*>(attribute.value);
  if (attribute.type != XLA_FFI_AttrType_SCALAR || scalar->dtype != dtype) {
    throw Unexpected(Name(dtype), Name(attribute));
  }
  return *static_cast<const T*>(scalar->value);
}

}  // namespace jax_mhc

// Where XLA lets a program decode types of its own.
namespace xla::ffi {

template <>
struct ArgDecoding<jax_mhc::RawArg> {
  static std::optional<jax_mhc::RawArg> Decode(XLA_FFI_ArgType type, void* arg, DiagnosticEngine&) {
    return jax_mhc::RawArg{type, arg};
  }
};

template <>
struct RetDecoding<jax_mhc::RawRet> {
  static std::optional<Result<jax_mhc::RawRet>> Decode(XLA_FFI_RetType type, void* ret,
                                                       DiagnosticEngine&) {
    return Result<jax_mhc::RawRet>(jax_mhc::RawRet{type, ret});
  }
};

template <>
struct AttrDecoding<jax_mhc::RawAttribute> {
  using Type = jax_mhc::RawAttribute;
  static std::optional<Type> Decode(XLA_FFI_AttrType type, void* attr, DiagnosticEngine&) {
    return Type{type, attr};
  }
};

}  // namespace xla::ffi
