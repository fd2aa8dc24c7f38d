// A control loop of 50 ticks a second that plays a policy's actions and prints them.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "policy_client/policy_stream.hpp"

namespace {

constexpr char kHelp[] = R"(Drive a robot that always sees the same, and print the action of each tick.

usage: drive [--option value ...]

  --host NAME           of the server (127.0.0.1)
  --port NUMBER         of the server (8000)
  --policy NAME         (point-maze)
  --api-key KEY         (the environment's POLICY_API_KEY)
  --vector NAME=1,2,3   an input of numbers; may be given again (state=0,0,0,0 and goal=1,1,0,0)
  --text NAME=WORDS     an input of words; may be given again
  --continuity MODE     replace, rtc, ensemble or warm (the server's choice)
  --deadline-ms NUMBER  a chunk later than this is worthless (none)
  --rate-hz NUMBER      ticks a second (50)
  --ticks NUMBER        then stop (500)
)";

struct Arguments {
  policy::StreamOptions stream;
  policy::Observation observation;
  double rate_hz = 50;
  long ticks = 500;
};

double number(const std::string& text) {
  std::size_t end = 0;
  const double value = std::stod(text, &end);
  if (end != text.size()) throw std::invalid_argument("'" + text + "' is no number");
  return value;
}

std::pair<std::string, std::string> named(const std::string& text) {
  const std::size_t equals = text.find('=');
  if (equals == std::string::npos) throw std::invalid_argument("'" + text + "' is not NAME=VALUE");
  return {text.substr(0, equals), text.substr(equals + 1)};
}

std::vector<float> numbers(const std::string& text) {
  std::vector<float> values;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t comma = std::min(text.find(',', begin), text.size());
    values.push_back(static_cast<float>(number(text.substr(begin, comma - begin))));
    begin = comma + 1;
  }
  return values;
}

Arguments parse(const std::vector<std::string>& words) {
  Arguments arguments;
  arguments.stream.policy = "point-maze";
  arguments.stream.name = "drive";
  if (const char* key = std::getenv("POLICY_API_KEY")) arguments.stream.api_key = key;
  for (std::size_t i = 0; i < words.size(); i += 2) {
    const std::string& option = words[i];
    if (i + 1 == words.size()) throw std::invalid_argument(option + " wants a value; --help says which");
    const std::string& value = words[i + 1];
    if (option == "--host") {
      arguments.stream.host = value;
    } else if (option == "--port") {
      arguments.stream.port = static_cast<std::uint16_t>(number(value));
    } else if (option == "--policy") {
      arguments.stream.policy = value;
    } else if (option == "--api-key") {
      arguments.stream.api_key = value;
    } else if (option == "--vector") {
      arguments.observation.vector(named(value).first, numbers(named(value).second));
    } else if (option == "--text") {
      arguments.observation.text(named(value).first, named(value).second);
    } else if (option == "--continuity") {
      arguments.stream.continuity = value;
    } else if (option == "--deadline-ms") {
      arguments.stream.deadline = policy::Milliseconds(number(value));
    } else if (option == "--rate-hz") {
      arguments.rate_hz = number(value);
    } else if (option == "--ticks") {
      arguments.ticks = static_cast<long>(number(value));
    } else {
      throw std::invalid_argument("there is no " + option + "; --help says what there is");
    }
  }
  if (!(arguments.rate_hz > 0)) throw std::invalid_argument("--rate-hz wants a number above 0");
  if (arguments.observation.inputs().empty()) {
    arguments.observation.vector("state", {0, 0, 0, 0}).vector("goal", {1, 1, 0, 0});
  }
  return arguments;
}

void print(long tick, const policy::Action& action, bool held) {
  std::printf("%6ld %s", tick, held ? "hold" : "play");
  for (const float value : action) std::printf(" %9.4f", static_cast<double>(value));
  std::printf("\n");
}

void drive(const Arguments& arguments) {
  using policy::Clock;
  policy::PolicyStream stream(arguments.stream);

  // Before the first chunk there is nothing to play or to hold: a robot that stands still may well wait.
  std::optional<policy::Action> last;
  const auto tick_time = std::chrono::duration_cast<Clock::duration>(policy::Seconds(1 / arguments.rate_hz));
  long played = 0, held = 0, idle = 0;
  std::vector<double> ages_ms;
  std::uint64_t newest = 0;
  auto due = Clock::now();
  for (long tick = 0; tick < arguments.ticks; ++tick) {
    stream.send(arguments.observation, due);
    const auto chunk = stream.latest();
    if (chunk && chunk->seq != newest) {
      newest = chunk->seq;
      ages_ms.push_back(policy::Milliseconds(chunk->received - chunk->captured).count());
    }
    const auto action = chunk ? chunk->action_at(due) : std::nullopt;
    if (action) {
      ++played;
      last = action;
    } else if (last) {
      ++held;  // repeating the last action is right for positions; for velocities, send zeros here
    } else {
      ++idle;
    }
    if (last) print(tick, *last, !action);
    due += tick_time;
    std::this_thread::sleep_until(due);
  }

  const policy::Counters counters = stream.counters();
  std::printf("\n%ld ticks: %ld played, %ld held, %ld before the first chunk\n", arguments.ticks, played, held, idle);
  std::printf("%llu observations sent, %llu replaced by newer ones, %llu dropped\n",
              static_cast<unsigned long long>(counters.observations_sent),
              static_cast<unsigned long long>(counters.observations_replaced),
              static_cast<unsigned long long>(counters.observations_dropped));
  std::printf("%llu chunks, %llu errors, %llu connections, %llu of them resumed\n",
              static_cast<unsigned long long>(counters.chunks), static_cast<unsigned long long>(counters.server_errors),
              static_cast<unsigned long long>(counters.connections), static_cast<unsigned long long>(counters.resumes));
  if (!ages_ms.empty()) {
    std::sort(ages_ms.begin(), ages_ms.end());
    std::printf("from capture to chunk: median %.2f ms, longest %.2f ms\n", ages_ms[ages_ms.size() / 2],
                ages_ms.back());
  }
  if (const auto error = stream.last_error()) {
    std::printf("last error: %s: %s\n", error->code.c_str(), error->message.c_str());
  }
}

}  // namespace

int main(int count, char** values) {
  const std::vector<std::string> words(values + 1, values + count);
  if (std::find(words.begin(), words.end(), "--help") != words.end()) {
    std::fputs(kHelp, stdout);
    return 0;
  }
  try {
    drive(parse(words));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "drive: %s\n", error.what());
    return 2;
  }
  return 0;
}
