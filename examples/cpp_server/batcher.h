// Gathers requests of many threads into batches. It knows nothing of sockets, and of the engine only a function.
#ifndef FUNNEL_EXAMPLE_BATCHER_H_
#define FUNNEL_EXAMPLE_BATCHER_H_

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <future>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

enum class Code : uint32_t { kOk = 0, kBadRequest = 1, kBusy = 2, kFailed = 3 };

struct Answer {
  Code code;
  std::vector<float> vector;  // of kOk
  std::string error;          // of the others
};

class Batcher {
 public:
  // Sequences one after another, as (ids, offsets) -> one vector after another.
  using Embed = std::function<std::vector<float>(const std::vector<int32_t>&, const std::vector<int32_t>&)>;

  // answered: is called by the batcher's thread after every batch. batch_tokens: a batch takes further requests as long
  // as it has no more tokens than this. queue: how many requests may wait; the next one is refused at once, because a
  // queue that only grows helps nobody.
  Batcher(Embed embed, std::function<void()> answered, size_t batch_tokens, size_t queue)
      : embed_(std::move(embed)),
        answered_(std::move(answered)),
        batch_tokens_(batch_tokens),
        capacity_(queue),
        thread_([this] { run(); }) {}

  // Answers what is queued, then stops.
  ~Batcher() {
    {
      std::lock_guard<std::mutex> guard(mutex_);
      stopping_ = true;
    }
    changed_.notify_one();
    thread_.join();
  }

  std::future<Answer> submit(std::vector<int32_t> ids) {
    Request request{std::move(ids), {}};
    std::future<Answer> answer = request.answer.get_future();
    std::lock_guard<std::mutex> guard(mutex_);
    if (waiting_.size() >= capacity_) {
      request.answer.set_value({Code::kBusy, {}, std::to_string(capacity_) + " requests wait; try again later"});
    } else {
      waiting_.push_back(std::move(request));
      changed_.notify_one();
    }
    return answer;
  }

 private:
  struct Request {
    std::vector<int32_t> ids;
    std::promise<Answer> answer;
  };

  void run() {
    for (std::vector<Request> batch = take(); !batch.empty(); batch = take()) {
      answer(batch);
      answered_();
    }
  }

  // Waits for a request; takes it and those behind it that fit. Empty once there is nothing left to do.
  std::vector<Request> take() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return stopping_ || !waiting_.empty(); });
    std::vector<Request> batch;
    size_t tokens = 0;
    while (!waiting_.empty()) {
      tokens += waiting_.front().ids.size();
      if (!batch.empty() && tokens > batch_tokens_) break;
      batch.push_back(std::move(waiting_.front()));
      waiting_.pop_front();
    }
    return batch;
  }

  void answer(std::vector<Request>& batch) {
    std::vector<int32_t> ids, offsets = {0};
    for (const Request& request : batch) {
      ids.insert(ids.end(), request.ids.begin(), request.ids.end());
      offsets.push_back(static_cast<int32_t>(ids.size()));
    }
    std::vector<float> vectors;
    try {
      vectors = embed_(ids, offsets);
    } catch (const std::exception& exception) {
      for (Request& request : batch) request.answer.set_value({Code::kFailed, {}, exception.what()});
      return;
    }
    const auto width = static_cast<std::ptrdiff_t>(vectors.size() / batch.size());
    auto vector = vectors.begin();
    for (Request& request : batch) {
      request.answer.set_value({Code::kOk, {vector, vector + width}, {}});
      vector += width;
    }
  }

  const Embed embed_;
  const std::function<void()> answered_;
  const size_t batch_tokens_, capacity_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Request> waiting_;
  bool stopping_ = false;
  std::thread thread_;  // last: it uses all of the above
};

#endif  // FUNNEL_EXAMPLE_BATCHER_H_
