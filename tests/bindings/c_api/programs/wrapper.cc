// wrapper CLASSIFIER TAGGER TEXTS ANSWERS: funnel.hpp against funnel.h.
#include <climits>
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

#define CHECK(condition)                                           \
  do {                                                             \
    if (!(condition)) {                                            \
      std::fprintf(stderr, "line %d: %s\n", __LINE__, #condition); \
      std::exit(1);                                                \
    }                                                              \
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

  // Nothing is allocated before the arguments are checked.
  const std::vector<int32_t> huge = {0, INT_MAX};
  CHECK(throws(FUNNEL_INVALID_ARGUMENT, "truncate_dim is 268435456",
               [&] { first.embed({ids, offsets}, true, 1 << 28); }));
  for (auto call : {+[](funnel::Engine& engine, funnel::Sequences given) { engine.embed(given); },
                    +[](funnel::Engine& engine, funnel::Sequences given) { engine.classify(given); },
                    +[](funnel::Engine& engine, funnel::Sequences given) { engine.tag(given); }}) {
    const auto given = [&](const int32_t* ids, const int32_t* offsets, int32_t count) {
      return [&, ids, offsets, count] { call(first, {ids, offsets, count}); };
    };
    CHECK(throws(FUNNEL_INPUT, "has 2147483647 tokens", given(ids.data(), huge.data(), 1)));
    CHECK(throws(FUNNEL_INVALID_ARGUMENT, "offsets is NULL", given(ids.data(), nullptr, 2)));
    CHECK(throws(FUNNEL_INVALID_ARGUMENT, "ids is NULL", given(nullptr, offsets.data(), 2)));
    CHECK(throws(FUNNEL_INVALID_ARGUMENT, "count is -1", given(ids.data(), offsets.data(), -1)));
    CHECK(throws(FUNNEL_INVALID_ARGUMENT, "count is 0", given(ids.data(), offsets.data(), 0)));
  }
  {
    const funnel::Engine tagger(argv[2], options);
    CHECK(tagger.tag({ids, offsets}).size() == static_cast<size_t>(6 * tagger.info().labels));
    CHECK(throws(FUNNEL_CONFIG, "classify needs", [&] { tagger.classify({ids, offsets}); }));
  }

  {  // Types of tokens.
    const funnel::Engine answers(argv[4], options);
    const std::vector<int32_t> types = {2, 0, 1, 1, 2, 0};
    const std::vector<float> logits = answers.answer({ids, offsets, types});
    CHECK(logits.size() == 6 * 2 && logits != answers.answer({ids, offsets}));
    CHECK(answers.embed({ids, offsets, types}) != answers.embed({ids, offsets}));
    CHECK(throws(FUNNEL_INVALID_ARGUMENT, "types has 2 numbers; there must be 6",
                 [&] { answers.answer({ids, offsets, {2, 0}}); }));
    CHECK(throws(FUNNEL_INPUT, "token types", [&] { first.classify({ids, offsets, types}); }));
    CHECK(throws(FUNNEL_CONFIG, "answer needs", [&] { first.answer({ids, offsets}); }));
  }

  // Texts.
  funnel::Engine texts(argv[3], options);
  const std::vector<float> known = texts.embed({{2, 7, 4, 5}, {0, 4}});  // <bos> pools a small
  CHECK(texts.embed_texts({"a small"}) == known && texts.embed_texts({"a small"}, "query") == known);
  CHECK(texts.embed_texts({"a small"}, "größe") == texts.embed({{2, 5, 4, 5}, {0, 4}}));
  CHECK(texts.embed_texts({"a", "small"}, {}, false, false, 5).size() == 2 * 5);
  std::string nul = "a small";
  nul[1] = '\0';
  CHECK(texts.embed_texts({nul}) != texts.embed_texts({"a"}));
  CHECK(throws(FUNNEL_INPUT, "prompt_name='other' is unknown", [&] { texts.embed_texts({"a"}, "other"); }));
  CHECK(throws(FUNNEL_INPUT, "input 1 is not UTF-8", [&] { texts.embed_texts({"a", "\xff"}); }));
  CHECK(throws(FUNNEL_INVALID_ARGUMENT, "texts is NULL", [&] { texts.embed_texts({}); }));
  CHECK(throws(FUNNEL_INVALID_ARGUMENT, "truncate_dim is 268435456",
               [&] { texts.embed_texts({"a"}, {}, false, true, 1 << 28); }));
  std::string long_text;
  for (int i = 0; i < 50; ++i) long_text += "a ";
  CHECK(throws(FUNNEL_INPUT, "more than the limit of 16", [&] { texts.embed_texts({long_text}); }));
  CHECK(texts.embed_texts({long_text}, {}, true).size() == static_cast<size_t>(size));

  // Warm-up, which an exception of the caller leaves.
  int32_t told = 0;
  texts.warmup({3}, [&](int32_t done, int32_t total) { CHECK(done == ++told && done <= total); });
  CHECK(told > 0);
  bool left = false;
  try {
    texts.warmup({}, [](int32_t, int32_t) { throw std::string("enough"); });
  } catch (const std::string& what) {
    left = what == "enough";
  }
  CHECK(left);
  texts.warmup();
  CHECK(throws(FUNNEL_INPUT, "buckets[0]=0 must", [&] { texts.warmup({0}); }));
  CHECK(texts.describe().find("limits") != std::string::npos && texts.describe().back() != '\0');
  funnel::set_log([](int32_t, const char*, void*) {});
  funnel::set_log(nullptr);

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
