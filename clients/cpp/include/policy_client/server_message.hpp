/// Reading what the server sends. Nothing of it is trusted.
#pragma once

#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <msgpack.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "policy_client/chunk.hpp"
#include "policy_client/message.hpp"

namespace policy::wire {

/// Walks over a message without keeping any of it, and stops where it goes past the bounds.
class Bounds : public msgpack::null_visitor {
 public:
  bool start_array(std::uint32_t items) { return enter(items); }
  bool end_array() { return leave(); }
  bool start_map(std::uint32_t pairs) { return enter(std::size_t{pairs} * 2); }
  bool end_map() { return leave(); }
  bool visit_ext(const char*, std::uint32_t) { return false; }

 private:
  bool enter(std::size_t values) {
    values_ += values;
    return ++depth_ <= kMaxDepth && values_ <= kMaxValues;
  }
  bool leave() {
    --depth_;
    return true;
  }

  std::size_t depth_ = 0;
  std::size_t values_ = 0;
};

/// A map with string keys, text or binary. It refers to the bytes of the message.
class Fields {
 public:
  Fields(const msgpack::object& object, const char* what) : what_(what) {
    if (object.type != msgpack::type::MAP) throw MalformedMessage(std::string(what) + " is no map");
    map_ = object.via.map;
  }

  /// Return the value of `key`, or null.
  const msgpack::object* find(std::string_view key) const {
    for (std::uint32_t i = 0; i < map_.size; ++i) {
      const auto name = text_of(map_.ptr[i].key, true);
      if (name && *name == key) return &map_.ptr[i].val;
    }
    return nullptr;
  }
  const msgpack::object& required(std::string_view key) const {
    const msgpack::object* value = find(key);
    if (!value) throw wrong(key, "missing");
    return *value;
  }

  std::string text(std::string_view key) const {
    const auto value = text_of(required(key), false);
    if (!value) throw wrong(key, "no text");
    return std::string(*value);
  }
  bool boolean(std::string_view key) const {
    const msgpack::object& value = required(key);
    if (value.type != msgpack::type::BOOLEAN) throw wrong(key, "no boolean");
    return value.via.boolean;
  }
  std::uint64_t natural(std::string_view key) const {
    const auto value = natural_of(required(key));
    if (!value) throw wrong(key, "no natural number");
    return *value;
  }
  std::int64_t integer(std::string_view key) const {
    const msgpack::object& value = required(key);
    if (value.type == msgpack::type::NEGATIVE_INTEGER) return value.via.i64;
    const auto natural = natural_of(value);
    if (!natural || *natural > static_cast<std::uint64_t>(INT64_MAX)) throw wrong(key, "no 64-bit integer");
    return static_cast<std::int64_t>(*natural);
  }
  double number(std::string_view key) const {
    const auto value = number_of(required(key));
    if (!value || !std::isfinite(*value)) throw wrong(key, "no finite number");
    return *value;
  }

  // What only informs may be missing, or be of a kind that a later server has made of it.
  std::string text_or_empty(std::string_view key) const {
    const msgpack::object* value = find(key);
    const auto text = value ? text_of(*value, false) : std::nullopt;
    return std::string(text.value_or(std::string_view()));
  }
  std::optional<std::uint64_t> natural_if_any(std::string_view key) const {
    const msgpack::object* value = find(key);
    return value ? natural_of(*value) : std::nullopt;
  }
  double number_or_zero(std::string_view key) const {
    const msgpack::object* value = find(key);
    return value ? number_of(*value).value_or(0) : 0;
  }
  std::optional<Fields> map_if_any(std::string_view key) const {
    const msgpack::object* value = find(key);
    if (!value || value->type != msgpack::type::MAP) return std::nullopt;
    return Fields(*value, what_);
  }

  MalformedMessage wrong(std::string_view key, const std::string& how) const {
    return MalformedMessage("'" + std::string(key) + "' of " + what_ + " is " + how);
  }

  static std::optional<std::string_view> text_of(const msgpack::object& value, bool or_binary) {
    if (value.type == msgpack::type::STR) return std::string_view(value.via.str.ptr, value.via.str.size);
    if (or_binary && value.type == msgpack::type::BIN) return std::string_view(value.via.bin.ptr, value.via.bin.size);
    return std::nullopt;
  }
  static std::optional<std::uint64_t> natural_of(const msgpack::object& value) {
    if (value.type == msgpack::type::POSITIVE_INTEGER) return value.via.u64;
    return std::nullopt;
  }
  static std::optional<double> number_of(const msgpack::object& value) {
    switch (value.type) {
      case msgpack::type::POSITIVE_INTEGER:
        return static_cast<double>(value.via.u64);
      case msgpack::type::NEGATIVE_INTEGER:
        return static_cast<double>(value.via.i64);
      case msgpack::type::FLOAT32:
      case msgpack::type::FLOAT64:
        return value.via.f64;
      default:
        return std::nullopt;
    }
  }

 private:
  msgpack::object_map map_;
  const char* what_;
};

/// Fill `chunk` with an (H, A) array: dtype and shape are checked against each other and the data before any is read.
inline void read_actions(const Fields& message, Chunk& chunk) {
  const Fields array(message.required("actions"), "actions");
  if (!array.boolean("__ndarray__")) throw array.wrong("__ndarray__", "false");
  if (const std::string dtype = array.text("dtype"); dtype != "<f4") throw array.wrong("dtype", dtype + ", not <f4");
  const msgpack::object& shape = array.required("shape");
  if (shape.type != msgpack::type::ARRAY || shape.via.array.size != 2) throw array.wrong("shape", "not (H, A)");
  const std::uint64_t horizon = Fields::natural_of(shape.via.array.ptr[0]).value_or(0);
  const std::uint64_t width = Fields::natural_of(shape.via.array.ptr[1]).value_or(0);
  const msgpack::object& data = array.required("data");
  if (data.type != msgpack::type::BIN) throw array.wrong("data", "not binary");
  const std::uint64_t numbers = data.via.bin.size / sizeof(float);
  if (horizon == 0 || width == 0) throw array.wrong("shape", "not of two numbers above 0");
  // Divided and not multiplied: the product of two numbers of the sender's choice may wrap around.
  if (data.via.bin.size % sizeof(float) != 0 || numbers % width != 0 || numbers / width != horizon) {
    throw array.wrong("data", std::to_string(data.via.bin.size) + " bytes long, which is not what its shape says");
  }
  std::vector<float> values(numbers);
  std::memcpy(values.data(), data.via.bin.ptr, data.via.bin.size);
  for (const float value : values) {
    if (!std::isfinite(value)) throw array.wrong("data", "not finite throughout");
  }
  chunk.values = std::make_shared<const std::vector<float>>(std::move(values));
  chunk.horizon = static_cast<std::size_t>(horizon);
  chunk.width = static_cast<std::size_t>(width);
}

inline Chunk read_chunk(const Fields& message, TimePoint now) {
  Chunk chunk;
  chunk.seq = message.natural("seq");
  chunk.episode = message.natural("episode");
  chunk.captured =
      TimePoint(std::chrono::duration_cast<Clock::duration>(std::chrono::nanoseconds(message.integer("captured_ns"))));
  chunk.received = now;
  read_actions(message, chunk);
  chunk.step = Seconds(message.number("step_s"));
  if (chunk.step <= Seconds(0)) throw message.wrong("step_s", "not positive");
  chunk.seed = message.natural_if_any("seed");
  chunk.policy = message.text_or_empty("policy");
  chunk.version = message.text_or_empty("version");
  chunk.engine = message.text_or_empty("engine");
  chunk.superseded = message.natural_if_any("superseded").value_or(0);
  chunk.stale = message.natural_if_any("stale").value_or(0);
  if (const auto timings = message.map_if_any("timings")) {
    chunk.timings = {timings->number_or_zero("received_ms"), timings->number_or_zero("waited_ms"),
                     timings->number_or_zero("infer_ms"), timings->number_or_zero("total_ms")};
  }
  if (const auto continuity = message.map_if_any("continuity")) {
    chunk.continuity.mode = continuity->text_or_empty("mode");
    chunk.continuity.frozen = continuity->natural_if_any("frozen").value_or(0);
    chunk.continuity.overlap = continuity->natural_if_any("overlap").value_or(0);
    chunk.continuity.delay_ms = continuity->number_or_zero("delay_ms");
  }
  if (const auto guard = message.map_if_any("guard")) {
    chunk.clamped = guard->natural_if_any("clamped").value_or(0);
    chunk.fallback = guard->text_or_empty("fallback");
  }
  return chunk;
}

inline Welcome read_welcome(const Fields& message) {
  if (message.integer("protocol") != kProtocol) throw message.wrong("protocol", "not 1");
  Welcome welcome;
  welcome.session = message.text("session");
  welcome.resume = message.text("resume");
  welcome.resumed = message.boolean("resumed");
  welcome.policy = message.text_or_empty("policy");
  welcome.version = message.text_or_empty("version");
  welcome.engine = message.text_or_empty("engine");
  welcome.grace_s = message.number_or_zero("grace_s");
  welcome.chunk_ms = message.number_or_zero("chunk_ms");
  welcome.rate_hz = message.number_or_zero("rate_hz");
  welcome.max_message_bytes = message.natural_if_any("max_message_bytes").value_or(0);
  return welcome;
}

/// Return the message in a binary frame that came at `now`. Raises MalformedMessage for everything that is wrong.
inline ServerMessage read(const char* data, std::size_t size, TimePoint now) {
  Bounds bounds;
  std::size_t end = 0;
  if (!msgpack::parse(data, size, end, bounds) || end != size) {
    throw MalformedMessage("a frame of " + std::to_string(size) + " bytes holds no msgpack map within the bounds");
  }
  const auto refer_to_frame = [](msgpack::type::object_type, std::size_t, void*) { return true; };
  const msgpack::object_handle handle = msgpack::unpack(data, size, refer_to_frame);
  const Fields message(handle.get(), "a message");
  const std::string type = message.text("type");
  if (type == "chunk") return read_chunk(message, now);
  if (type == "ping") return Ping{message.integer("sent_ns")};
  if (type == "error") {
    return ServerError{message.text("code"), message.text("message"), message.natural_if_any("seq").value_or(0)};
  }
  if (type == "welcome") return read_welcome(message);
  return Unknown{};
}

}  // namespace policy::wire
