/// The robot's side of a session: what is said next, and what was heard. No socket, no thread, no clock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>

#include "policy_client/chunk.hpp"
#include "policy_client/chunk_buffer.hpp"
#include "policy_client/message.hpp"
#include "policy_client/options.hpp"

namespace policy {

/// What came of everything so far. They only rise.
struct Counters {
  std::uint64_t observations_sent = 0;
  std::uint64_t observations_replaced = 0;  // by a newer one, before they could be sent
  std::uint64_t observations_dropped = 0;   // past their deadline, cancelled, of a past episode, or too big to send
  std::uint64_t chunks = 0;
  std::uint64_t chunks_ignored = 0;   // duplicates, older than one received already, of a past episode
  std::uint64_t server_errors = 0;    // `error` messages
  std::uint64_t protocol_errors = 0;  // malformed messages; each ends its connection
  std::uint64_t pings = 0;
  std::uint64_t connections = 0;  // that came as far as `welcome`
  std::uint64_t resumes = 0;      // connections that went on with the session of the one before
  std::uint64_t failures = 0;     // attempts to connect that failed, and connections that broke
};

/// The last thing that went wrong.
struct Error {
  std::string
      code;  // of docs/stream.md; or `malformed_message`, `connection_lost`, `refused`, `taken_over`, `internal`
  std::string message;
  std::uint64_t seq = 0;  // of the observation that it is about; 0 for none
  TimePoint at;
};

/// A session over all its connections. Not for several threads.
///
/// Everything that waits to be said has one place, and the newest takes it: nothing here grows while the network hangs.
class Session {
 public:
  explicit Session(StreamOptions options) : options_(std::move(options)) {}

  // What the robot does.

  /// Put an observation in the outbox, in place of one that waits there, and return its `seq`.
  std::uint64_t observe(Observation inputs, TimePoint captured, Settings sampling, std::optional<Milliseconds> delay) {
    if (outbox_) ++counters_.observations_replaced;
    outbox_.emplace();
    outbox_->seq = ++last_seq_;
    outbox_->episode = episode_;
    outbox_->revision = revision_;
    outbox_->playing = playing_at(captured);
    outbox_->captured = captured;
    outbox_->delay = delay;
    outbox_->sampling = std::move(sampling);
    outbox_->inputs = std::move(inputs);
    return last_seq_;
  }

  /// Inputs and options that hold for all later observations, in place of those set before.
  std::uint64_t set(Observation inputs, Settings sampling) {
    set_inputs_ = std::move(inputs);
    set_sampling_ = std::move(sampling);
    set_waits_ = true;
    return ++revision_;
  }

  /// Begin a new episode and return its number: the chunk of the last one is not played on.
  std::uint64_t reset() {
    drop_outbox();
    buffer_.begin_episode(++episode_);
    reset_waits_ = true;
    return episode_;
  }

  /// Give up the observations up to and with `seq`.
  void cancel(std::uint64_t seq) {
    if (outbox_ && outbox_->seq <= seq) drop_outbox();
    cancel_waits_ = seq;
  }

  // What its connections do. `hello` begins each, and `connection_ended` ends it.

  wire::Frame hello() const { return wire::hello(options_, welcome_ ? welcome_->resume : std::string()); }

  /// Return the next message to send, or nothing: what answers the server first, then what changes how the observation
  /// is understood, then the observation.
  std::optional<wire::Frame> next(TimePoint now) {
    if (!open_) return std::nullopt;
    if (ping_) return wire::pong(std::exchange(ping_, std::nullopt)->sent_ns, now);
    if (std::exchange(set_waits_, false)) return wire::set(revision_, set_inputs_, set_sampling_);
    if (std::exchange(reset_waits_, false)) return wire::reset(episode_);
    if (const auto seq = std::exchange(cancel_waits_, std::nullopt)) return wire::cancel(*seq);
    return next_observation(now);
  }

  /// Take in a message that came at `now`. Raises MalformedMessage: the connection has to be closed with 1002.
  void receive(wire::ServerMessage message, TimePoint now) {
    if (auto* chunk = std::get_if<Chunk>(&message)) take(std::move(*chunk));
    if (auto* ping = std::get_if<wire::Ping>(&message)) take(*ping);
    if (auto* error = std::get_if<ServerError>(&message)) take(std::move(*error), now);
    if (auto* welcome = std::get_if<Welcome>(&message)) take(std::move(*welcome));
  }

  void connection_ended() {
    open_ = false;
    ping_.reset();
    cancel_waits_.reset();
    reset_waits_ = false;  // the next observation's episode says the same
  }

  void note(std::string code, std::string message, TimePoint now) {
    last_error_ = Error{std::move(code), std::move(message), 0, now};
  }

  // What is known.

  const StreamOptions& options() const { return options_; }
  bool open() const { return open_; }
  const ChunkBuffer& chunks() const { return buffer_; }
  const std::optional<Welcome>& welcome() const { return welcome_; }
  const std::optional<Error>& last_error() const { return last_error_; }
  const Counters& counters() const { return counters_; }
  Counters& counters() { return counters_; }
  std::uint64_t last_seq() const { return last_seq_; }
  std::uint64_t episode() const { return episode_; }

 private:
  struct Sent {
    std::uint64_t seq;
    TimePoint captured;
  };
  static constexpr std::size_t kMostSent = 1024;

  std::uint64_t playing_at(TimePoint captured) const {
    return chunk_is_of_session_ && buffer_.action_at(captured) ? buffer_.latest()->seq : 0;
  }

  void drop_outbox() {
    if (outbox_) ++counters_.observations_dropped;
    outbox_.reset();
  }

  std::optional<wire::Frame> next_observation(TimePoint now) {
    if (!outbox_) return std::nullopt;
    if (options_.deadline && now - outbox_->captured > *options_.deadline) {  // it waited for a connection
      drop_outbox();
      return std::nullopt;
    }
    wire::Frame frame = wire::observation(*outbox_);
    if (welcome_->max_message_bytes != 0 && frame.size() > welcome_->max_message_bytes) {
      const std::string sizes =
          std::to_string(frame.size()) + " bytes, the server takes " + std::to_string(welcome_->max_message_bytes);
      last_error_ = Error{"message_too_big", "the observation has " + sizes, outbox_->seq, now};
      drop_outbox();
      return std::nullopt;
    }
    if (sent_.size() == kMostSent) sent_.pop_front();
    sent_.push_back({outbox_->seq, outbox_->captured});
    outbox_.reset();
    ++counters_.observations_sent;
    return frame;
  }

  void take(Welcome&& welcome) {
    if (open_) throw MalformedMessage("a second welcome came");
    open_ = true;
    ++counters_.connections;
    counters_.resumes += welcome.resumed;
    if (!welcome.resumed) {  // a session that knows nothing of the chunk being played
      chunk_is_of_session_ = false;
      sent_.clear();
    }
    // Whether the server has it already cannot be known: it may have been lost on its way.
    set_waits_ = revision_ > 0;
    welcome_ = std::move(welcome);
  }

  void take(Chunk&& chunk) {
    if (!open_) throw MalformedMessage("a chunk came before the welcome");
    if (chunk.seq > last_seq_) {
      throw MalformedMessage("a chunk answers " + std::to_string(chunk.seq) + ", the last one sent was " +
                             std::to_string(last_seq_));
    }
    while (!sent_.empty() && sent_.front().seq < chunk.seq) sent_.pop_front();
    if (sent_.empty() || sent_.front().seq != chunk.seq) {
      ++counters_.chunks_ignored;
      return;
    }
    if (sent_.front().captured != chunk.captured) {
      throw MalformedMessage("a chunk's captured_ns is not that of the observation that it answers");
    }
    sent_.pop_front();
    if (!buffer_.push(std::make_shared<const Chunk>(std::move(chunk)))) {
      ++counters_.chunks_ignored;
      return;
    }
    ++counters_.chunks;
    chunk_is_of_session_ = true;
  }

  void take(wire::Ping ping) {
    if (!open_) throw MalformedMessage("a ping came before the welcome");
    ++counters_.pings;
    ping_ = ping;
  }

  void take(ServerError&& error, TimePoint now) {
    ++counters_.server_errors;
    if (error.code == "unknown_revision") set_waits_ = revision_ > 0;
    last_error_ = Error{std::move(error.code), std::move(error.message), error.seq, now};
  }

  StreamOptions options_;
  std::optional<Welcome> welcome_;  // of this connection, or of the last one that had one
  bool open_ = false;               // whether this connection had one

  std::uint64_t last_seq_ = 0;
  std::uint64_t episode_ = 0;
  std::uint64_t revision_ = 0;
  Observation set_inputs_;
  Settings set_sampling_;

  std::optional<wire::Captured> outbox_;
  std::optional<wire::Ping> ping_;
  std::optional<std::uint64_t> cancel_waits_;
  bool set_waits_ = false;
  bool reset_waits_ = false;

  std::deque<Sent> sent_;  // and not answered, nor older than one that was
  ChunkBuffer buffer_;
  bool chunk_is_of_session_ = false;
  std::optional<Error> last_error_;
  Counters counters_;
};

}  // namespace policy
