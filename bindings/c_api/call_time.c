/* Times funnel_embed for `python -m funnel_benchmarks.c_api`: funnel_call_time CHECKPOINT OPTIONS TOKENS VOCABULARY
 *
 * Embeds one sequence of TOKENS ids, 0, 1, 2 ... modulo VOCABULARY. For every line on standard input, "main N" or
 * "thread N", it makes N calls, from the thread that has opened the engine or from a new one, and answers with a line
 * of their N times in nanoseconds. */
#define _POSIX_C_SOURCE 200809L

#include <funnel.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static char error[512];

struct job {
  funnel_engine* engine;
  const int32_t* ids;
  const int32_t* offsets;
  float* out;
  size_t out_floats;
  int calls;
  int64_t* nanoseconds;
};

static void check(funnel_status status) {
  if (status == FUNNEL_OK) return;
  fprintf(stderr, "status %d: %s\n", (int)status, error);
  exit(1);
}

static int64_t now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static void* run(void* argument) {
  struct job* job = argument;
  for (int i = 0; i < job->calls; ++i) {
    const int64_t start = now();
    check(funnel_embed(job->engine, job->ids, job->offsets, 1, 1, 0, job->out, job->out_floats, error, sizeof error));
    job->nanoseconds[i] = now() - start;
  }
  return NULL;
}

int main(int argc, char** argv) {
  if (argc != 5) {
    fprintf(stderr, "usage: %s CHECKPOINT OPTIONS TOKENS VOCABULARY\n", argv[0]);
    return 1;
  }
  const int32_t tokens = atoi(argv[3]), vocabulary = atoi(argv[4]);
  const int32_t offsets[] = {0, tokens};
  int32_t* ids = malloc((size_t)tokens * sizeof *ids);
  for (int32_t i = 0; i < tokens; ++i) ids[i] = i % vocabulary;
  funnel_options options = FUNNEL_OPTIONS_INIT;
  options.checkpoint = argv[1];
  options.options = argv[2];
  funnel_engine* engine;
  check(funnel_open(&options, &engine, error, sizeof error));
  funnel_info info = FUNNEL_INFO_INIT;
  check(funnel_get_info(engine, &info, error, sizeof error));
  const size_t out_floats = (size_t)info.embedding_size;
  float* out = malloc(out_floats * sizeof *out);

  char where[8];
  int calls;
  while (scanf("%7s %d", where, &calls) == 2) {
    int64_t* nanoseconds = malloc((size_t)calls * sizeof *nanoseconds);
    struct job job = {engine, ids, offsets, out, out_floats, calls, nanoseconds};
    if (strcmp(where, "main") == 0) {
      run(&job);
    } else {
      pthread_t thread;
      if (pthread_create(&thread, NULL, run, &job) != 0) return 1;
      pthread_join(thread, NULL);
    }
    for (int i = 0; i < calls; ++i) printf("%" PRId64 "%c", nanoseconds[i], i + 1 < calls ? ' ' : '\n');
    fflush(stdout);
    free(nanoseconds);
  }
  check(funnel_close(engine, error, sizeof error));
  free(out);
  free(ids);
  return 0;
}
