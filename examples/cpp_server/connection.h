// One client: reads its requests one after another, and answers each. The protocol is in README.md.
#ifndef FUNNEL_EXAMPLE_CONNECTION_H_
#define FUNNEL_EXAMPLE_CONNECTION_H_

#include <funnel.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "batcher.h"

class Connection {
 public:
  // Takes over the descriptor of a connected socket.
  Connection(int socket, const funnel_info& info, Batcher& batcher)
      : socket_(socket), info_(info), batcher_(batcher), thread_([this] { serve(); }) {}

  // Waits until the client has left, or after finish() until it has its answers.
  ~Connection() {
    thread_.join();
    close(socket_);
  }

  // No more requests than have arrived by now. What lies in the socket's buffer is still read and answered.
  void finish() { shutdown(socket_, SHUT_RD); }

  bool done() const { return done_; }

 private:
  void serve() {
    uint32_t bytes;
    while (receive(&bytes, sizeof bytes) && serve_one(bytes)) {
    }
    shutdown(socket_, SHUT_RDWR);  // tells the client; the descriptor is closed by the destructor
    done_ = true;
  }

  // Reads the rest of a request and answers it. False if the client has gone.
  bool serve_one(uint32_t bytes) {
    const uint32_t limit = static_cast<uint32_t>(info_.max_length) * 4;
    if (bytes == 0 || bytes % 4 != 0 || bytes > limit) {
      return skip(bytes) && refuse("a request has " + std::to_string(bytes) +
                                   " bytes; give 4 for each token id, and 1 ... " + std::to_string(info_.max_length) +
                                   " ids");
    }
    std::vector<int32_t> ids(bytes / 4);
    if (!receive(ids.data(), bytes)) return false;
    for (const int32_t id : ids) {  // checked here, so that a bad request spoils no batch of others
      if (id < 0 || id >= info_.vocabulary_size) {
        return refuse("token id " + std::to_string(id) + " is not in 0 ... " +
                      std::to_string(info_.vocabulary_size - 1));
      }
    }
    const Answer answer = batcher_.submit(std::move(ids)).get();
    return answer.code == Code::kOk ? reply(answer.code, answer.vector.data(), answer.vector.size() * sizeof(float))
                                    : reply(answer.code, answer.error.data(), answer.error.size());
  }

  bool refuse(const std::string& error) { return reply(Code::kBadRequest, error.data(), error.size()); }

  bool reply(Code code, const void* body, size_t bytes) {
    const uint32_t head[] = {static_cast<uint32_t>(bytes), static_cast<uint32_t>(code)};
    return send_all(head, sizeof head) && send_all(body, bytes);
  }

  bool skip(size_t bytes) {
    char dropped[4096];
    for (; bytes > 0; bytes -= std::min(bytes, sizeof dropped)) {
      if (!receive(dropped, std::min(bytes, sizeof dropped))) return false;
    }
    return true;
  }

  bool receive(void* data, size_t bytes) {
    for (auto* at = static_cast<char*>(data); bytes > 0;) {
      const ssize_t got = recv(socket_, at, bytes, 0);
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) return false;
      at += got;
      bytes -= static_cast<size_t>(got);
    }
    return true;
  }

  bool send_all(const void* data, size_t bytes) {
    for (auto* at = static_cast<const char*>(data); bytes > 0;) {
      const ssize_t sent = send(socket_, at, bytes, MSG_NOSIGNAL);  // a client that has gone must not end the server
      if (sent < 0 && errno == EINTR) continue;
      if (sent <= 0) return false;
      at += sent;
      bytes -= static_cast<size_t>(sent);
    }
    return true;
  }

  const int socket_;
  const funnel_info info_;
  Batcher& batcher_;
  std::atomic<bool> done_{false};
  std::thread thread_;  // last: it uses all of the above
};

#endif  // FUNNEL_EXAMPLE_CONNECTION_H_
