/* embedded PLAIN CLASSIFIER TAGGER: a host without Python of its own. Checks what only such a host can show, and prints
 * results for the test to compare: a line "name" and a line of floats in hexadecimal for each. */
#define _POSIX_C_SOURCE 200809L

#include <funnel.h>
#include <malloc.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition)                                                                      \
  do {                                                                                        \
    if (!(condition)) {                                                                       \
      fprintf(stderr, "line %d: %s; last error: %s\n", __LINE__, #condition, error);          \
      exit(1);                                                                                \
    }                                                                                         \
  } while (0)

enum { COUNT = 3, TOKENS = 12, WIDTH = 24, LABELS = 8, THREADS = 4 };
static const int32_t ids[TOKENS] = {2, 17, 93, 5, 2, 40, 41, 42, 43, 2, 99, 7};
static const int32_t offsets[COUNT + 1] = {0, 4, 9, 12};
static char error[512];

static funnel_engine* open_engine(const char* checkpoint) {
  funnel_options options = FUNNEL_OPTIONS_INIT;
  options.checkpoint = checkpoint;
  options.options = "{\"max_batch_tokens\": 16}";
  funnel_engine* engine = NULL;
  CHECK(funnel_open(&options, &engine, error, sizeof error) == FUNNEL_OK);
  CHECK(error[0] == '\0' && engine != NULL);
  return engine;
}

static void print(const char* name, const float* values, int count) {
  printf("%s\n", name);
  for (int i = 0; i < count; ++i) printf("%a%c", (double)values[i], i + 1 < count ? ' ' : '\n');
}

static funnel_status embed(funnel_engine* engine, float* out) {
  char message[512]; /* of this thread */
  return funnel_embed(engine, ids, offsets, COUNT, 1, 0, out, COUNT * WIDTH, message, sizeof message);
}

struct job {
  funnel_engine* engine;
  const float* expected;
  int calls;
  int wrong;
};

static void* call_often(void* argument) {
  struct job* job = argument;
  for (int i = 0; i < job->calls; ++i) {
    float out[COUNT * WIDTH];
    if (embed(job->engine, out) != FUNNEL_OK || memcmp(out, job->expected, sizeof out) != 0) ++job->wrong;
  }
  return NULL;
}

static void* call_until_closed(void* argument) {
  struct job* job = argument;
  float out[COUNT * WIDTH];
  funnel_status status;
  while ((status = embed(job->engine, out)) == FUNNEL_OK) {
    if (memcmp(out, job->expected, sizeof out) != 0) ++job->wrong;
    ++job->calls;
  }
  if (status != FUNNEL_CLOSED) ++job->wrong;
  return NULL;
}

static void start(pthread_t* thread, void* (*function)(void*), struct job* job) {
  CHECK(pthread_create(thread, NULL, function, job) == 0);
}

int main(int argc, char** argv) {
  CHECK(argc == 4);
  struct sigaction before[SIGUSR2 + 1], after;
  for (int number = 1; number <= SIGUSR2; ++number) sigaction(number, NULL, &before[number]);

  /* A start that fails does not keep a later one from working. */
  funnel_options options = FUNNEL_OPTIONS_INIT;
  options.checkpoint = argv[1];
  options.python = "/nowhere/python";
  funnel_engine* engine = (funnel_engine*)&options;
  CHECK(funnel_open(&options, &engine, error, sizeof error) == FUNNEL_PYTHON);
  CHECK(strstr(error, "/nowhere/python") != NULL && engine == NULL);

  funnel_engine* plain = open_engine(argv[1]);
  CHECK(funnel_open(&options, &engine, error, sizeof error) == FUNNEL_INVALID_ARGUMENT);
  CHECK(strstr(error, "cannot be exchanged") != NULL);

  float vectors[COUNT * WIDTH], logits[TOKENS * LABELS];
  CHECK(embed(plain, vectors) == FUNNEL_OK);
  print("embed", vectors, COUNT * WIDTH);

  funnel_engine *classifier = open_engine(argv[2]), *tagger = open_engine(argv[3]);
  funnel_info info = FUNNEL_INFO_INIT;
  CHECK(funnel_get_info(classifier, &info, error, sizeof error) == FUNNEL_OK);
  CHECK(info.task == FUNNEL_TASK_CLASSIFY && info.labels <= LABELS);
  const int class_logits = COUNT * info.labels;
  CHECK(funnel_classify(classifier, ids, offsets, COUNT, logits, class_logits, error, sizeof error) == FUNNEL_OK);
  print("classify", logits, class_logits);
  CHECK(funnel_get_info(tagger, &info, error, sizeof error) == FUNNEL_OK);
  CHECK(info.task == FUNNEL_TASK_TAG && info.labels <= LABELS);
  const int tag_logits = TOKENS * info.labels;
  CHECK(funnel_tag(tagger, ids, offsets, COUNT, logits, tag_logits, error, sizeof error) == FUNNEL_OK);
  print("tag", logits, tag_logits);

  /* Threads that Python has never seen. */
  pthread_t threads[THREADS];
  struct job jobs[THREADS];
  for (int i = 0; i < THREADS; ++i) {
    jobs[i] = (struct job){plain, vectors, 50, 0};
    start(&threads[i], call_often, &jobs[i]);
  }
  for (int i = 0; i < THREADS; ++i) {
    pthread_join(threads[i], NULL);
    CHECK(jobs[i].wrong == 0);
  }

  /* 1,000 calls, each from a new thread, keep no memory: less than one allocation of any size for every call. */
  size_t used = 0;
  for (int round = 0; round < 2; ++round) {
    used = mallinfo2().uordblks;
    for (int i = 0; i < 1000; ++i) {
      struct job job = {plain, vectors, 1, 0};
      start(&threads[0], call_often, &job);
      pthread_join(threads[0], NULL);
      CHECK(job.wrong == 0);
    }
  }
  const size_t now = mallinfo2().uordblks;
  CHECK(now < used + 1000 * 16);

  /* Closing under running calls: they finish, later ones are told. */
  for (int i = 0; i < THREADS; ++i) {
    jobs[i] = (struct job){plain, vectors, 0, 0};
    start(&threads[i], call_until_closed, &jobs[i]);
  }
  float out[COUNT * WIDTH];
  for (int i = 0; i < 20; ++i) CHECK(embed(plain, out) == FUNNEL_OK);
  CHECK(funnel_close(plain, error, sizeof error) == FUNNEL_OK);
  for (int i = 0; i < THREADS; ++i) {
    pthread_join(threads[i], NULL);
    CHECK(jobs[i].wrong == 0 && jobs[i].calls > 0);
  }
  CHECK(funnel_close(plain, error, sizeof error) == FUNNEL_CLOSED);
  CHECK(funnel_warmup(plain, error, sizeof error) == FUNNEL_CLOSED);
  CHECK(funnel_close(classifier, error, sizeof error) == FUNNEL_OK);

  for (int number = 1; number <= SIGUSR2; ++number) {
    sigaction(number, NULL, &after);
    CHECK(after.sa_handler == before[number].sa_handler);
  }
  return 0; /* with the tagger open */
}
