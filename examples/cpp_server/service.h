// Loads the model, checks requests, and hands them to the batcher, whose thread runs the model.
#ifndef FUNNEL_EXAMPLE_SERVICE_H_
#define FUNNEL_EXAMPLE_SERVICE_H_

#include <cstdio>
#include <funnel.hpp>
#include <optional>
#include <stdexcept>

#include "batcher.h"

struct Settings {
  std::string checkpoint, socket, options;
  size_t batch_tokens = 4096, queue = 64, connections = 256, timeout = 30;
};

class Service {
 public:
  // notify: is called in the batcher's thread when the model is loaded or cannot be loaded, and after every batch.
  Service(const Settings& settings, std::function<void()> notify)
      : settings_(settings),
        batcher_([this](const auto& ids, const auto& offsets) { return embed(ids, offsets); }, std::move(notify),
                 settings.batch_tokens, settings.queue),
        loaded_(batcher_.submit({})) {}

  bool loading() const { return loaded_.valid(); }

  // To be called after the first notification. Throws why the model cannot be loaded.
  void finish_loading() {
    const Answer answer = loaded_.get();
    if (answer.code != Code::kOk) throw std::runtime_error(answer.error);
  }

  // The answer to a request of this size, if its size decides; otherwise an invalid future.
  std::future<Answer> answer_at_once(uint32_t bytes) const {
    if (loading()) return answer({Code::kBusy, {}, "the model is being loaded; try again later"});
    if (bytes == 0) return answer({Code::kOk, {}, {}});
    const auto limit = static_cast<uint32_t>(engine_->info().max_length);
    if (bytes % 4 == 0 && bytes / 4 <= limit) return {};
    return answer({Code::kBadRequest,
                   {},
                   "a request has " + std::to_string(bytes) + " bytes; give 4 for each token id, and 1 ... " +
                       std::to_string(limit) + " ids"});
  }

  std::future<Answer> submit(std::vector<int32_t> ids) {
    const int32_t size = engine_->info().vocabulary_size;
    for (const int32_t id : ids) {  // checked here, so that a bad request spoils no batch of others
      if (id >= 0 && id < size) continue;
      return answer(
          {Code::kBadRequest, {}, "token id " + std::to_string(id) + " is not in 0 ... " + std::to_string(size - 1)});
    }
    return batcher_.submit(std::move(ids));
  }

  std::string stats() const { return engine_->stats(); }

 private:
  // The first call comes from the constructor, with no ids: it loads the model, in the thread that goes on to use it.
  std::vector<float> embed(const std::vector<int32_t>& ids, const std::vector<int32_t>& offsets) {
    if (engine_) return engine_->embed({ids, offsets});
    std::fprintf(stderr, "loading %s\n", settings_.checkpoint.c_str());
    engine_.emplace(settings_.checkpoint, settings_.options);
    std::fprintf(stderr, "compiling every size of batch\n");
    engine_->warmup();
    return {};
  }

  static std::future<Answer> answer(Answer answer) {
    std::promise<Answer> promise;
    promise.set_value(std::move(answer));
    return promise.get_future();
  }

  const Settings settings_;
  std::optional<funnel::Engine> engine_;
  Batcher batcher_;  // after the engine, which it uses
  std::future<Answer> loaded_;
};

#endif  // FUNNEL_EXAMPLE_SERVICE_H_
