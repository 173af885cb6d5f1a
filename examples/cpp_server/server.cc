// Embeds token ids for clients of a Unix socket, with the funnel engine inside. README.md has usage and protocol.
//
// One thread, that of main, accepts, reads and writes; none of its steps waits for a client or for the model. One more
// thread runs the model.

#include <signal.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <sys/socket.h>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <list>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "connection.h"
#include "listener.h"
#include "service.h"

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::seconds;

constexpr char kUsage[] =
    "usage: funnel_server [options] CHECKPOINT SOCKET\n"
    "  --batch-tokens N   tokens that a batch may gather (default 4096)\n"
    "  --queue N          requests that may wait before others are refused (default 64)\n"
    "  --connections N    clients at a time (default 256)\n"
    "  --timeout SECONDS  for a client to send a whole request, or to read a whole answer (default 30)\n"
    "  --options JSON     options of the engine, see funnel_options in funnel.h";

Settings parse(int argc, char** argv) {
  Settings settings;
  const std::map<std::string, size_t*> numbers = {{"--batch-tokens", &settings.batch_tokens},
                                                  {"--queue", &settings.queue},
                                                  {"--connections", &settings.connections},
                                                  {"--timeout", &settings.timeout}};
  for (; argc > 4; argc -= 2, argv += 2) {  // every option has a value
    const std::string name = argv[1], value = argv[2];
    const auto found = numbers.find(name);
    if (found != numbers.end()) {
      const bool digits = !value.empty() && value.size() < 7 && value.find_first_not_of("0123456789") == value.npos;
      *found->second = digits ? std::stoul(value) : 0;
      if (*found->second == 0) throw std::invalid_argument(name + " is " + value + "; give a number of 1 ... 999999");
    } else if (name == "--options") {
      settings.options = value;
    } else {
      throw std::invalid_argument(kUsage);
    }
  }
  if (argc != 3) throw std::invalid_argument(kUsage);
  settings.checkpoint = argv[1];
  settings.socket = argv[2];
  return settings;
}

// Blocks SIGTERM and SIGINT in this thread, and so in all that it starts; returns a descriptor that reads them.
int block_signals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  signal(SIGPIPE, SIG_IGN);  // a client that has left makes send fail, and does not end the server
  return signalfd(-1, &signals, SFD_CLOEXEC);
}

int checked(int descriptor) {
  if (descriptor < 0) fail("cannot make a descriptor");
  return descriptor;
}

class Server {
 public:
  explicit Server(const Settings& settings)
      : settings_(settings),
        signals_(checked(block_signals())),
        wake_(checked(eventfd(0, EFD_CLOEXEC))),
        listener_(std::in_place, settings.socket),
        service_(settings, [this] { eventfd_write(wake_, 1); }) {}

  // Serves until a signal ends it. Then it takes no more requests, and answers those that have arrived, for at most ten
  // seconds. Deadlines are looked at twice a second.
  void run() {
    while (!ending() || (!connections_.empty() && Clock::now() < end_)) {
      if (service_.loading() && Clock::now() >= next_report_) {
        std::fprintf(stderr, "not ready yet\n");
        next_report_ += seconds(10);
      }
      const bool accepting = !ending() && Clock::now() >= next_accept_;
      std::vector<pollfd> events = {
          {signals_, POLLIN, 0}, {wake_, POLLIN, 0}, {accepting ? listener_->descriptor() : -1, POLLIN, 0}};
      for (const Connection& connection : connections_) events.push_back(connection.interest());
      if (poll(events.data(), events.size(), 500) < 0 && errno != EINTR) fail("cannot poll");
      if (events[1].revents != 0) wake();
      auto event = events.begin() + 3;
      connections_.remove_if([&](Connection& c) { return !c.advance((event++)->revents != 0, service_); });
      if (events[2].revents != 0) accept_client();
      if (events[0].revents != 0) end();
    }
    std::printf("%s\n", service_.stats().c_str());
    if (!connections_.empty()) {
      std::fprintf(stderr, "clients that have not read all their answers: %zu\n", connections_.size());
      std::fflush(stdout);
      std::_Exit(0);  // does not wait for a batch that still runs
    }
  }

 private:
  bool ending() const { return !listener_; }

  // The model is loaded, or answers are ready.
  void wake() {
    eventfd_t count;
    eventfd_read(wake_, &count);
    if (!service_.loading()) return;
    service_.finish_loading();
    std::printf("ready on %s\n", settings_.socket.c_str());
    std::fflush(stdout);
  }

  void accept_client() {
    const int client = accept4(listener_->descriptor(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (client >= 0) {
      connections_.emplace_back(client, seconds(settings_.timeout));
      if (connections_.size() <= settings_.connections) return;
      connections_.back().reply({Code::kBusy, {}, std::to_string(settings_.connections) + " clients; try again later"});
      connections_.pop_back();
    } else if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED) {
      std::fprintf(stderr, "cannot accept a client: %s; the next try is in a second\n", std::strerror(errno));
      next_accept_ = Clock::now() + seconds(1);
    }
  }

  // A second signal does not wait any more.
  void end() {
    signalfd_siginfo info;
    if (read(signals_, &info, sizeof info) < 0) fail("cannot read a signal");
    end_ = Clock::now() + seconds(ending() ? 0 : 9);
    listener_.reset();
    if (service_.loading()) std::_Exit(0);  // there is nothing to answer, and no way to stop the compiler
    for (Connection& connection : connections_) connection.finish();
  }

  const Settings settings_;
  const int signals_, wake_;  // open until the process ends
  Clock::time_point next_report_ = Clock::now() + seconds(10), next_accept_, end_;
  std::optional<Listener> listener_;  // none once the end has begun
  std::list<Connection> connections_;
  Service service_;
};

}  // namespace

int main(int argc, char** argv) {
  try {
    Server(parse(argc, argv)).run();
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
