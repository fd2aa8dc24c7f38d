/// What a stream is told once, at its beginning.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

#include "policy_client/chunk.hpp"
#include "policy_client/observation.hpp"

namespace policy {

/// Pauses between attempts to connect: each `factor` times the one before, up to `longest`.
///
/// Each pause is cut by a random share of up to `jitter`, so that robots cut off together come back one by one.
struct Backoff {
  Seconds first{0.1};
  double factor = 2;
  Seconds longest{2};
  double jitter = 0.5;

  /// Return the pause after `failures` attempts in a row that failed; `random` lies in [0, 1).
  Seconds pause(std::size_t failures, double random) const {
    const double exponent = static_cast<double>(std::min<std::size_t>(failures, 64));
    return std::min(longest, first * std::pow(factor, exponent)) * (1 - jitter * random);
  }
};

/// Where the server is, what is asked of it, and how patient to be. An aggregate: C++20 may name its members.
struct StreamOptions {
  std::string host = "127.0.0.1";  // a name or an address
  std::uint16_t port = 8000;
  std::string policy;   // required: the policy's name at the server
  std::string api_key;  // empty for none

  std::string name;                      // what logs and metrics of the server call this robot, up to 64 characters
  std::optional<double> rate_hz;         // observations a second that shall be answered; nothing is promised without it
  std::optional<Milliseconds> deadline;  // a chunk that comes later than this after its capture is worthless
  Settings sampling;                     // sampling options of all observations that bring none
  std::string continuity;                // "replace", "rtc", "ensemble" or "warm"; empty leaves it to the server
  Settings continuity_keys;              // the mode's own keys

  std::chrono::milliseconds connect_timeout{5000};  // for one attempt, from the name's resolution to the welcome
  std::chrono::milliseconds silence_timeout{5000};  // a server that says nothing for so long, pongs included, is gone
  std::chrono::milliseconds close_timeout{500};     // how long the destructor waits for the server to take leave
  Backoff backoff;
  std::size_t max_message_bytes = std::size_t{4}
                                  << 20;  // of a message from the server; a larger one ends the connection

  /// Raises std::invalid_argument for what cannot be right, and says what was expected.
  void check() const {
    const auto wants = [](bool right, const char* what) {
      if (!right) throw std::invalid_argument(what);
    };
    const auto printable = [](const std::string& text) {
      return std::all_of(text.begin(), text.end(), [](unsigned char letter) { return letter > 0x20 && letter < 0x7f; });
    };
    wants(!policy.empty(), "policy is empty, expected the name of a policy at the server");
    wants(!host.empty() && printable(host), "host is empty or holds blanks, expected a name or an address");
    wants(printable(api_key), "api_key holds blanks or letters beyond ASCII");
    wants(name.size() <= 64, "name is longer than 64 characters");
    wants(!rate_hz || (std::isfinite(*rate_hz) && *rate_hz > 0), "rate_hz is not a positive number");
    wants(!deadline || deadline->count() > 0, "deadline is not positive");
    wants(continuity_keys.empty() || !continuity.empty(), "continuity_keys are given without a continuity");
    wants(connect_timeout.count() > 0 && silence_timeout.count() > 0 && close_timeout.count() >= 0,
          "a timeout is not positive");
    wants(backoff.first.count() > 0 && backoff.factor >= 1 && backoff.longest >= backoff.first && backoff.jitter >= 0 &&
              backoff.jitter <= 1,
          "backoff wants first > 0, factor >= 1, longest >= first and 0 <= jitter <= 1");
  }
};

}  // namespace policy
