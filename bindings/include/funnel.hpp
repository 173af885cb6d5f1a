// The C++ interface of the funnel engine: funnel.h, whose comments hold here too, with an owner and exceptions.
//
//   funnel::Engine engine("gemma-2b-engine", R"({"funnel": {"strides": [1, 1, 2]}})");
//   engine.warmup();
//   std::vector<int32_t> ids = {2, 651, 2204, 2, 1841}, offsets = {0, 3, 5};
//   std::vector<float> vectors = engine.embed({ids, offsets});  // [2, embedding_size]
#ifndef FUNNEL_HPP_
#define FUNNEL_HPP_

#include <funnel.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace funnel {

// What a call that does not return FUNNEL_OK throws.
class Error : public std::runtime_error {
 public:
  Error(funnel_status status, const std::string& message) : std::runtime_error(message), status_(status) {}
  funnel_status status() const { return status_; }

 private:
  funnel_status status_;
};

// Sequences that the caller owns, one after another; nothing is copied. offsets has one entry more than there are
// sequences, so it is never empty; its last entry must not exceed the number of ids.
struct Sequences {
  const int32_t* ids;
  const int32_t* offsets;
  int32_t count;

  Sequences(const int32_t* ids, const int32_t* offsets, int32_t count) : ids(ids), offsets(offsets), count(count) {}

  Sequences(const std::vector<int32_t>& ids, const std::vector<int32_t>& offsets)
      : Sequences(ids.data(), offsets.data(), static_cast<int32_t>(offsets.size()) - 1) {
    if (offsets.empty() || offsets.back() < 0 || static_cast<size_t>(offsets.back()) != ids.size()) {
      throw Error(FUNNEL_INVALID_ARGUMENT, "offsets must end at the number of ids, " + std::to_string(ids.size()));
    }
  }
};

// An open engine, closed when its owner dies. Every method but move assignment and close may be called from any thread.
class Engine {
 public:
  // options: a JSON object, see funnel_options; empty for none. python: an executable; empty for the default.
  explicit Engine(const std::string& checkpoint, const std::string& options = {}, const std::string& python = {}) {
    const funnel_options given = {sizeof(funnel_options), checkpoint.c_str(), python.empty() ? nullptr : python.c_str(),
                                  options.empty() ? nullptr : options.c_str()};
    check([&](char* error, size_t size) { return funnel_open(&given, &engine_, error, size); });
    try {
      check([&](char* error, size_t size) { return funnel_get_info(engine_, &info_, error, size); });
    } catch (...) {
      close();
      throw;
    }
  }
  ~Engine() { close(); }
  Engine(Engine&& other) noexcept : engine_(std::exchange(other.engine_, nullptr)), info_(other.info_) {}
  Engine& operator=(Engine&& other) noexcept {
    std::swap(engine_, other.engine_);
    std::swap(info_, other.info_);
    return *this;
  }

  void warmup() {
    check([&](char* error, size_t size) { return funnel_warmup(engine_, error, size); });
  }

  const funnel_info& info() const { return info_; }

  // [count, truncate_dim or embedding_size]
  std::vector<float> embed(Sequences sequences, bool normalize = true, int32_t truncate_dim = 0) const {
    std::vector<float> out(floats(sequences.count, truncate_dim > 0 ? truncate_dim : info_.embedding_size));
    check([&](char* error, size_t size) {
      return funnel_embed(engine_, sequences.ids, sequences.offsets, sequences.count, normalize, truncate_dim,
                          out.data(), out.size(), error, size);
    });
    return out;
  }

  // [count, labels]
  std::vector<float> classify(Sequences sequences) const {
    std::vector<float> out(floats(sequences.count, info_.labels));
    check([&](char* error, size_t size) {
      return funnel_classify(engine_, sequences.ids, sequences.offsets, sequences.count, out.data(), out.size(), error,
                             size);
    });
    return out;
  }

  // [tokens, labels]
  std::vector<float> tag(Sequences sequences) const {
    std::vector<float> out(floats(sequences.count > 0 ? sequences.offsets[sequences.count] : 0, info_.labels));
    check([&](char* error, size_t size) {
      return funnel_tag(engine_, sequences.ids, sequences.offsets, sequences.count, out.data(), out.size(), error,
                        size);
    });
    return out;
  }

  // Counters as a JSON object.
  std::string stats() const {
    std::string text;
    size_t needed = 512;
    do {  // again if it was longer than that
      text.resize(needed);
      char error[512];
      const funnel_status status = funnel_stats(engine_, text.data(), text.size(), &needed, error, sizeof(error));
      if (status != FUNNEL_OK && status != FUNNEL_BUFFER_TOO_SMALL) throw Error(status, error);
    } while (needed > text.size());
    text.resize(needed - 1);
    return text;
  }

  // Every later call throws FUNNEL_CLOSED or FUNNEL_INVALID_ARGUMENT. Calls that run in other threads finish.
  void close() noexcept {
    if (engine_ != nullptr) funnel_close(engine_, nullptr, 0);
  }

 private:
  template <typename Call>
  static void check(Call call) {
    char error[512];
    const funnel_status status = call(error, sizeof(error));
    if (status != FUNNEL_OK) throw Error(status, error);
  }

  static size_t floats(int32_t rows, int32_t width) {
    return rows > 0 ? static_cast<size_t>(rows) * static_cast<size_t>(width) : 0;
  }

  funnel_engine* engine_ = nullptr;
  funnel_info info_ = FUNNEL_INFO_INIT;
};

}  // namespace funnel

#endif  // FUNNEL_HPP_
