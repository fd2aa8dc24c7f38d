/// The thread that keeps a stream connected: connects, goes on after a break, takes leave.
#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <utility>

#include "policy_client/connection.hpp"
#include "policy_client/options.hpp"
#include "policy_client/session.hpp"

namespace policy {

/// What a stream is doing.
enum class State {
  connecting,  // an attempt is under way
  open,        // observations flow up, chunks flow down
  waiting,     // between two attempts
  refused,     // the same, after the server said no: a wrong key, an unknown policy, a rate that it cannot hold
  closed,      // for good: another client went on with the session
};

inline const char* to_string(State state) {
  switch (state) {
    case State::connecting:
      return "connecting";
    case State::open:
      return "open";
    case State::waiting:
      return "waiting";
    case State::refused:
      return "refused";
    case State::closed:
      return "closed";
  }
  return "?";
}

namespace detail {

/// The session with the connection that carries it at present. The stream and the thread own it together.
class Link {
 public:
  explicit Link(StreamOptions options) : guarded(std::move(options)), loop_(std::make_unique<Loop>()) {}

  GuardedSession guarded;           // its mutex also guards what follows
  std::condition_variable changed;  // notified after each message of the server and each change of state

  State state() const { return state_; }
  bool finished() const { return finished_; }

  /// Have the thread send what the session has to say. Call it with the mutex held.
  void wake() {
    if (!loop_ || woken_) return;
    net::post(loop_->io, [this] {
      {
        const std::lock_guard<std::mutex> lock(guarded.mutex);
        woken_ = false;
      }
      if (const auto connection = loop_->connection) connection->pump();
    });
    woken_ = true;
  }

  /// Have the thread take leave and end. Call it with the mutex held.
  void stop() {
    if (loop_) net::post(loop_->io, [this] { on_stop(); });
  }

  /// What the thread does. Returns when the stream is stopped or cannot go on.
  void run() noexcept {
    bool failed = false;
    bool begun = false;
    for (;;) {
      try {
        if (!std::exchange(begun, true)) connect();
        if (std::exchange(failed, false)) recover();
        loop_->io.run();
        break;
      } catch (const std::exception& error) {  // out of memory, most likely
        failed = true;
        note(error.what());
      }
    }
    std::unique_ptr<Loop> loop;
    {
      const std::lock_guard<std::mutex> lock(guarded.mutex);
      loop = std::move(loop_);
      guarded.session.connection_ended();
      state_ = State::closed;
    }
    loop.reset();  // may wait for a name that is being resolved
    const std::lock_guard<std::mutex> lock(guarded.mutex);
    finished_ = true;
    changed.notify_all();
  }

 private:
  struct Loop {
    net::io_context io{1};
    net::steady_timer retry{io};
    net::steady_timer leave{io};
    std::shared_ptr<Connection> connection;
  };

  void connect() {
    {
      const std::lock_guard<std::mutex> lock(guarded.mutex);
      errors_before_ = guarded.session.counters().server_errors;
      state_ = State::connecting;
    }
    changed.notify_all();
    loop_->connection = std::make_shared<Connection>(
        loop_->io, guarded, [this] { on_received(); }, [this](Ending ending) { on_ended(ending); });
    const auto connection = loop_->connection;
    connection->start();
  }

  void on_received() {
    {
      const std::lock_guard<std::mutex> lock(guarded.mutex);
      if (state_ == State::connecting && guarded.session.open()) {
        state_ = State::open;
        open_since_ = Clock::now();
      }
    }
    changed.notify_all();
  }

  void on_ended(const Ending& ending) {
    loop_->connection = nullptr;
    Seconds pause{0};
    {
      const std::lock_guard<std::mutex> lock(guarded.mutex);
      const bool was_open = guarded.session.open();
      guarded.session.connection_ended();
      if (stopping_) return loop_->io.stop();  // and do not wait for a name that is being resolved
      account(ending);
      const Backoff& backoff = guarded.session.options().backoff;
      const bool held = was_open && Clock::now() - open_since_ > backoff.longest;
      failures_ = held ? 0 : failures_;
      const bool refused = ending.kind == Ending::Kind::refused;
      const double random = std::uniform_real_distribution<double>()(random_);
      pause = refused ? backoff.longest : backoff.pause(failures_++, random);
      state_ = ending.kind == Ending::Kind::taken_over ? State::closed : refused ? State::refused : State::waiting;
    }
    changed.notify_all();
    if (ending.kind == Ending::Kind::taken_over) return;  // else the two would take it from each other for ever
    loop_->retry.expires_after(std::chrono::duration_cast<Clock::duration>(pause));
    loop_->retry.async_wait([this](boost::system::error_code) {
      if (!stopping_) connect();
    });
  }

  void account(const Ending& ending) {
    Session& session = guarded.session;
    ++session.counters().failures;
    session.counters().protocol_errors += ending.kind == Ending::Kind::malformed;
    // The error that came before the close says more than the close does.
    const bool explained = session.counters().server_errors > errors_before_;
    const TimePoint now = Clock::now();
    switch (ending.kind) {
      case Ending::Kind::lost:
        return session.note("connection_lost", ending.message, now);
      case Ending::Kind::refused:
        return explained ? void() : session.note("refused", ending.message, now);
      case Ending::Kind::taken_over:
        return session.note("taken_over", ending.message, now);
      case Ending::Kind::malformed:
        return session.note("malformed_message", ending.message, now);
    }
  }

  void on_stop() {
    stopping_ = true;
    loop_->retry.cancel();
    const auto connection = loop_->connection;
    if (!connection) return loop_->io.stop();
    loop_->leave.expires_after(guarded.session.options().close_timeout);
    loop_->leave.async_wait([this](boost::system::error_code) {
      if (const auto late = loop_->connection) late->end({Ending::Kind::lost, "the server took no leave"});
    });
    connection->leave();
  }

  /// Go on after an exception, which may have left anything undone.
  void recover() {
    const Ending ending{Ending::Kind::lost, "given up after an internal error"};
    if (const auto connection = loop_->connection) return connection->end(ending);
    on_ended(ending);
  }

  void note(const char* what) noexcept {
    try {
      const std::lock_guard<std::mutex> lock(guarded.mutex);
      guarded.session.note("internal", what, Clock::now());
    } catch (const std::exception&) {  // no memory even to say so; the counters will
    }
  }

  std::unique_ptr<Loop> loop_;
  State state_ = State::connecting;
  bool finished_ = false;
  bool woken_ = false;

  // Of the thread alone.
  bool stopping_ = false;
  std::size_t failures_ = 0;
  std::uint64_t errors_before_ = 0;
  TimePoint open_since_;
  std::mt19937 random_{std::random_device{}()};
};

}  // namespace detail
}  // namespace policy
