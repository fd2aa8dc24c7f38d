/// The messages of the streaming protocol as bytes, without a socket. `docs/stream.md` says what they mean.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "policy_client/chunk.hpp"
#include "policy_client/observation.hpp"
#include "policy_client/options.hpp"

namespace policy {

/// The server sent what is no message of this protocol. The text says what was got and what was expected.
class MalformedMessage : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// What `welcome` says.
struct Welcome {
  std::string session;  // the session's name in logs
  std::string resume;   // a secret: whoever has it gets the session
  bool resumed = false;
  std::string policy, version, engine;
  double grace_s = 0;
  double chunk_ms = 0;
  double rate_hz = 0;
  std::uint64_t max_message_bytes = 0;  // of a message from the robot; 0 if the server did not say
};

/// What an `error` says.
struct ServerError {
  std::string code;
  std::string message;
  std::uint64_t seq = 0;  // of the observation that it is about; 0 for none
};

namespace wire {

constexpr std::int64_t kProtocol = 1;

// The deepest nesting and the most values of one message, as for messages to the server: numbers in bulk travel as
// arrays, whose items do not count, so a message past these is an attempt to turn few bytes into much memory.
constexpr std::size_t kMaxDepth = 32;
constexpr std::size_t kMaxValues = 100'000;

/// One message to the server: `head`, then the pieces of `body`.
struct Frame {
  std::string head;
  std::vector<Piece> body;

  std::size_t size() const {
    std::size_t bytes = head.size();
    for (const Piece& piece : body) bytes += piece->size();
    return bytes;
  }
};

/// An observation on its way.
struct Captured {
  std::uint64_t seq = 0;
  std::uint64_t episode = 0;
  std::uint64_t revision = 0;
  std::uint64_t playing = 0;
  TimePoint captured;
  std::optional<Milliseconds> delay;
  Settings sampling;
  Observation inputs;
};

struct Ping {
  std::int64_t sent_ns = 0;
};

/// A message of a type that this client does not know, from a later server. It is ignored.
struct Unknown {};

using ServerMessage = std::variant<Unknown, Welcome, Chunk, ServerError, Ping>;

inline std::int64_t nanoseconds(TimePoint time) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time.time_since_epoch()).count();
}

/// Writes the map of one message, key by key.
class MessageWriter {
 public:
  MessageWriter(const char* type, std::size_t keys) : packer_(bytes_) {
    packer_.pack_map(static_cast<std::uint32_t>(keys + 1));
    with("type", std::string(type));
  }

  template <typename T>
  MessageWriter& with(const char* key, const T& value) {
    pack_text(packer_, key);
    packer_.pack(value);
    return *this;
  }
  MessageWriter& with(const char* key, const Settings& settings) {
    pack_text(packer_, key);
    packer_.pack_map(static_cast<std::uint32_t>(settings.values().size()));
    pack_settings(settings);
    return *this;
  }
  MessageWriter& with_mode(const char* key, const std::string& mode, const Settings& settings) {
    if (settings.empty()) return with(key, mode);
    pack_text(packer_, key);
    packer_.pack_map(static_cast<std::uint32_t>(settings.values().size() + 1));
    with("mode", mode);
    pack_settings(settings);
    return *this;
  }

  Frame finish() { return {std::move(bytes_.text), {}}; }
  /// Inputs come last, since their bytes are shared and not copied.
  Frame finish_with(const char* key, const Observation& inputs) {
    pack_text(packer_, key);
    packer_.pack_map(static_cast<std::uint32_t>(inputs.inputs().size()));
    Frame frame = finish();
    for (const Observation::Input& input : inputs.inputs()) frame.body.push_back(input.bytes);
    return frame;
  }

 private:
  void pack_settings(const Settings& settings) {
    for (const auto& [name, value] : settings.values()) {
      pack_text(packer_, name);
      std::visit([this](const auto& plain) { packer_.pack(plain); }, value);
    }
  }

  Bytes bytes_;
  Packer packer_;
};

inline Frame hello(const StreamOptions& options, const std::string& resume) {
  const std::size_t keys = 1 + !options.name.empty() + !resume.empty() + options.rate_hz.has_value() +
                           options.deadline.has_value() + !options.sampling.empty() + !options.continuity.empty();
  MessageWriter writer("hello", keys);
  writer.with("protocol", kProtocol);
  if (!options.name.empty()) writer.with("name", options.name);
  if (!resume.empty()) writer.with("resume", resume);
  if (options.rate_hz) writer.with("rate_hz", *options.rate_hz);
  if (options.deadline) writer.with("deadline_ms", options.deadline->count());
  if (!options.sampling.empty()) writer.with("options", options.sampling);
  if (!options.continuity.empty()) writer.with_mode("continuity", options.continuity, options.continuity_keys);
  return writer.finish();
}

inline Frame observation(const Captured& captured) {
  MessageWriter writer("observation", 6 + captured.delay.has_value() + !captured.sampling.empty());
  writer.with("seq", captured.seq)
      .with("episode", captured.episode)
      .with("captured_ns", nanoseconds(captured.captured))
      .with("revision", captured.revision)
      .with("playing", captured.playing);
  if (captured.delay) writer.with("delay_ms", captured.delay->count());
  if (!captured.sampling.empty()) writer.with("options", captured.sampling);
  return writer.finish_with("observation", captured.inputs);
}

inline Frame set(std::uint64_t revision, const Observation& inputs, const Settings& sampling) {
  MessageWriter writer("set", 3);
  return writer.with("revision", revision).with("options", sampling).finish_with("inputs", inputs);
}

inline Frame reset(std::uint64_t episode) {
  return MessageWriter("reset", 1).with("episode", episode).finish();
}

inline Frame cancel(std::uint64_t seq) {
  return MessageWriter("cancel", 1).with("seq", seq).finish();
}

inline Frame pong(std::int64_t sent_ns, TimePoint now) {
  return MessageWriter("pong", 2).with("sent_ns", sent_ns).with("robot_ns", nanoseconds(now)).finish();
}

inline Frame bye() {
  return MessageWriter("bye", 0).finish();
}

}  // namespace wire
}  // namespace policy
