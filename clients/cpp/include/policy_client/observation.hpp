/// What a robot tells the policy: inputs by name, and settings by name.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <memory>
#include <msgpack.hpp>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "numbers go over the wire as they lie in memory, which must be little-endian"
#endif

namespace policy {

namespace wire {

/// Where msgpack writes to.
struct Bytes {
  std::string text;
  void write(const char* data, std::size_t size) { text.append(data, size); }
};

using Packer = msgpack::packer<Bytes>;

/// Bytes that are written once and shared from then on, so that images are copied only when an observation is made.
using Piece = std::shared_ptr<const std::string>;

/// Raises std::length_error if `size` is more than msgpack can say.
inline std::uint32_t length(std::size_t size) {
  if (size > std::numeric_limits<std::uint32_t>::max()) throw std::length_error("an input is 4 GiB or more");
  return static_cast<std::uint32_t>(size);
}

inline void pack_text(Packer& packer, const std::string& text) {
  packer.pack_str(length(text.size()));
  packer.pack_str_body(text.data(), length(text.size()));
}

inline void pack_bytes(Packer& packer, const void* data, std::size_t size) {
  packer.pack_bin(length(size));
  packer.pack_bin_body(static_cast<const char*>(data), length(size));
}

inline void pack_array(Packer& packer, const void* data, std::size_t item_bytes, const char* dtype,
                       std::initializer_list<std::size_t> shape) {
  std::size_t size = item_bytes;
  for (const std::size_t length : shape) size *= length;
  packer.pack_map(4);
  pack_bytes(packer, "__ndarray__", 11);
  packer.pack_true();
  pack_bytes(packer, "data", 4);
  pack_bytes(packer, data, size);
  pack_bytes(packer, "dtype", 5);
  pack_text(packer, dtype);
  pack_bytes(packer, "shape", 5);
  packer.pack_array(static_cast<std::uint32_t>(shape.size()));
  for (const std::size_t length : shape) packer.pack_uint64(length);
}

}  // namespace wire

/// Named settings: sampling options, or the keys of a continuity mode. The server says which it knows.
class Settings {
 public:
  using Value = std::variant<bool, std::int64_t, double, std::string>;

  /// Add a boolean, an integer, a floating-point number or a text: `Settings().with("steps", 5).with("seed", 4711)`.
  template <typename T>
  Settings& with(std::string name, const T& value) {
    if constexpr (std::is_same_v<T, bool>) {
      values_.emplace_back(std::move(name), Value(std::in_place_type<bool>, value));
    } else if constexpr (std::is_integral_v<T>) {
      values_.emplace_back(std::move(name), Value(std::in_place_type<std::int64_t>, value));
    } else if constexpr (std::is_floating_point_v<T>) {
      values_.emplace_back(std::move(name), Value(std::in_place_type<double>, value));
    } else {
      values_.emplace_back(std::move(name), Value(std::in_place_type<std::string>, value));
    }
    return *this;
  }

  bool empty() const { return values_.empty(); }
  const std::vector<std::pair<std::string, Value>>& values() const { return values_; }

 private:
  std::vector<std::pair<std::string, Value>> values_;
};

/// The policy's inputs by name; `GET /v1/policies/NAME` lists which it wants, with shapes and units.
///
/// Copies are cheap: they share the bytes. An input that is given again replaces the one of that name, so a loop may
/// keep one observation and change its state alone. Not for several threads. An input of 4 GiB raises
/// std::length_error.
class Observation {
 public:
  struct Input {
    std::string name;
    wire::Piece bytes;  // name and value, as they go over the wire
  };

  /// A vector of numbers, (S,): `vector("state", {0.1, 0.2})`.
  Observation& vector(const std::string& name, std::initializer_list<double> values) {
    return numbers(name, values.begin(), {values.size()});
  }
  Observation& vector(const std::string& name, const std::vector<float>& values) {
    return numbers(name, values.data(), {values.size()});
  }
  Observation& vector(const std::string& name, const std::vector<double>& values) {
    return numbers(name, values.data(), {values.size()});
  }
  Observation& vector(const std::string& name, const float* values, std::size_t size) {
    return numbers(name, values, {size});
  }
  Observation& vector(const std::string& name, const double* values, std::size_t size) {
    return numbers(name, values, {size});
  }

  /// A run of vectors, (G, S) in C order: a goal of several states.
  Observation& matrix(const std::string& name, const float* values, std::size_t rows, std::size_t columns) {
    return numbers(name, values, {rows, columns});
  }

  /// A picture, (height, width, 3) uint8 RGB in C order, without padding between rows. It is copied.
  Observation& image(const std::string& name, const std::uint8_t* rgb, std::size_t height, std::size_t width) {
    return add(name, [&](wire::Packer& packer) { wire::pack_array(packer, rgb, 1, "|u1", {height, width, 3}); });
  }
  /// The same. Raises std::invalid_argument unless `rgb` holds height * width * 3 bytes.
  Observation& image(const std::string& name, const std::vector<std::uint8_t>& rgb, std::size_t height,
                     std::size_t width) {
    if (rgb.size() != height * width * 3) {
      throw std::invalid_argument("image '" + name + "' has " + std::to_string(rgb.size()) + " bytes, expected " +
                                  std::to_string(height) + " * " + std::to_string(width) + " * 3");
    }
    return image(name, rgb.data(), height, width);
  }

  /// A picture as the bytes of a JPEG or PNG file, written from RGB. They are copied.
  Observation& jpeg(const std::string& name, const void* bytes, std::size_t size) {
    return add(name, [&](wire::Packer& packer) { wire::pack_bytes(packer, bytes, size); });
  }
  Observation& jpeg(const std::string& name, const std::vector<std::uint8_t>& bytes) {
    return jpeg(name, bytes.data(), bytes.size());
  }

  /// A text in UTF-8, an instruction for example.
  Observation& text(const std::string& name, const std::string& words) {
    return add(name, [&](wire::Packer& packer) { wire::pack_text(packer, words); });
  }

  const std::vector<Input>& inputs() const { return inputs_; }

 private:
  Observation& numbers(const std::string& name, const float* values, std::initializer_list<std::size_t> shape) {
    return add(name, [&](wire::Packer& packer) { wire::pack_array(packer, values, sizeof(float), "<f4", shape); });
  }
  Observation& numbers(const std::string& name, const double* values, std::initializer_list<std::size_t> shape) {
    return add(name, [&](wire::Packer& packer) { wire::pack_array(packer, values, sizeof(double), "<f8", shape); });
  }

  template <typename PackValue>
  Observation& add(const std::string& name, const PackValue& pack_value) {
    wire::Bytes bytes;
    wire::Packer packer(bytes);
    wire::pack_text(packer, name);
    pack_value(packer);
    auto piece = std::make_shared<const std::string>(std::move(bytes.text));
    const auto held =
        std::find_if(inputs_.begin(), inputs_.end(), [&](const Input& input) { return input.name == name; });
    if (held == inputs_.end()) {
      inputs_.push_back({name, std::move(piece)});
    } else {
      held->bytes = std::move(piece);
    }
    return *this;
  }

  std::vector<Input> inputs_;
};

}  // namespace policy
