// One client: reads a request, writes the answer, and so on. It never waits. The protocol is in README.md.
#ifndef FUNNEL_EXAMPLE_CONNECTION_H_
#define FUNNEL_EXAMPLE_CONNECTION_H_

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <future>
#include <string>
#include <utility>
#include <vector>

#include "service.h"

class Connection {
 public:
  // Takes over the descriptor of a connected socket that does not block. timeout: how long the client may take to send
  // a whole request, and to read a whole answer.
  Connection(int socket, std::chrono::seconds timeout)
      : socket_(socket), timeout_(timeout), deadline_(Clock::now() + timeout) {}
  ~Connection() { close(socket_); }
  Connection(const Connection&) = delete;

  // What poll should wait for: nothing while the model works for this client.
  pollfd interest() const {
    if (!out_.empty()) return {socket_, POLLOUT, 0};
    return {whole() ? -1 : socket_, POLLIN, 0};
  }

  // Goes on as far as it can. False once the client has left or has taken too long.
  bool advance(bool socket_ready, Service& service) {
    if (socket_ready && !(out_.empty() ? receive(service) : send())) return false;
    if (whole() && answer_.wait_for(std::chrono::seconds(0)) == std::future_status::ready) {
      return reply(answer_.get());
    }
    return whole() || Clock::now() < deadline_;
  }

  // Begins to send an answer.
  bool reply(const Answer& answer) {
    const bool ok = answer.code == Code::kOk;
    const size_t bytes = ok ? answer.vector.size() * sizeof(float) : answer.error.size();
    const uint32_t head[] = {static_cast<uint32_t>(bytes), static_cast<uint32_t>(answer.code)};
    out_.assign(reinterpret_cast<const char*>(head), sizeof head);
    out_.append(ok ? reinterpret_cast<const char*>(answer.vector.data()) : answer.error.data(), bytes);
    got_ = sent_ = 0;
    deadline_ = Clock::now() + timeout_;
    return send();
  }

  // Takes no more requests than have arrived by now. What is in the socket's buffer is still read and answered.
  void finish() { shutdown(socket_, SHUT_RD); }

 private:
  using Clock = std::chrono::steady_clock;

  bool whole() const { return got_ == sizeof size_ + size_t{size_}; }

  // Reads what has arrived: the size, then the ids. Nothing is allocated before the size is checked, and the body of a
  // request that is answered by its size alone is dropped.
  bool receive(Service& service) {
    char unwanted[4096];
    ssize_t count;
    if (got_ < sizeof size_) {
      count = recv(socket_, reinterpret_cast<char*>(&size_) + got_, sizeof size_ - got_, 0);
    } else if (const size_t body = got_ - sizeof size_; answer_.valid()) {
      count = recv(socket_, unwanted, std::min(sizeof unwanted, size_ - body), 0);
    } else {
      count = recv(socket_, reinterpret_cast<char*>(ids_.data()) + body, size_ - body, 0);
    }
    if (count <= 0) return count < 0 && (errno == EAGAIN || errno == EINTR);
    got_ += static_cast<size_t>(count);
    if (got_ == sizeof size_) {
      answer_ = service.answer_at_once(size_);
      if (!answer_.valid()) ids_.resize(size_ / sizeof(int32_t));
    }
    if (whole() && !answer_.valid()) answer_ = service.submit(std::move(ids_));
    return true;
  }

  bool send() {
    const ssize_t count = ::send(socket_, out_.data() + sent_, out_.size() - sent_, 0);
    if (count < 0) return errno == EAGAIN || errno == EINTR;
    sent_ += static_cast<size_t>(count);
    if (sent_ == out_.size()) {
      out_.clear();
      deadline_ = Clock::now() + timeout_;
    }
    return true;
  }

  const int socket_;
  const std::chrono::seconds timeout_;
  Clock::time_point deadline_;  // for the client's next step
  uint32_t size_ = 0;           // of the request's body, in bytes
  size_t got_ = 0;              // bytes of size and body that have arrived
  std::vector<int32_t> ids_;
  std::future<Answer> answer_;  // valid once the answer is known or being computed
  std::string out_;             // the answer that is being sent, of which sent_ bytes have left
  size_t sent_ = 0;
};

#endif  // FUNNEL_EXAMPLE_CONNECTION_H_
