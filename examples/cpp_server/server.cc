// Embeds token ids for clients of a Unix socket, with the funnel engine inside. README.md has usage and protocol.

#include <funnel.hpp>
#include <getopt.h>
#include <poll.h>
#include <signal.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <list>
#include <stdexcept>
#include <string>

#include "batcher.h"
#include "connection.h"

namespace {

constexpr char kUsage[] =
    "usage: funnel_server [options] CHECKPOINT SOCKET\n"
    "  --batch-tokens N   tokens that a batch may gather (default 4096)\n"
    "  --queue N          requests that may wait before others are refused (default 256)\n"
    "  --connections N    clients at a time (default 64)\n"
    "  --options JSON     options of the engine, see funnel_options in funnel.h\n";

struct Settings {
  std::string checkpoint, socket, options;
  size_t batch_tokens = 4096, queue = 256, connections = 64;
};

size_t positive(const char* name, const char* text) {
  char* end;
  const long long value = std::strtoll(text, &end, 10);
  if (*text == '\0' || *end != '\0' || value < 1) {
    throw std::invalid_argument(std::string("--") + name + " is " + text + "; give a number of at least 1");
  }
  return static_cast<size_t>(value);
}

Settings parse(int argc, char** argv) {
  Settings settings;
  const option options[] = {{"batch-tokens", required_argument, nullptr, 'b'},
                            {"queue", required_argument, nullptr, 'q'},
                            {"connections", required_argument, nullptr, 'c'},
                            {"options", required_argument, nullptr, 'o'},
                            {nullptr, 0, nullptr, 0}};
  int index = 0;
  for (int letter; (letter = getopt_long(argc, argv, "", options, &index)) != -1;) {
    if (letter == 'b') settings.batch_tokens = positive(options[index].name, optarg);
    if (letter == 'q') settings.queue = positive(options[index].name, optarg);
    if (letter == 'c') settings.connections = positive(options[index].name, optarg);
    if (letter == 'o') settings.options = optarg;
    if (letter == '?') throw std::invalid_argument(kUsage);
  }
  if (argc - optind != 2) throw std::invalid_argument(kUsage);
  settings.checkpoint = argv[optind];
  settings.socket = argv[optind + 1];
  return settings;
}

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what + ": " + std::strerror(errno)); }

// A socket that listens under a path, which goes with it. Only this user may connect.
class Listener {
 public:
  explicit Listener(const std::string& path) : path_(path), socket_(socket(AF_UNIX, kKind, 0)) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    if (path.size() >= sizeof address.sun_path) throw std::runtime_error(path + " is too long for a socket");
    std::memcpy(address.sun_path, path.c_str(), path.size());
    const auto* where = reinterpret_cast<const sockaddr*>(&address);
    if (connect(socket_, where, sizeof address) == 0) throw std::runtime_error(path + " is served already");
    if (errno == ECONNREFUSED) unlink(path.c_str());  // left behind by a server that was killed
    umask(0177);
    if (bind(socket_, where, sizeof address) != 0) fail("cannot make " + path);
    if (listen(socket_, SOMAXCONN) != 0) fail("cannot listen on " + path);
  }
  ~Listener() {
    close(socket_);
    unlink(path_.c_str());
  }
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;

  int descriptor() const { return socket_; }

 private:
  static constexpr int kKind = SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK;

  const std::string path_;
  const int socket_;
};

// Blocks SIGTERM and SIGINT in this thread, and so in all that it starts; returns a descriptor that reads them.
int block_signals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  const int descriptor = signalfd(-1, &signals, SFD_CLOEXEC);
  if (descriptor < 0) fail("signalfd");
  return descriptor;
}

// Accepts clients until a signal comes, then sees to it that what they have sent is answered.
void serve(const Settings& settings, const funnel::Engine& engine, int signals) {
  Batcher batcher([&](const auto& ids, const auto& offsets) { return engine.embed({ids, offsets}); },
                  settings.batch_tokens, settings.queue);
  std::list<Connection> connections;
  {
    const Listener listener(settings.socket);
    std::printf("listening on %s\n", settings.socket.c_str());
    std::fflush(stdout);
    pollfd events[] = {{signals, POLLIN, 0}, {listener.descriptor(), POLLIN, 0}};
    while (events[0].revents == 0) {
      if (poll(events, 2, -1) < 0) {
        if (errno == EINTR) continue;
        fail("poll");
      }
      if (events[1].revents == 0) continue;
      const int client = accept4(listener.descriptor(), nullptr, nullptr, SOCK_CLOEXEC);
      if (client < 0) continue;  // it has gone, or there are too many descriptors for now
      connections.remove_if([](const Connection& connection) { return connection.done(); });
      if (connections.size() < settings.connections) {
        const timeval patience{10, 0};  // a client that does not read its answers must not hold up the end
        setsockopt(client, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
        connections.emplace_back(client, engine.info(), batcher);
      } else {
        close(client);
      }
    }
  }
  for (Connection& connection : connections) connection.finish();
}  // waits for the connections, then for the batcher

}  // namespace

int main(int argc, char** argv) {
  try {
    const Settings settings = parse(argc, argv);
    const int signals = block_signals();
    funnel::Engine engine(settings.checkpoint, settings.options);
    engine.warmup();
    serve(settings, engine, signals);
    std::printf("%s\n", engine.stats().c_str());
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
