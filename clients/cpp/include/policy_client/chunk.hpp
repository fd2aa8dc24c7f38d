/// The chunk: a run of future actions predicted from one observation.
///
/// Letters as everywhere in this project: H action horizon, A action width.
#pragma once

#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace policy {

/// The only clock that is used: monotonic, never compared with another machine's.
using Clock = std::chrono::steady_clock;
using TimePoint = Clock::time_point;
using Seconds = std::chrono::duration<double>;
using Milliseconds = std::chrono::duration<double, std::milli>;

/// One action, (A,) float32 in the robot's own units.
///
/// A view that keeps its chunk's numbers alive: it costs no allocation, and may outlive the chunk and the stream.
class Action {
 public:
  Action(std::shared_ptr<const float> values, std::size_t width) : values_(std::move(values)), width_(width) {}

  const float* data() const { return values_.get(); }
  std::size_t size() const { return width_; }
  const float* begin() const { return data(); }
  const float* end() const { return data() + width_; }
  /// Return component `index`, which must be below `size()`.
  float operator[](std::size_t index) const { return values_.get()[index]; }
  std::vector<float> to_vector() const { return {begin(), end()}; }

 private:
  std::shared_ptr<const float> values_;
  std::size_t width_;
};

/// What the server took for one chunk, in milliseconds; 0 for what it did not say.
struct Timings {
  double received_ms = 0;  // from capture to arrival, by the server's estimate of the robot's clock
  double waited_ms = 0;    // for a turn
  double infer_ms = 0;
  double total_ms = 0;  // from capture to sending
};

/// How a chunk goes on from the one before.
struct Continuation {
  std::string mode = "replace";
  std::uint64_t frozen = 0;   // rows that were held to the chunk being played
  std::uint64_t overlap = 0;  // rows that both chunks have
  double delay_ms = 0;        // from capture to the first row played, as the server took it
};

/// A run of future actions predicted from one observation. Never changed once it is received: threads may share it.
struct Chunk {
  std::uint64_t seq = 0;  // of the observation that it answers
  std::uint64_t episode = 0;
  TimePoint captured;                                // when that observation was true: row 0 is due then
  TimePoint received;                                // when the chunk arrived here
  std::shared_ptr<const std::vector<float>> values;  // H * A numbers in C order
  std::size_t horizon = 0;                           // H, above 0
  std::size_t width = 0;                             // A, above 0
  Seconds step{0};                                   // time between consecutive actions, above 0

  std::optional<std::uint64_t> seed;  // gives this chunk again
  std::string policy, version, engine;
  std::uint64_t superseded = 0;  // observations of this session that were given up for a newer one
  std::uint64_t stale = 0;       // observations of this session that came twice or late
  Timings timings;
  Continuation continuity;
  std::uint64_t clamped = 0;  // components that the server's guard brought back into the policy's range
  std::string fallback;       // what the guard sent in place of the policy's actions; empty if it did not

  /// Return row `index`, which must be below `horizon`.
  Action row(std::size_t index) const { return {{values, values->data() + index * width}, width}; }

  /// Return the action due at `now`, or nothing before the first row and after the last has been held for its step.
  std::optional<Action> action_at(TimePoint now) const {
    // Ticks that fall on a step must not land just before it for want of a float's last digits.
    constexpr double kRoundingSteps = 1e-6;
    const double index = std::floor(Seconds(now - captured) / step + kRoundingSteps);
    if (!(index >= 0 && index < static_cast<double>(horizon))) return std::nullopt;
    return row(static_cast<std::size_t>(index));
  }

  /// Return for how long from `now` on actions will be due, 0 if none is.
  Seconds remaining(TimePoint now) const {
    const Seconds left = static_cast<double>(horizon) * step - Seconds(now - captured);
    return left > Seconds(0) ? left : Seconds(0);
  }
};

}  // namespace policy
