// A socket that listens at a path of the file system. Only this user may connect.
#ifndef FUNNEL_EXAMPLE_LISTENER_H_
#define FUNNEL_EXAMPLE_LISTENER_H_

#include <fcntl.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <stdexcept>
#include <string>

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error(what + ": " + std::strerror(errno)); }

class Listener {
 public:
  explicit Listener(const std::string& path)
      : path_(path), socket_(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)) {
    sockaddr_un address{};
    const size_t limit = sizeof address.sun_path - 1;
    if (path.empty()) throw std::runtime_error("SOCKET is empty; give a path");
    if (path.size() > limit) {
      throw std::runtime_error(path + " has " + std::to_string(path.size()) +
                               " bytes; the path of a socket has at most " + std::to_string(limit));
    }
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path.c_str(), path.size());
    const auto* where = reinterpret_cast<const sockaddr*>(&address);

    // Servers that start at the same time take turns; otherwise one could remove what another has just made.
    const std::string folder = std::filesystem::absolute(path).parent_path().string();
    const int turn = open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (turn < 0 || flock(turn, LOCK_EX) != 0) fail("cannot open " + folder);
    if (lstat(path.c_str(), &file_) == 0) {
      if (!S_ISSOCK(file_.st_mode)) throw std::runtime_error(path + " exists and is not a socket; give another path");
      if (connect(socket_, where, sizeof address) == 0 || errno == EAGAIN) {
        throw std::runtime_error(path + " is served already");
      }
      if (errno != ECONNREFUSED || unlink(path.c_str()) != 0) fail("cannot replace " + path);
    }
    if (fchmod(socket_, 0600) != 0 || bind(socket_, where, sizeof address) != 0 || lstat(path.c_str(), &file_) != 0 ||
        listen(socket_, SOMAXCONN) != 0) {
      fail("cannot listen on " + path);
    }
    close(turn);
  }

  // Removes the path, unless another server has it by now.
  ~Listener() {
    struct stat now;
    if (lstat(path_.c_str(), &now) == 0 && now.st_dev == file_.st_dev && now.st_ino == file_.st_ino) {
      unlink(path_.c_str());
    }
    close(socket_);
  }
  Listener(const Listener&) = delete;

  int descriptor() const { return socket_; }

 private:
  const std::string path_;
  const int socket_;
  struct stat file_;
};

#endif  // FUNNEL_EXAMPLE_LISTENER_H_
