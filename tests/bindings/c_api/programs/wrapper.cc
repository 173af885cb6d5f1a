// wrapper CHECKPOINT: funnel.hpp against funnel.h. The checkpoint is a classifier.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <funnel.hpp>
#include <type_traits>

static_assert(!std::is_copy_constructible<funnel::Engine>::value && !std::is_copy_assignable<funnel::Engine>::value,
              "an engine has one owner");
static_assert(std::is_nothrow_move_constructible<funnel::Engine>::value &&
                  std::is_nothrow_move_assignable<funnel::Engine>::value,
              "and can change it");

#define CHECK(condition)                                            \
  do {                                                              \
    if (!(condition)) {                                             \
      std::fprintf(stderr, "line %d: %s\n", __LINE__, #condition); \
      std::exit(1);                                                 \
    }                                                               \
  } while (0)

// Whether `call` throws a funnel::Error of this status whose message holds `text`.
template <typename Call>
bool throws(funnel_status status, const char* text, Call call) {
  try {
    call();
  } catch (const funnel::Error& error) {
    return error.status() == status && std::strstr(error.what(), text) != nullptr;
  }
  return false;
}

int main(int, char** argv) {
  const std::string options = R"({"max_batch_tokens": 16})";
  const std::vector<int32_t> ids = {2, 17, 93, 5, 2, 40}, offsets = {0, 4, 6};
  CHECK(throws(FUNNEL_CHECKPOINT, "/nowhere", [] { funnel::Engine engine("/nowhere"); }));
  CHECK(throws(FUNNEL_CONFIG, "beam", [&] { funnel::Engine engine(argv[1], R"({"beam": 4})"); }));

  funnel::Engine first(argv[1], options);
  const int32_t size = first.info().embedding_size, labels = first.info().labels;
  CHECK(size == 24 && labels == 3 && first.info().task == FUNNEL_TASK_CLASSIFY);
  const std::vector<float> vectors = first.embed({ids, offsets});
  CHECK(vectors.size() == static_cast<size_t>(2 * size));
  double length = 0;
  for (int32_t i = 0; i < size; ++i) length += double{vectors[i]} * vectors[i];
  CHECK(length > 0.999 && length < 1.001);
  CHECK(first.embed({ids, offsets}, false) != vectors);
  CHECK(first.embed({ids, offsets}, true, 5).size() == 2 * 5);
  CHECK(first.embed({ids.data(), offsets.data(), 2}) == vectors);
  CHECK(first.classify({ids, offsets}).size() == static_cast<size_t>(2 * labels));
  CHECK(first.stats().find("\"sequences\": 10,") != std::string::npos);
  CHECK(first.stats().back() == '}');

  CHECK(throws(FUNNEL_CONFIG, "tag needs", [&] { first.tag({ids, offsets}); }));
  CHECK(throws(FUNNEL_INVALID_ARGUMENT, "truncate_dim is -1", [&] { first.embed({ids, offsets}, true, -1); }));
  CHECK(throws(FUNNEL_INVALID_ARGUMENT, "end at the number of ids, 6", [&] { first.embed({ids, {0, 4}}); }));
  CHECK(throws(FUNNEL_INVALID_ARGUMENT, "end at the number of ids, 6", [&] { first.embed({ids, {}}); }));

  funnel::Engine second(std::move(first));
  CHECK(throws(FUNNEL_INVALID_ARGUMENT, "engine is NULL", [&] { first.embed({ids, offsets}); }));  // NOLINT: moved from
  CHECK(second.embed({ids, offsets}) == vectors);
  {
    funnel::Engine third(argv[1], options);
    third = std::move(second);
    CHECK(third.embed({ids, offsets}) == vectors);
    second = std::move(third);
  }
  CHECK(second.embed({ids, offsets}) == vectors);
  second.close();
  CHECK(throws(FUNNEL_CLOSED, "closed", [&] { second.embed({ids, offsets}); }));
  second.close();
  return 0;
}
