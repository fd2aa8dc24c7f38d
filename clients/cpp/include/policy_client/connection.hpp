/// One websocket, from the resolution of the host's name to its end.
#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/websocket.hpp>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "policy_client/message.hpp"
#include "policy_client/options.hpp"
#include "policy_client/server_message.hpp"
#include "policy_client/session.hpp"

namespace policy::detail {

namespace beast = boost::beast;
namespace net = boost::asio;

/// How a connection ended.
struct Ending {
  enum class Kind { lost, refused, taken_over, malformed };
  Kind kind;
  std::string message;
};

/// The session, and the lock under which threads take turns at it.
struct GuardedSession {
  explicit GuardedSession(StreamOptions options) : session(std::move(options)) {}
  std::mutex mutex;
  Session session;
};

/// Carries the session's messages over one websocket. Everything happens in the thread that runs the io_context.
class Connection : public std::enable_shared_from_this<Connection> {
 public:
  /// `received` is called after each message, `ended` once, when nothing more will come. Call `start` then.
  Connection(net::io_context& io, GuardedSession& guarded, std::function<void()> received,
             std::function<void(Ending)> ended)
      : guarded_(guarded),
        options_(guarded.session.options()),
        received_(std::move(received)),
        ended_(std::move(ended)),
        resolver_(io),
        limit_(io),
        socket_(io) {}

  void start() {
    limit(options_.connect_timeout, {Ending::Kind::lost, "no welcome within the connect_timeout"});
    // Numbers need no resolver, which may hang for as long as a network is away.
    beast::error_code not_an_address;
    const auto address = net::ip::make_address(options_.host, not_an_address);
    if (!not_an_address) return connect({net::ip::tcp::endpoint(address, options_.port)});
    resolver_.async_resolve(options_.host, std::to_string(options_.port),
                            [self = shared_from_this()](beast::error_code error, const auto& found) {
                              if (self->failed(error, "cannot resolve the host's name")) return;
                              std::vector<net::ip::tcp::endpoint> endpoints;
                              for (const auto& entry : found) endpoints.push_back(entry.endpoint());
                              self->connect(std::move(endpoints));
                            });
  }

  /// Send what the session has to say, unless a message is being sent already: then that one's end calls this.
  void pump() {
    if (!open_ || writing_ || over_ || closing_) return;
    std::optional<wire::Frame> frame;
    {
      const std::lock_guard<std::mutex> lock(guarded_.mutex);
      frame = guarded_.session.next(Clock::now());
    }
    if (!frame && leaving_) {
      frame = wire::bye();
      open_ = false;  // nothing is said after it
    }
    if (frame) write(std::move(*frame));
  }

  /// Take leave of the server; `ended` is called when it has closed the connection.
  void leave() {
    leaving_ = true;
    if (!open_) return end({Ending::Kind::lost, "left before the welcome"});
    pump();
  }

  /// End at once, without a closing handshake.
  void end(Ending ending) {
    if (std::exchange(over_, true)) return;
    lift_limit();
    resolver_.cancel();
    beast::get_lowest_layer(socket_).close();
    ended_(std::move(ending));
  }

 private:
  using Socket = beast::websocket::stream<beast::tcp_stream>;
  using CloseCode = beast::websocket::close_code;

  /// End with `ending` after `time`, unless the limit is lifted or another one set before.
  void limit(std::chrono::milliseconds time, Ending ending) {
    limit_.expires_after(time);
    limit_.async_wait([self = shared_from_this(), turn = ++limits_, ending = std::move(ending)](beast::error_code) {
      if (turn == self->limits_) self->end(ending);
    });
  }

  void lift_limit() {
    ++limits_;  // a handler that waits for its turn already cannot be cancelled
    limit_.cancel();
  }

  void connect(std::vector<net::ip::tcp::endpoint> endpoints) {
    beast::get_lowest_layer(socket_).async_connect(
        endpoints, [self = shared_from_this()](beast::error_code error, const net::ip::tcp::endpoint&) {
          if (!self->failed(error, "cannot connect")) self->handshake();
        });
  }

  void handshake() {
    beast::error_code ignored;
    beast::get_lowest_layer(socket_).socket().set_option(net::ip::tcp::no_delay(true), ignored);
    beast::websocket::stream_base::timeout timeouts{options_.connect_timeout, options_.silence_timeout, true};
    socket_.set_option(timeouts);
    socket_.set_option(beast::websocket::stream_base::decorator([key = options_.api_key](auto& request) {
      request.set(beast::http::field::user_agent, "policy_client-cpp");
      if (!key.empty()) request.set(beast::http::field::authorization, "Api-Key " + key);
    }));
    socket_.read_message_max(options_.max_message_bytes);
    socket_.binary(true);
    socket_.auto_fragment(false);
    socket_.write_buffer_bytes(kWriteBuffer);
    const bool is_ipv6_address = options_.host.find(':') != std::string::npos;
    const std::string host = is_ipv6_address ? "[" + options_.host + "]" : options_.host;
    socket_.async_handshake(response_, host + ":" + std::to_string(options_.port), path(options_.policy),
                            [self = shared_from_this()](beast::error_code error) { self->on_handshake(error); });
  }

  void on_handshake(beast::error_code error) {
    if (error == beast::websocket::error::upgrade_declined) {
      const unsigned status = response_.result_int();
      const bool for_now = status == 429 || status >= 500;  // a server that is starting, overloaded or being replaced
      return end({for_now ? Ending::Kind::lost : Ending::Kind::refused,
                  "HTTP " + std::to_string(status) + ": " + response_.body().substr(0, kLongestText)});
    }
    if (failed(error, "the websocket handshake failed")) return;
    wire::Frame hello;
    {
      const std::lock_guard<std::mutex> lock(guarded_.mutex);
      hello = guarded_.session.hello();
    }
    write(std::move(hello));
    read();
  }

  void write(wire::Frame frame) {
    writing_ = true;
    frame_ = std::move(frame);
    std::vector<net::const_buffer> buffers{net::buffer(frame_.head)};
    for (const wire::Piece& piece : frame_.body) buffers.push_back(net::buffer(*piece));
    socket_.async_write(buffers, [self = shared_from_this()](beast::error_code error, std::size_t) {
      self->writing_ = false;
      if (!self->failed(error, "cannot send")) self->pump();
    });
  }

  void read() {
    socket_.async_read(buffer_,
                       [self = shared_from_this()](beast::error_code error, std::size_t) { self->on_read(error); });
  }

  void on_read(beast::error_code error) {
    if (over_) return;
    if (error == beast::websocket::error::closed) return end(closed());
    if (error == beast::websocket::error::message_too_big || error == beast::websocket::error::buffer_overflow) {
      return end({Ending::Kind::malformed,
                  "a message is larger than " + std::to_string(options_.max_message_bytes) + " bytes"});
    }
    // What is left of websocket errors, timeouts aside, is frames that break the websocket protocol itself.
    if (error == beast::websocket::condition::protocol_violation) {
      return end({Ending::Kind::malformed, "a frame breaks the websocket protocol: " + error.message()});
    }
    if (failed(error, "the connection broke")) return;
    try {
      if (!socket_.got_binary()) throw MalformedMessage("a text frame came, expected binary ones");
      const auto frame = buffer_.cdata();
      const TimePoint now = Clock::now();
      wire::ServerMessage message = wire::read(static_cast<const char*>(frame.data()), frame.size(), now);
      const std::lock_guard<std::mutex> lock(guarded_.mutex);
      guarded_.session.receive(std::move(message), now);
      if (guarded_.session.open() && !open_ && !leaving_) {
        open_ = true;
        lift_limit();
      }
    } catch (const MalformedMessage& malformed) {
      return close_as_malformed(malformed.what());
    }
    buffer_.consume(buffer_.size());
    received_();
    pump();
    read();
  }

  void close_as_malformed(const std::string& reason) {
    closing_ = true;
    const Ending ending{Ending::Kind::malformed, reason};
    limit(options_.close_timeout, ending);
    socket_.async_close({CloseCode::protocol_error, reason.substr(0, kLongestReason)},
                        [self = shared_from_this(), ending](beast::error_code) { self->end(ending); });
  }

  Ending closed() const {
    const auto& reason = socket_.reason();
    const unsigned code = reason.code;
    const std::string text = "the server closed with " + std::to_string(code) + " " + reason.reason.c_str();
    if (code == kTakenOver) return {Ending::Kind::taken_over, text};
    return {code == CloseCode::policy_error ? Ending::Kind::refused : Ending::Kind::lost, text};
  }

  /// Return whether there is nothing to go on with, and end if this is how one learns it.
  bool failed(beast::error_code error, const char* what) {
    if (over_ || closing_) return true;
    if (error) end({Ending::Kind::lost, std::string(what) + ": " + error.message()});
    return over_;
  }

  static std::string path(const std::string& policy) {
    constexpr char kDigits[] = "0123456789ABCDEF";
    std::string escaped;
    for (const unsigned char letter : policy) {
      const bool plain = (letter >= 'a' && letter <= 'z') || (letter >= 'A' && letter <= 'Z') ||
                         (letter >= '0' && letter <= '9') || letter == '-' || letter == '_' || letter == '.';
      if (plain) {
        escaped += static_cast<char>(letter);
      } else {
        escaped += {'%', kDigits[letter / 16], kDigits[letter % 16]};
      }
    }
    return "/v1/policies/" + escaped + "/stream";
  }

  static constexpr std::size_t kWriteBuffer = 64 * 1024;
  static constexpr std::size_t kLongestText = 300;    // of a refusal's body
  static constexpr std::size_t kLongestReason = 120;  // of a close frame, where 123 bytes have room
  static constexpr unsigned kTakenOver = 4001;

  GuardedSession& guarded_;
  const StreamOptions& options_;
  std::function<void()> received_;
  std::function<void(Ending)> ended_;
  net::ip::tcp::resolver resolver_;
  net::steady_timer limit_;
  Socket socket_;
  beast::websocket::response_type response_;
  beast::flat_buffer buffer_;
  std::uint64_t limits_ = 0;
  wire::Frame frame_;     // being sent
  bool open_ = false;     // welcomed, and not yet said bye
  bool writing_ = false;  // a message is being sent
  bool closing_ = false;  // with 1002
  bool leaving_ = false;
  bool over_ = false;
};

}  // namespace policy::detail
