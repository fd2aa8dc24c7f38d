// A robot on a leash: does what it reads, a command a line, and answers each with one line.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "policy_client/policy_stream.hpp"

namespace {

constexpr std::chrono::seconds kPatience(20);

policy::StreamOptions read_options(int count, char** values) {
  policy::StreamOptions options;
  options.backoff = {policy::Seconds(0.02), 2, policy::Seconds(0.2), 0.5};
  options.silence_timeout = std::chrono::seconds(2);
  options.close_timeout = std::chrono::milliseconds(100);
  for (int i = 1; i + 1 < count; i += 2) {
    const std::string name = values[i], value = values[i + 1];
    if (name == "host") options.host = value;
    if (name == "port") options.port = static_cast<std::uint16_t>(std::stoi(value));
    if (name == "policy") options.policy = value;
    if (name == "api_key") options.api_key = value;
    if (name == "name") options.name = value;
    if (name == "rate_hz") options.rate_hz = std::stod(value);
    if (name == "deadline_ms") options.deadline = policy::Milliseconds(std::stod(value));
    if (name == "close_ms") options.close_timeout = std::chrono::milliseconds(std::stoi(value));
    if (name == "continuity") options.continuity = value;
    if (name == "max_message_bytes") options.max_message_bytes = std::stoul(value);
  }
  return options;
}

std::string rest(std::istream& words) {
  std::string text;
  std::getline(words >> std::ws, text);
  return text;
}

std::vector<double> numbers(std::istream& words) {
  std::vector<double> values;
  for (double value = 0; words >> value;) values.push_back(value);
  return values;
}

/// A line in JSON, as far as these answers need it.
class Line {
 public:
  Line& add(const char* key, const std::string& value) {
    begin(key) << '"';
    for (const char letter : value) {
      if (letter == '"' || letter == '\\') text_ << '\\';
      text_ << (static_cast<unsigned char>(letter) < 0x20 ? ' ' : letter);
    }
    text_ << '"';
    return *this;
  }
  Line& add(const char* key, double value) {
    char digits[32];
    std::snprintf(digits, sizeof digits, "%.17g", value);
    begin(key) << digits;
    return *this;
  }
  Line& add(const char* key, std::uint64_t value) {
    begin(key) << value;
    return *this;
  }
  Line& add(const char* key, const policy::Action& action) {
    begin(key) << '[';
    for (std::size_t i = 0; i < action.size(); ++i) {
      char digits[32];
      std::snprintf(digits, sizeof digits, "%s%.8e", i ? ", " : "", static_cast<double>(action[i]));
      text_ << digits;
    }
    text_ << ']';
    return *this;
  }
  std::string str() const { return "{" + text_.str() + "}"; }

 private:
  std::ostream& begin(const char* key) {
    if (text_.tellp() > 0) text_ << ", ";
    return text_ << '"' << key << "\": ";
  }
  std::ostringstream text_;
};

Line describe(const policy::Chunk& chunk) {
  Line line;
  line.add("seq", chunk.seq).add("episode", chunk.episode).add("horizon", std::uint64_t{chunk.horizon});
  line.add("step_s", chunk.step.count()).add("policy", chunk.policy).add("mode", chunk.continuity.mode);
  line.add("frozen", chunk.continuity.frozen).add("infer_ms", chunk.timings.infer_ms);
  line.add("captured_ns", static_cast<std::uint64_t>(policy::wire::nanoseconds(chunk.captured)));
  line.add("first", chunk.row(0)).add("last", chunk.row(chunk.horizon - 1));
  return line;
}

Line describe(const policy::Counters& counters) {
  Line line;
  line.add("sent", counters.observations_sent).add("replaced", counters.observations_replaced);
  line.add("dropped", counters.observations_dropped).add("chunks", counters.chunks);
  line.add("chunks_ignored", counters.chunks_ignored).add("server_errors", counters.server_errors);
  line.add("protocol_errors", counters.protocol_errors).add("pings", counters.pings);
  line.add("connections", counters.connections).add("resumes", counters.resumes).add("failures", counters.failures);
  return line;
}

std::string obey(policy::PolicyStream& stream, const std::string& command, std::istream& words) {
  using policy::Observation;
  if (command == "send") {  // a state of these numbers
    return Line().add("seq", stream.send(Observation().vector("state", numbers(words)))).str();
  }
  if (command == "send_image") {  // of this height and width, every byte its place modulo 251
    std::size_t height = 0, width = 0;
    words >> height >> width;
    std::vector<std::uint8_t> rgb(height * width * 3);
    for (std::size_t i = 0; i < rgb.size(); ++i) rgb[i] = static_cast<std::uint8_t>(i % 251);
    return Line().add("seq", stream.send(Observation().image("top", rgb, height, width))).str();
  }
  if (command == "send_with") {  // a delay in ms, a seed, a state
    policy::Moment moment;
    double delay_ms = 0;
    int seed = 0;
    words >> delay_ms >> seed;
    moment.delay = policy::Milliseconds(delay_ms);
    moment.sampling.with("seed", seed);
    return Line().add("seq", stream.send(Observation().vector("state", numbers(words)), std::move(moment))).str();
  }
  if (command == "set") {  // a prompt
    stream.set(Observation().text("prompt", rest(words)), policy::Settings().with("steps", 5));
    return "{}";
  }
  if (command == "reset") return Line().add("episode", stream.reset()).str();
  if (command == "cancel") return stream.cancel(), "{}";
  if (command == "wait_open") return Line().add("open", std::uint64_t{stream.wait_open(kPatience)}).str();
  if (command == "wait_chunk") {  // that answers this or a later observation
    std::uint64_t seq = 1;
    words >> seq;
    const auto chunk = stream.wait_for_chunk(kPatience, seq);
    return chunk ? describe(*chunk).str() : "null";
  }
  if (command == "latest") {
    const auto chunk = stream.latest();
    return chunk ? describe(*chunk).str() : "null";
  }
  if (command == "row") {  // due so many ms after the newest chunk's capture
    double after_ms = 0;
    words >> after_ms;
    const auto chunk = stream.latest();
    const auto after = std::chrono::duration_cast<policy::Clock::duration>(policy::Milliseconds(after_ms));
    const auto action = chunk ? chunk->action_at(chunk->captured + after) : std::nullopt;
    return action ? Line().add("action", *action).str() : "null";
  }
  if (command == "state") return Line().add("state", policy::to_string(stream.state())).str();
  if (command == "counters") return describe(stream.counters()).str();
  if (command == "error") {
    const auto error = stream.last_error();
    if (!error) return "null";
    return Line().add("code", error->code).add("message", error->message).add("seq", error->seq).str();
  }
  if (command == "welcome") {
    const auto welcome = stream.welcome();
    if (!welcome) return "null";
    return Line().add("session", welcome->session).add("policy", welcome->policy).add("resume", welcome->resume).str();
  }
  return Line().add("unknown", command).str();
}

}  // namespace

int main(int count, char** values) {
  std::chrono::steady_clock::time_point ends;
  try {
    policy::PolicyStream stream(read_options(count, values));
    for (std::string line; std::getline(std::cin, line);) {
      std::istringstream words(line);
      std::string command;
      words >> command;
      if (command == "quit") break;
      std::cout << obey(stream, command, words) << std::endl;
    }
    ends = policy::Clock::now();
  } catch (const std::exception& error) {
    std::cerr << error.what() << std::endl;
    return 2;
  }
  std::cout << Line().add("ended_in_ms", policy::Milliseconds(policy::Clock::now() - ends).count()).str() << std::endl;
  return 0;
}
