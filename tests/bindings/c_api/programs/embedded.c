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
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(condition)                                                             \
  do {                                                                               \
    if (!(condition)) {                                                              \
      fprintf(stderr, "line %d: %s; last error: %s\n", __LINE__, #condition, error); \
      exit(1);                                                                       \
    }                                                                                \
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

extern char** environ;

/* Prints "environment" and the names of variables that were not there when the program started. */
static void print_new_variables(char* const* before) {
  printf("environment\n");
  for (char** variable = environ; *variable != NULL; ++variable) {
    int known = 0;
    for (char* const* old = before; *old != NULL; ++old) known |= strcmp(*old, *variable) == 0;
    if (!known) printf("%.*s ", (int)strcspn(*variable, "="), *variable);
  }
  printf("\n");
}

/* A child of a process that has an engine is refused everything, at once. */
static void refuse_in_a_fork(funnel_engine* engine, const char* checkpoint) {
  fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    float out[COUNT * WIDTH];
    funnel_info info = FUNNEL_INFO_INIT;
    funnel_engine* another;
    funnel_options options = FUNNEL_OPTIONS_INIT;
    options.checkpoint = checkpoint;
    const int refused = embed(engine, out) == FUNNEL_PYTHON &&
                        funnel_warmup(engine, error, sizeof error) == FUNNEL_PYTHON &&
                        funnel_get_info(engine, &info, error, sizeof error) == FUNNEL_PYTHON &&
                        funnel_stats(engine, NULL, 0, NULL, error, sizeof error) == FUNNEL_PYTHON &&
                        funnel_set_log(NULL, NULL, error, sizeof error) == FUNNEL_PYTHON &&
                        funnel_close(engine, error, sizeof error) == FUNNEL_PYTHON &&
                        funnel_open(&options, &another, error, sizeof error) == FUNNEL_PYTHON;
    _exit(refused && another == NULL && strstr(error, "is a fork of") != NULL ? 0 : 1);
  }
  int status;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

int main(int argc, char** argv) {
  CHECK(argc == 4);
  size_t variables = 0;
  while (environ[variables] != NULL) ++variables;
  char** before_opening = malloc((variables + 1) * sizeof *before_opening);
  memcpy(before_opening, environ, (variables + 1) * sizeof *before_opening);
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

  print_new_variables(before_opening);
  free(before_opening);
  refuse_in_a_fork(plain, argv[1]);

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
