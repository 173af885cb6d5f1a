// The C++ interface of the funnel engine: funnel.h, whose comments hold here too, with an owner and exceptions.
//
//   funnel::Engine engine("gemma-2b-engine", R"({"funnel": {"strides": [1, 1, 2]}})");
//   engine.warmup();
//   std::vector<int32_t> ids = {2, 651, 2204, 2, 1841}, offsets = {0, 3, 5};
//   std::vector<float> vectors = engine.embed({ids, offsets});  // [2, embedding_size]
#ifndef FUNNEL_HPP_
#define FUNNEL_HPP_

#include <funnel.h>

#include <cstdint>
#include <exception>
#include <functional>
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
// sequences, so it is never empty; its last entry must not exceed the number of ids. types: of tokens; nullptr for
// none.
struct Sequences {
  const int32_t* ids;
  const int32_t* offsets;
  int32_t count;
  const int32_t* types;

  Sequences(const int32_t* ids, const int32_t* offsets, int32_t count, const int32_t* types = nullptr)
      : ids(ids), offsets(offsets), count(count), types(types) {}

  Sequences(const std::vector<int32_t>& ids, const std::vector<int32_t>& offsets)
      : Sequences(ids.data(), offsets.data(), static_cast<int32_t>(offsets.size()) - 1) {
    if (offsets.empty() || offsets.size() - 1 > INT32_MAX || offsets.back() < 0 ||
        static_cast<size_t>(offsets.back()) != ids.size()) {
      throw Error(FUNNEL_INVALID_ARGUMENT, "offsets must end at the number of ids, " + std::to_string(ids.size()));
    }
  }

  Sequences(const std::vector<int32_t>& ids, const std::vector<int32_t>& offsets, const std::vector<int32_t>& types)
      : Sequences(ids, offsets) {
    if (types.size() != ids.size()) {
      throw Error(FUNNEL_INVALID_ARGUMENT, "types has " + std::to_string(types.size()) + " numbers; there must be " +
                                               std::to_string(ids.size()) + ", one for each id");
    }
    this->types = types.data();
  }
};

// Sends what is logged in the process to a function, which must not throw; nullptr restores what was before.
inline void set_log(funnel_log_function log, void* user = nullptr) {
  char error[512];
  const funnel_status status = funnel_set_log(log, user, error, sizeof(error));
  if (status != FUNNEL_OK) throw Error(status, error);
}

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

  // Compiles all buckets, or those that hold so many rows. What `progress` throws stops the warm-up, and leaves it.
  using Progress = std::function<void(int32_t done, int32_t total)>;
  void warmup(const std::vector<int32_t>& buckets = {}, const Progress& progress = {}) {
    struct Told {
      const Progress& progress;
      std::exception_ptr thrown;
    } told = {progress, nullptr};
    const auto tell = [](int32_t done, int32_t total, void* user) -> int {
      auto& [progress, thrown] = *static_cast<Told*>(user);
      try {
        if (progress) progress(done, total);
      } catch (...) {
        thrown = std::current_exception();
      }
      return thrown != nullptr;
    };
    char error[512];
    const funnel_status status = funnel_warmup_buckets(engine_, buckets.empty() ? nullptr : buckets.data(),
                                                       count_of(buckets), tell, &told, error, sizeof(error));
    if (told.thrown != nullptr) std::rethrow_exception(told.thrown);
    if (status != FUNNEL_OK) throw Error(status, error);
  }

  const funnel_info& info() const { return info_; }

  // [count, truncate_dim or embedding_size]
  std::vector<float> embed(Sequences given, bool normalize = true, int32_t truncate_dim = 0) const {
    return run(
        [&](float* out, size_t floats, char* error, size_t size) {
          return funnel_embed_typed(engine_, given.ids, given.types, given.offsets, given.count, normalize,
                                    truncate_dim, out, floats, error, size);
        },
        [&] { return floats(given.count, truncate_dim > 0 ? truncate_dim : info_.embedding_size); });
  }

  // [texts, truncate_dim or embedding_size]. prompt_name: empty for the checkpoint's default prompt.
  std::vector<float> embed_texts(const std::vector<std::string>& texts, const std::string& prompt_name = {},
                                 bool truncate = false, bool normalize = true, int32_t truncate_dim = 0) const {
    const int32_t count = count_of(texts);
    std::vector<const char*> begins;
    std::vector<size_t> lengths;
    for (const std::string& text : texts) {
      begins.push_back(text.data());
      lengths.push_back(text.size());
    }
    return run(
        [&](float* out, size_t floats, char* error, size_t size) {
          return funnel_embed_texts(engine_, begins.data(), lengths.data(), count,
                                    prompt_name.empty() ? nullptr : prompt_name.c_str(), truncate, normalize,
                                    truncate_dim, out, floats, error, size);
        },
        [&] { return floats(count, truncate_dim > 0 ? truncate_dim : info_.embedding_size); });
  }

  // [count, labels]
  std::vector<float> classify(Sequences given) const {
    return run(
        [&](float* out, size_t floats, char* error, size_t size) {
          return funnel_classify_typed(engine_, given.ids, given.types, given.offsets, given.count, out, floats, error,
                                       size);
        },
        [&] { return floats(given.count, info_.labels); });
  }

  // [tokens, labels]
  std::vector<float> tag(Sequences given) const {
    return run(
        [&](float* out, size_t floats, char* error, size_t size) {
          return funnel_tag_typed(engine_, given.ids, given.types, given.offsets, given.count, out, floats, error,
                                  size);
        },
        [&] { return floats(given.offsets[given.count], info_.labels); });
  }

  // [tokens, 2]
  std::vector<float> answer(Sequences given) const {
    return run(
        [&](float* out, size_t floats, char* error, size_t size) {
          return funnel_answer(engine_, given.ids, given.types, given.offsets, given.count, out, floats, error, size);
        },
        [&] { return floats(given.offsets[given.count], info_.labels); });
  }

  // Counters as a JSON object.
  std::string stats() const { return text(funnel_stats); }

  // What runs here and how, for people.
  std::string describe() const { return text(funnel_describe); }

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

  // The result of `call(out, floats, error, size)`, which checks the arguments once before memory is taken for it. Only
  // then `floats()`, which trusts them, is asked how much.
  template <typename Call, typename Floats>
  static std::vector<float> run(Call call, Floats floats) {
    char error[512];
    const funnel_status status = call(nullptr, 0, error, sizeof(error));
    if (status != FUNNEL_BUFFER_TOO_SMALL) throw Error(status, error);
    std::vector<float> out(floats());
    check([&](char* message, size_t size) { return call(out.data(), out.size(), message, size); });
    return out;
  }

  static size_t floats(int32_t rows, int32_t width) { return static_cast<size_t>(rows) * static_cast<size_t>(width); }

  template <typename Item>
  static int32_t count_of(const std::vector<Item>& items) {
    if (items.size() <= INT32_MAX) return static_cast<int32_t>(items.size());
    throw Error(FUNNEL_INVALID_ARGUMENT, std::to_string(items.size()) + " items are more than a call takes, 2**31 - 1");
  }

  // What funnel_stats or funnel_describe writes.
  template <typename Write>
  std::string text(Write write) const {
    std::string text;
    size_t needed = 1024;
    do {  // again if it was longer than that
      text.resize(needed);
      char error[512];
      const funnel_status status = write(engine_, text.data(), text.size(), &needed, error, sizeof(error));
      if (status != FUNNEL_OK && status != FUNNEL_BUFFER_TOO_SMALL) throw Error(status, error);
    } while (needed > text.size());
    text.resize(needed - 1);
    return text;
  }

  funnel_engine* engine_ = nullptr;
  funnel_info info_ = FUNNEL_INFO_INIT;
};

}  // namespace funnel

#endif  // FUNNEL_HPP_
