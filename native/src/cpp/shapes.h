// Checks at the boundary: what XLA hands over must have the shapes that the kernels will read.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace mam {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using FloatsOut = ffi::Result<Floats>;

using Shape = std::vector<int64_t>;

inline std::string to_string(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// vmap's axes: all before the last `own` ones.
struct Lead {
  Shape axes;
  int64_t groups = 1;  // how many elements they have

  template <class Dimensions>
  Lead(const Dimensions& dims, size_t own) : axes(dims.begin(), dims.end() - own) {
    for (const int64_t size : axes) groups *= size;
  }

  Shape with(const Shape& own) const {
    Shape all = axes;
    all.insert(all.end(), own.begin(), own.end());
    return all;
  }
};

// Remembers the first thing that is wrong.
class Checks {
 public:
  explicit Checks(const char* kernel) : kernel_(kernel) {}

  void demand(bool holds, const std::string& what) {
    if (!holds && message_.empty()) message_ = std::string("mam_native ") + kernel_ + ": " + what;
  }

  // The buffer's data, if its shape is this one.
  template <class Buffer>
  auto data(const char* name, Buffer&& buffer, const Shape& shape) {
    const auto dims = buffer.dimensions();
    const Shape given(dims.begin(), dims.end());
    demand(given == shape, std::string(name) + " must have shape " + to_string(shape) + ", got " + to_string(given));
    return buffer.typed_data();
  }

  // Null for a buffer without elements, which stands for none.
  template <class Buffer>
  auto optional(const char* name, Buffer&& buffer, const Shape& shape) {
    return buffer.element_count() ? data(name, buffer, shape) : nullptr;
  }

  // Rows, or sequences, are cut into at least one block if there are any.
  void demand_blocks(int64_t blocks, int64_t rows) {
    demand(blocks > 0 || (blocks == 0 && rows == 0), "no such blocks");
  }

  bool passed() const { return message_.empty(); }
  ffi::Error error() const { return ffi::Error::InvalidArgument(message_); }

 private:
  const char* kernel_;
  std::string message_;
};

}  // namespace mam
