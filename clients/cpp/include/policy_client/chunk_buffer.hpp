/// The newest chunk, whatever order chunks come in.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>

#include "policy_client/chunk.hpp"

namespace policy {

/// Holds the newest chunk of the present episode. The clock is an argument. Not for several threads.
class ChunkBuffer {
 public:
  /// Take `chunk` for the one held and return true; or false if it is a duplicate, older, or of another episode.
  bool push(std::shared_ptr<const Chunk> chunk) {
    if (chunk->episode != episode_ || chunk->seq <= newest_seq_) return false;
    newest_seq_ = chunk->seq;
    chunk_ = std::move(chunk);
    return true;
  }

  /// Forget the chunk, and take none but those of `episode` from now on.
  void begin_episode(std::uint64_t episode) {
    episode_ = episode;
    chunk_ = nullptr;
  }

  /// Return the chunk held, or null.
  const std::shared_ptr<const Chunk>& latest() const { return chunk_; }

  /// Return the action due at `now`, or nothing before any chunk and once it has run out.
  std::optional<Action> action_at(TimePoint now) const { return chunk_ ? chunk_->action_at(now) : std::nullopt; }

  /// Return for how long from `now` on actions will be due, 0 if none is.
  Seconds remaining(TimePoint now) const { return chunk_ ? chunk_->remaining(now) : Seconds(0); }

 private:
  std::shared_ptr<const Chunk> chunk_;
  std::uint64_t episode_ = 0;
  std::uint64_t newest_seq_ = 0;
};

}  // namespace policy
