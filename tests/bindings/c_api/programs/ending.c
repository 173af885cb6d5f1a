/* ending calls|warmup CHECKPOINT: `main` returns while threads call. They must be waited for, and then be refused. */
#define _POSIX_C_SOURCE 200809L

#include <funnel.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define CHECK(condition)                                                             \
  do {                                                                               \
    if (!(condition)) {                                                              \
      fprintf(stderr, "line %d: %s; last error: %s\n", __LINE__, #condition, error); \
      _exit(1);                                                                      \
    }                                                                                \
  } while (0)

enum { COUNT = 3, WIDTH = 24, THREADS = 4 };
static const int32_t ids[] = {2, 17, 93, 5, 2, 40, 41, 42, 43, 2, 99, 7}, offsets[] = {0, 4, 9, 12};
static char error[512];
static funnel_engine* engine;
static pthread_t threads[THREADS];
static int started;
static sem_t working; /* posted once by each thread that is at work */
static funnel_status expected;

static void* call_until_refused(void* unused) {
  (void)unused;
  char message[512];
  float out[COUNT * WIDTH];
  funnel_status status = funnel_embed(engine, ids, offsets, COUNT, 1, 0, out, COUNT * WIDTH, message, sizeof message);
  sem_post(&working);
  while (status == FUNNEL_OK) {
    status = funnel_embed(engine, ids, offsets, COUNT, 1, 0, out, COUNT * WIDTH, message, sizeof message);
  }
  CHECK(status == expected && strstr(message, "is ending") != NULL);
  return NULL;
}

static int slow(int32_t done, int32_t total, void* user) {
  CHECK(done <= total && user == &working);
  if (done == 1) sem_post(&working);
  nanosleep(&(struct timespec){0, 200000000}, NULL);
  return 0;
}

static void* warm_up(void* unused) {
  (void)unused;
  char message[512];
  const funnel_status status = funnel_warmup_buckets(engine, NULL, 0, slow, &working, message, sizeof message);
  CHECK(status == expected && strstr(message, "stopped after ") != NULL);
  return NULL;
}

/* Registered before the library was used, so it runs after what the library does at exit. */
static void check_threads(void) {
  for (int i = 0; i < started; ++i) pthread_join(threads[i], NULL);
  CHECK(funnel_close(engine, error, sizeof error) == FUNNEL_PYTHON);
}

int main(int argc, char** argv) {
  CHECK(argc == 3);
  atexit(check_threads);
  sem_init(&working, 0, 0);
  funnel_options options = FUNNEL_OPTIONS_INIT;
  options.checkpoint = argv[2];
  options.options = "{\"max_batch_tokens\": 64}";
  CHECK(funnel_open(&options, &engine, error, sizeof error) == FUNNEL_OK);
  const int calls = strcmp(argv[1], "calls") == 0;
  started = calls ? THREADS : 1;
  expected = calls ? FUNNEL_PYTHON : FUNNEL_CANCELLED;
  for (int i = 0; i < started; ++i) {
    CHECK(pthread_create(&threads[i], NULL, calls ? call_until_refused : warm_up, NULL) == 0);
  }
  for (int i = 0; i < started; ++i) sem_wait(&working);
  return 0;
}
