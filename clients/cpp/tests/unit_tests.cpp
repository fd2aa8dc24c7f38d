// The bytes, the chunk buffer and the session, without a socket.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <chrono>
#include <cstdint>
#include <limits>
#include <memory>
#include <msgpack.hpp>
#include <random>
#include <string>
#include <vector>

#include "policy_client/chunk_buffer.hpp"
#include "policy_client/message.hpp"
#include "policy_client/server_message.hpp"
#include "policy_client/session.hpp"

using namespace policy;
using namespace std::chrono_literals;

namespace {

const TimePoint kStart = TimePoint(1'000'000s);

/// The bytes between the quotes, zeros included.
template <std::size_t Size>
std::string literal(const char (&text)[Size]) {
  return {text, Size - 1};
}

std::string bytes(const wire::Frame& frame) {
  std::string whole = frame.head;
  for (const wire::Piece& piece : frame.body) whole += *piece;
  return whole;
}

/// Holds a message's bytes for as long as its fields are looked at.
struct Sent {
  std::string whole;
  msgpack::object_handle handle;
  explicit Sent(const wire::Frame& frame) : whole(bytes(frame)), handle(msgpack::unpack(whole.data(), whole.size())) {}
  wire::Fields fields() const { return wire::Fields(handle.get(), "a message"); }
  std::string type() const { return fields().text("type"); }
};

/// A chunk as the server writes it; a test changes what it wants to be wrong.
struct ChunkBytes {
  std::uint64_t seq = 1, episode = 0;
  std::int64_t captured_ns = wire::nanoseconds(kStart);
  std::vector<float> values{1.5F, -2.25F, 3.0F, 0.1F};
  std::vector<std::uint64_t> shape{2, 2};
  std::string dtype = "<f4";
  double step_s = 0.05;

  std::string pack() const {
    wire::Bytes out;
    wire::Packer packer(out);
    packer.pack_map(8);
    packer.pack(std::string("type")).pack(std::string("chunk"));
    packer.pack(std::string("seq")).pack(seq);
    packer.pack(std::string("episode")).pack(episode);
    packer.pack(std::string("captured_ns")).pack(captured_ns);
    packer.pack(std::string("actions")).pack_map(4);
    wire::pack_bytes(packer, "__ndarray__", 11);
    packer.pack_true();
    wire::pack_bytes(packer, "data", 4);
    wire::pack_bytes(packer, values.data(), values.size() * sizeof(float));
    wire::pack_bytes(packer, "dtype", 5);
    packer.pack(dtype);
    wire::pack_bytes(packer, "shape", 5);
    packer.pack(shape);
    packer.pack(std::string("step_s")).pack(step_s);
    packer.pack(std::string("seed")).pack(4711);
    packer.pack(std::string("a key of tomorrow")).pack(std::vector<int>{1, 2});
    return out.text;
  }
};

std::string welcome(bool resumed = false, std::uint64_t max_message_bytes = 1 << 20) {
  wire::MessageWriter writer("welcome", 5);
  writer.with("protocol", 1).with("session", std::string("5f0c")).with("resume", std::string("token"));
  return writer.with("resumed", resumed).with("max_message_bytes", max_message_bytes).finish().head;
}

std::string error(const std::string& code, std::uint64_t seq) {
  return wire::MessageWriter("error", 3)
      .with("code", code)
      .with("message", std::string("why"))
      .with("seq", seq)
      .finish()
      .head;
}

wire::ServerMessage read(const std::string& message) {
  return wire::read(message.data(), message.size(), kStart);
}

void receive(Session& session, const std::string& message) {
  session.receive(read(message), kStart);
}

std::shared_ptr<const Chunk> chunk(std::uint64_t seq, TimePoint captured = kStart, std::uint64_t episode = 0) {
  ChunkBytes wanted;
  wanted.seq = seq;
  wanted.episode = episode;
  wanted.captured_ns = wire::nanoseconds(captured);
  return std::make_shared<const Chunk>(std::get<Chunk>(read(wanted.pack())));
}

StreamOptions options() {
  StreamOptions options;
  options.policy = "tiny";
  return options;
}

Session open_session(StreamOptions with = options()) {
  Session session(std::move(with));
  receive(session, welcome());
  return session;
}

std::uint64_t observe(Session& session, TimePoint captured = kStart) {
  return session.observe(Observation().vector("state", {0.5}), captured, {}, {});
}

}  // namespace

TEST_CASE("an array goes out byte for byte as openpi's clients write it") {
  const Observation observation = Observation().vector("state", std::vector<float>{1.0F, -2.0F});
  const std::string wanted = literal(
      "\xa5state\x84\xc4\x0b__ndarray__\xc3\xc4\x04"
      "data\xc4\x08\x00\x00\x80\x3f\x00\x00\x00\xc0\xc4\x05"
      "dtype\xa3<f4\xc4\x05shape\x91\x02");
  REQUIRE(observation.inputs().size() == 1);
  CHECK(*observation.inputs()[0].bytes == wanted);
}

TEST_CASE("an input that is given again replaces the one of its name") {
  Observation observation = Observation().vector("state", {1.0}).text("prompt", "open");
  observation.text("prompt", "close");
  REQUIRE(observation.inputs().size() == 2);
  CHECK(observation.inputs()[1].bytes->find("close") != std::string::npos);
}

TEST_CASE("an image of the wrong size is refused where it is given") {
  CHECK_THROWS_AS(Observation().image("top", std::vector<std::uint8_t>(11), 2, 2), std::invalid_argument);
  CHECK(Observation().image("top", std::vector<std::uint8_t>(12), 2, 2).inputs().size() == 1);
}

TEST_CASE("options that cannot be right are refused") {
  StreamOptions wrong = options();
  wrong.api_key = "key\r\nX-Other: 1";
  CHECK_THROWS_AS(wrong.check(), std::invalid_argument);
  wrong = options();
  wrong.policy.clear();
  CHECK_THROWS_AS(wrong.check(), std::invalid_argument);
  wrong = options();
  wrong.rate_hz = -1;
  CHECK_THROWS_AS(wrong.check(), std::invalid_argument);
  CHECK_NOTHROW(options().check());
}

TEST_CASE("hello holds what was asked for, and nothing else") {
  CHECK(bytes(wire::hello(options(), "")) == "\x82\xa4type\xa5hello\xa8protocol\x01");
  StreamOptions all = options();
  all.name = "arm";
  all.rate_hz = 20;
  all.deadline = 150ms;
  all.sampling.with("steps", 5);
  all.continuity = "rtc";
  all.continuity_keys.with("schedule", "linear");
  const Sent hello(wire::hello(all, "token"));
  CHECK(hello.fields().text("name") == "arm");
  CHECK(hello.fields().text("resume") == "token");
  CHECK(hello.fields().number("rate_hz") == 20);
  CHECK(hello.fields().number("deadline_ms") == 150);
  CHECK(hello.fields().map_if_any("options")->natural("steps") == 5);
  CHECK(hello.fields().map_if_any("continuity")->text("mode") == "rtc");
  CHECK(hello.fields().map_if_any("continuity")->text("schedule") == "linear");
}

TEST_CASE("a chunk is read as it was written") {
  const auto read_back = chunk(1);
  CHECK(read_back->horizon == 2);
  CHECK(read_back->width == 2);
  CHECK(read_back->row(1).to_vector() == std::vector<float>{3.0F, 0.1F});
  CHECK(read_back->captured == kStart);
  CHECK(read_back->step == Seconds(0.05));
  CHECK(read_back->seed == 4711);
}

TEST_CASE("a chunk whose shape, dtype and data disagree is refused") {
  const auto refused = [](auto change) {
    ChunkBytes wrong;
    change(wrong);
    CHECK_THROWS_AS(read(wrong.pack()), MalformedMessage);
  };
  refused([](ChunkBytes& wrong) { wrong.shape = {2, 3}; });
  refused([](ChunkBytes& wrong) { wrong.shape = {4}; });
  refused([](ChunkBytes& wrong) { wrong.shape = {0, 2}; });
  refused([](ChunkBytes& wrong) { wrong.shape = {1, 2, 2}; });
  refused([](ChunkBytes& wrong) { wrong.shape = {std::uint64_t{1} << 63, 2}; });
  refused([](ChunkBytes& wrong) { wrong.shape = {(std::uint64_t{1} << 62) + 2, 4}; });  // wraps around to 8 numbers
  refused([](ChunkBytes& wrong) { wrong.values.clear(), wrong.shape = {0, 0}; });
  refused([](ChunkBytes& wrong) { wrong.dtype = "<f8"; });
  refused([](ChunkBytes& wrong) { wrong.dtype = "|O"; });
  refused([](ChunkBytes& wrong) { wrong.values[3] = std::numeric_limits<float>::quiet_NaN(); });
  refused([](ChunkBytes& wrong) { wrong.step_s = 0; });
  refused([](ChunkBytes& wrong) { wrong.step_s = std::numeric_limits<double>::infinity(); });
}

TEST_CASE("bytes that are no message are refused") {
  const std::string good = ChunkBytes().pack();
  for (std::size_t size = 0; size < good.size(); ++size) CHECK_THROWS_AS(read(good.substr(0, size)), MalformedMessage);
  CHECK_THROWS_AS(read(good + '\0'), MalformedMessage);
  CHECK_THROWS_AS(read("\x93\x01\x02\x03"), MalformedMessage);
  CHECK_THROWS_AS(read("\x80"), MalformedMessage);
  CHECK_THROWS_AS(read(std::string(100, '\x91')), MalformedMessage);                     // too deep
  CHECK_THROWS_AS(read(literal("\x81\xa4type\xdd\xff\xff\xff\xff")), MalformedMessage);  // claims 4 G values
  CHECK_THROWS_AS(read(literal("\x81\xa4type\xd4\x01\x00")), MalformedMessage);          // an extension
}

TEST_CASE("a message of an unknown type is let pass") {
  CHECK(std::holds_alternative<wire::Unknown>(read(bytes(wire::bye()))));
}

TEST_CASE("damaged chunks are read or refused, and nothing else happens") {
  std::mt19937 random(7);
  const std::string good = ChunkBytes().pack();
  for (int i = 0; i < 20'000; ++i) {
    std::string damaged = good;
    for (int hits = 0; hits <= i % 3; ++hits) damaged[random() % damaged.size()] = static_cast<char>(random());
    try {
      const auto message = read(damaged);
      if (const auto* read_back = std::get_if<Chunk>(&message)) {
        CHECK(read_back->values->size() == read_back->horizon * read_back->width);
      }
    } catch (const MalformedMessage&) {
    }
  }
}

TEST_CASE("row i is due from captured + i * step until the next one is") {
  const auto held = chunk(1);
  CHECK(!held->action_at(kStart - 1ms));
  CHECK((*held->action_at(kStart))[0] == 1.5F);
  CHECK((*held->action_at(kStart + 49ms))[0] == 1.5F);
  CHECK((*held->action_at(kStart + 50ms))[0] == 3.0F);
  CHECK((*held->action_at(kStart + 99ms))[0] == 3.0F);
  CHECK(!held->action_at(kStart + 100ms));
  CHECK(held->remaining(kStart + 40ms).count() == doctest::Approx(0.06));
  CHECK(held->remaining(kStart + 1h).count() == 0);
}

TEST_CASE("an action outlives its chunk") {
  auto held = chunk(1);
  const Action action = *held->action_at(kStart);
  held.reset();
  CHECK(action.to_vector() == std::vector<float>{1.5F, -2.25F});
}

TEST_CASE("the buffer holds the newest chunk of the present episode") {
  ChunkBuffer buffer;
  CHECK(!buffer.action_at(kStart));
  CHECK(buffer.push(chunk(2)));
  CHECK(!buffer.push(chunk(2)));
  CHECK(!buffer.push(chunk(1)));
  CHECK(!buffer.push(chunk(3, kStart, 1)));
  CHECK(buffer.latest()->seq == 2);
  buffer.begin_episode(1);
  CHECK(!buffer.action_at(kStart));
  CHECK(!buffer.push(chunk(4)));
  CHECK(buffer.push(chunk(5, kStart, 1)));
}

TEST_CASE("nothing is said before the welcome, and then the newest observation") {
  Session session(options());
  observe(session);
  observe(session);
  CHECK(!session.next(kStart));
  receive(session, welcome());
  const Sent sent(*session.next(kStart));
  CHECK(sent.type() == "observation");
  CHECK(sent.fields().natural("seq") == 2);
  CHECK(sent.fields().integer("captured_ns") == wire::nanoseconds(kStart));
  CHECK(session.counters().observations_replaced == 1);
  CHECK(!session.next(kStart));
}

TEST_CASE("a ping is answered before anything else is said") {
  Session session = open_session();
  observe(session);
  receive(session, wire::MessageWriter("ping", 1).with("sent_ns", std::int64_t{-5}).finish().head);
  const Sent pong(*session.next(kStart + 3ns));
  CHECK(pong.type() == "pong");
  CHECK(pong.fields().integer("sent_ns") == -5);
  CHECK(pong.fields().integer("robot_ns") == wire::nanoseconds(kStart) + 3);
  CHECK(Sent(*session.next(kStart)).type() == "observation");
}

TEST_CASE("an observation says which chunk is played while it is captured") {
  Session session = open_session();
  observe(session);
  CHECK(Sent(*session.next(kStart)).fields().natural("playing") == 0);
  receive(session, ChunkBytes().pack());
  observe(session, kStart + 60ms);
  CHECK(Sent(*session.next(kStart)).fields().natural("playing") == 1);
  observe(session, kStart + 1s);
  CHECK(Sent(*session.next(kStart)).fields().natural("playing") == 0);
}

TEST_CASE("duplicates, and chunks older than one received, are ignored and counted") {
  Session session = open_session();
  for (int i = 0; i < 3; ++i) observe(session), session.next(kStart);
  ChunkBytes second, first;
  second.seq = 2;
  for (const auto& message : {second.pack(), second.pack(), first.pack()}) receive(session, message);
  CHECK(session.chunks().latest()->seq == 2);
  CHECK(session.counters().chunks == 1);
  CHECK(session.counters().chunks_ignored == 2);
}

TEST_CASE("a chunk that answers nothing that was sent, or at another time, is malformed") {
  Session session = open_session();
  observe(session), session.next(kStart);
  ChunkBytes wrong;
  wrong.seq = 2;
  CHECK_THROWS_AS(receive(session, wrong.pack()), MalformedMessage);
  wrong = ChunkBytes();
  wrong.captured_ns = std::numeric_limits<std::int64_t>::min();
  CHECK_THROWS_AS(receive(session, wrong.pack()), MalformedMessage);
  CHECK_THROWS_AS(receive(session, welcome()), MalformedMessage);
}

TEST_CASE("a new episode plays nothing of the one before") {
  Session session = open_session();
  observe(session), session.next(kStart);
  observe(session);
  CHECK(session.reset() == 1);
  CHECK(Sent(*session.next(kStart)).type() == "reset");
  CHECK(!session.next(kStart));  // what waited in the outbox is gone
  receive(session, ChunkBytes().pack());
  CHECK(!session.chunks().latest());
  observe(session);
  CHECK(Sent(*session.next(kStart)).fields().natural("episode") == 1);
}

TEST_CASE("a set goes before the observation that relies on it, and again when the server may not have it") {
  Session session = open_session();
  observe(session);
  session.set(Observation().text("prompt", "open"), Settings().with("steps", 5));
  observe(session);
  const Sent set(*session.next(kStart));
  CHECK(set.type() == "set");
  CHECK(set.fields().map_if_any("inputs")->text("prompt") == "open");
  CHECK(Sent(*session.next(kStart)).fields().natural("revision") == 1);

  receive(session, error("unknown_revision", 2));
  CHECK(Sent(*session.next(kStart)).type() == "set");
  session.connection_ended();
  receive(session, welcome(true));
  CHECK(Sent(*session.next(kStart)).type() == "set");
  CHECK(!session.next(kStart));
}

TEST_CASE("a new connection asks for the session, and in a new session nothing is played") {
  Session session = open_session();
  observe(session), session.next(kStart);
  receive(session, ChunkBytes().pack());
  session.connection_ended();
  CHECK(Sent(session.hello()).fields().text("resume") == "token");
  observe(session);
  CHECK(!session.next(kStart));
  receive(session, welcome(false));
  observe(session, kStart + 10ms);
  CHECK(Sent(*session.next(kStart)).fields().natural("playing") == 0);
  CHECK(session.chunks().action_at(kStart + 10ms));  // the robot goes on playing all the same
}

TEST_CASE("what is cancelled, past its deadline or too big is not sent") {
  StreamOptions with_deadline = options();
  with_deadline.deadline = 100ms;
  Session session = open_session(with_deadline);
  observe(session);
  CHECK(!session.next(kStart + 101ms));
  const auto seq = observe(session);
  session.cancel(seq);
  CHECK(Sent(*session.next(kStart)).fields().natural("seq") == seq);
  CHECK(!session.next(kStart));
  CHECK(session.counters().observations_dropped == 2);

  Session narrow(options());
  receive(narrow, welcome(false, 100));
  narrow.observe(Observation().jpeg("top", std::vector<std::uint8_t>(200)), kStart, {}, {});
  CHECK(!narrow.next(kStart));
  CHECK(narrow.last_error()->code == "message_too_big");
}

TEST_CASE("an error about an observation is remembered, and the conversation goes on") {
  Session session = open_session();
  observe(session), session.next(kStart);
  receive(session, error("deadline_exceeded", 1));
  CHECK(session.last_error()->code == "deadline_exceeded");
  CHECK(session.last_error()->seq == 1);
  CHECK(session.open());
}

TEST_CASE("pauses grow to the longest, and are cut by chance") {
  const Backoff backoff;
  CHECK(backoff.pause(0, 0) == Seconds(0.1));
  CHECK(backoff.pause(3, 0).count() == doctest::Approx(0.8));
  CHECK(backoff.pause(1'000'000, 0) == Seconds(2));
  CHECK(backoff.pause(9, 0.5) == Seconds(1.5));
}
