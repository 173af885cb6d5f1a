// The example server's batcher with a function in the engine's place, which can be held up.
#include <batcher.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#define CHECK(condition)                                           \
  do {                                                             \
    if (!(condition)) {                                            \
      std::fprintf(stderr, "line %d: %s\n", __LINE__, #condition); \
      std::exit(1);                                                \
    }                                                              \
  } while (0)

// A model whose vector of a sequence is its sum and its length. It notes the batches, and waits while the gate is shut.
struct Model {
  std::mutex mutex;
  std::condition_variable changed;
  bool open = false;
  std::vector<size_t> batches;  // tokens of each

  std::vector<float> embed(const std::vector<int32_t>& ids, const std::vector<int32_t>& offsets) {
    std::unique_lock<std::mutex> lock(mutex);
    batches.push_back(ids.size());
    changed.notify_all();
    changed.wait(lock, [this] { return open; });
    std::vector<float> vectors;
    for (size_t b = 0; b + 1 < offsets.size(); ++b) {
      float sum = 0;
      for (int32_t i = offsets[b]; i < offsets[b + 1]; ++i) sum += static_cast<float>(ids[i]);
      if (sum < 0) throw std::runtime_error("a negative sum");
      vectors.push_back(sum);
      vectors.push_back(static_cast<float>(offsets[b + 1] - offsets[b]));
    }
    return vectors;
  }

  void await_batch() {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [this] { return !batches.empty(); });
  }

  void open_gate() {
    std::lock_guard<std::mutex> guard(mutex);
    open = true;
    changed.notify_all();
  }
};

Batcher::Embed calls(Model& model) {
  return [&](const auto& ids, const auto& offsets) { return model.embed(ids, offsets); };
}

void gathers_by_budget_and_refuses_beyond_the_queue() {
  Model model;
  std::vector<std::future<Answer>> answers;
  int notified = 0;
  {
    Batcher batcher(calls(model), [&] { ++notified; }, /*batch_tokens=*/6, /*queue=*/4);
    answers.push_back(batcher.submit({1}));
    model.await_batch();  // it runs alone, and the others queue behind it
    answers.push_back(batcher.submit({1, 2}));
    answers.push_back(batcher.submit({3, 4, 5, 6}));              // 2 + 4 just fit
    answers.push_back(batcher.submit({7, 7, 7, 7, 7, 7, 7, 7}));  // more than the budget: a batch of its own
    answers.push_back(batcher.submit({8}));
    std::future<Answer> refused = batcher.submit({9});
    CHECK(refused.wait_for(std::chrono::seconds(0)) == std::future_status::ready);  // while the model is still at work
    const Answer answer = refused.get();
    CHECK(answer.code == Code::kBusy && answer.error.find("4 requests wait") == 0);
    model.open_gate();
  }  // answers all before it goes
  const std::vector<std::vector<float>> expected = {{1, 1}, {3, 2}, {18, 4}, {56, 8}, {8, 1}};
  for (size_t i = 0; i < expected.size(); ++i) {
    const Answer answer = answers[i].get();
    CHECK(answer.code == Code::kOk && answer.vector == expected[i]);
  }
  CHECK((model.batches == std::vector<size_t>{1, 6, 8, 1}));
  CHECK(notified == 4);
}

void a_batch_that_fails_is_answered_and_the_next_one_runs() {
  Model model;
  model.open = true;
  Batcher batcher(calls(model), [] {}, 100, 100);
  const Answer failed = batcher.submit({-5}).get();
  CHECK(failed.code == Code::kFailed && failed.error == "a negative sum");
  CHECK((batcher.submit({5}).get().vector == std::vector<float>{5, 1}));
}

int main() {
  gathers_by_budget_and_refuses_beyond_the_queue();
  a_batch_that_fails_is_answered_and_the_next_one_runs();
  return 0;
}
