/// A robot's stream to a policy server: observations up at any rate, action chunks down.
///
///     policy::StreamOptions options;
///     options.policy = "point-maze";
///     policy::PolicyStream stream(options);
///     for (;;) {
///       stream.send(policy::Observation().vector("state", state).vector("goal", goal));
///       if (const auto action = stream.action_at(policy::Clock::now())) drive(*action); else hold();
///     }
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include "policy_client/chunk.hpp"
#include "policy_client/chunk_buffer.hpp"
#include "policy_client/link.hpp"
#include "policy_client/observation.hpp"
#include "policy_client/options.hpp"
#include "policy_client/session.hpp"

namespace policy {

/// What may be said of one observation beside its inputs.
struct Moment {
  TimePoint captured = Clock::now();  // when the observation was true: row 0 of its chunk is due then
  std::optional<Milliseconds>
      delay{};          // from capture until the robot begins to play the answer; else the server's guess
  Settings sampling{};  // options of this observation alone, over those of the stream and of `set`
};

/// Keeps a session with the server, over as many connections as it takes.
///
/// A thread of its own owns the socket. It connects, answers pings, and when the connection breaks it connects again,
/// with growing pauses and without end, and goes on with the session if the server still has it. Nothing that the
/// server sends or fails to send throws, blocks or stops the caller: `state`, `last_error` and `counters` tell.
///
/// All functions may be called from any thread. Those that do not say `wait` never wait for the network: they hold a
/// lock for as long as it takes to copy a few words, and may throw std::bad_alloc, nothing else.
class PolicyStream {
 public:
  /// Begin to connect, and return at once.
  ///
  /// Raises std::invalid_argument for options that cannot be right, std::system_error if no thread can be had.
  explicit PolicyStream(StreamOptions options) {
    options.check();
    link_ = std::make_shared<detail::Link>(std::move(options));
    thread_ = std::thread([link = link_] { link->run(); });
  }

  /// End the session. Takes up to `close_timeout` and no more than half a second beyond, whatever the network does.
  ~PolicyStream() {
    std::unique_lock<std::mutex> lock(link_->guarded.mutex);
    const auto grace = link_->guarded.session.options().close_timeout + std::chrono::milliseconds(500);
    link_->stop();
    const bool finished = link_->changed.wait_for(lock, grace, [this] { return link_->finished(); });
    lock.unlock();
    if (finished) {
      thread_.join();
    } else {
      thread_.detach();  // a name is being resolved, which nothing can interrupt; the thread owns all that it touches
    }
  }

  PolicyStream(const PolicyStream&) = delete;
  PolicyStream& operator=(const PolicyStream&) = delete;

  /// Send an observation as soon as the connection allows, and return its `seq`. Of those that wait for the connection
  /// the newest alone is kept.
  std::uint64_t send(Observation inputs, TimePoint captured = Clock::now()) {
    return send(std::move(inputs), Moment{captured, {}, {}});
  }
  std::uint64_t send(Observation inputs, Moment moment) {
    const std::lock_guard<std::mutex> lock(link_->guarded.mutex);
    const std::uint64_t seq =
        session().observe(std::move(inputs), moment.captured, std::move(moment.sampling), moment.delay);
    link_->wake();
    return seq;
  }

  /// Have inputs (a goal, an instruction) and options hold for all later observations, in place of those set before.
  /// They are sent again whenever the server may not have them.
  void set(Observation inputs, Settings sampling = {}) {
    const std::lock_guard<std::mutex> lock(link_->guarded.mutex);
    session().set(std::move(inputs), std::move(sampling));
    link_->wake();
  }

  /// End the episode: the server forgets what it remembered, and no chunk of it is played on. Returns the new number.
  std::uint64_t reset() {
    const std::lock_guard<std::mutex> lock(link_->guarded.mutex);
    const std::uint64_t episode = session().reset();
    link_->wake();
    return episode;
  }

  /// Give up all observations so far, or those up to and with `seq`. The chunk that is held stays.
  void cancel() {
    const std::lock_guard<std::mutex> lock(link_->guarded.mutex);
    cancel_locked(session().last_seq());
  }
  void cancel(std::uint64_t seq) {
    const std::lock_guard<std::mutex> lock(link_->guarded.mutex);
    cancel_locked(seq);
  }

  /// Return the newest chunk of this episode, or null before the first. Whether it still has actions is for
  /// `Chunk::action_at` to say.
  std::shared_ptr<const Chunk> latest() const {
    const std::lock_guard<std::mutex> lock(link_->guarded.mutex);
    return session().chunks().latest();
  }

  /// Return the action due at `now`, (A,), or nothing: then the robot has to hold, in whatever way is safe for it.
  std::optional<Action> action_at(TimePoint now) const {
    const auto chunk = latest();
    return chunk ? chunk->action_at(now) : std::nullopt;
  }

  /// Wait until the stream is open, for `timeout` at most; return whether it is.
  bool wait_open(std::chrono::milliseconds timeout) const {
    std::unique_lock<std::mutex> lock(link_->guarded.mutex);
    link_->changed.wait_for(lock, timeout,
                            [this] { return link_->state() == State::open || link_->state() == State::closed; });
    return link_->state() == State::open;
  }

  /// Wait for a chunk that answers `after` or a later observation, for `timeout` at most; return it, or null.
  std::shared_ptr<const Chunk> wait_for_chunk(std::chrono::milliseconds timeout, std::uint64_t after = 1) const {
    std::unique_lock<std::mutex> lock(link_->guarded.mutex);
    const auto there = [this, after] {
      const auto& chunk = session().chunks().latest();
      return chunk && chunk->seq >= after;
    };
    link_->changed.wait_for(lock, timeout, [&] { return there() || link_->state() == State::closed; });
    return there() ? session().chunks().latest() : nullptr;
  }

  State state() const {
    const std::lock_guard<std::mutex> lock(link_->guarded.mutex);
    return link_->state();
  }

  /// The number of the present episode, from 0.
  std::uint64_t episode() const {
    const std::lock_guard<std::mutex> lock(link_->guarded.mutex);
    return session().episode();
  }

  /// What the server said of itself when it last let this robot in, without the token; nothing before.
  std::optional<Welcome> welcome() const {
    const std::lock_guard<std::mutex> lock(link_->guarded.mutex);
    std::optional<Welcome> welcome = session().welcome();
    if (welcome) welcome->resume.clear();
    return welcome;
  }

  /// The last thing that went wrong, if anything did. It stays when all is well again.
  std::optional<Error> last_error() const {
    const std::lock_guard<std::mutex> lock(link_->guarded.mutex);
    return session().last_error();
  }

  Counters counters() const {
    const std::lock_guard<std::mutex> lock(link_->guarded.mutex);
    return session().counters();
  }

 private:
  Session& session() const { return link_->guarded.session; }

  void cancel_locked(std::uint64_t seq) {
    session().cancel(seq);
    link_->wake();
  }

  std::shared_ptr<detail::Link> link_;
  std::thread thread_;
};

}  // namespace policy
