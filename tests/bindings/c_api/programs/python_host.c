/* python_host CASE PYTHON CHECKPOINT: a host that runs a Python interpreter of its own. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <funnel.h>
#include <pthread.h>
#include <string.h>

#define CHECK(condition)                                                             \
  do {                                                                               \
    if (!(condition)) {                                                              \
      fprintf(stderr, "line %d: %s; last error: %s\n", __LINE__, #condition, error); \
      exit(1);                                                                       \
    }                                                                                \
  } while (0)

enum { COUNT = 3, WIDTH = 24, THREADS = 4 };
static const int32_t ids[] = {2, 17, 93, 5, 2, 40, 41, 42, 43, 2, 99, 7}, offsets[] = {0, 4, 9, 12};
static char error[512];
static const char* checkpoint;
static funnel_engine* engine;

static void start_python(const char* executable) {
  PyConfig config;
  PyConfig_InitPythonConfig(&config);
  PyConfig_SetBytesString(&config, &config.program_name, executable);
  CHECK(!PyStatus_Exception(Py_InitializeFromConfig(&config)));
  PyConfig_Clear(&config);
}

static funnel_status open_engine(void) {
  funnel_options options = FUNNEL_OPTIONS_INIT;
  options.checkpoint = checkpoint;
  options.options = "{\"max_batch_tokens\": 16}";
  return funnel_open(&options, &engine, error, sizeof error);
}

static funnel_status embed_ids(int32_t count) {
  float out[COUNT * WIDTH];
  return funnel_embed(engine, ids, offsets, count, 1, 0, out, COUNT * WIDTH, error, sizeof error);
}

static int refused(funnel_status status, const char* text) {
  return status == FUNNEL_PYTHON && strstr(error, text) != NULL;
}

/* Python ran and was stopped before the library is first used. */
static void stopped_before(void) {
  PyRun_SimpleString("import jax");
  CHECK(Py_FinalizeEx() == 0);
  CHECK(refused(open_engine(), "was stopped") && engine == NULL);
}

static void stopped_after(void) {
  CHECK(open_engine() == FUNNEL_OK && embed_ids(COUNT) == FUNNEL_OK);
  funnel_engine* open = engine;
  CHECK(Py_FinalizeEx() == 0);
  CHECK(refused(embed_ids(COUNT), "is ending") && refused(open_engine(), "is ending") && engine == NULL);
  CHECK(refused(funnel_close(open, error, sizeof error), "is ending"));
}

static void* call_until_refused(void* unused) {
  (void)unused;
  char message[512];
  float out[COUNT * WIDTH];
  while (1) {
    const funnel_status status =
        funnel_embed(engine, ids, offsets, COUNT, 1, 0, out, COUNT * WIDTH, message, sizeof message);
    if (status != FUNNEL_OK) return status == FUNNEL_PYTHON ? NULL : &engine;
  }
}

static void stopped_under_calls(void) {
  CHECK(open_engine() == FUNNEL_OK && embed_ids(COUNT) == FUNNEL_OK);
  pthread_t threads[THREADS];
  for (int i = 0; i < THREADS; ++i) CHECK(pthread_create(&threads[i], NULL, call_until_refused, NULL) == 0);
  for (int i = 0; i < 20; ++i) CHECK(embed_ids(COUNT) == FUNNEL_OK);
  CHECK(Py_FinalizeEx() == 0);
  for (int i = 0; i < THREADS; ++i) {
    void* wrong;
    CHECK(pthread_join(threads[i], &wrong) == 0 && wrong == NULL);
  }
}

/* Calls leave an exception that the host has pending as it is, whether they fail or not. */
static void pending_exception(void) {
  PyErr_SetString(PyExc_KeyError, "of the host");
  CHECK(open_engine() == FUNNEL_OK && embed_ids(COUNT) == FUNNEL_OK);
  CHECK(funnel_tag(engine, ids, offsets, 1, NULL, 0, error, sizeof error) == FUNNEL_CONFIG);
  CHECK(funnel_close(engine, error, sizeof error) == FUNNEL_OK);
  checkpoint = "/nowhere";
  CHECK(open_engine() == FUNNEL_CHECKPOINT);
  CHECK(PyErr_ExceptionMatches(PyExc_KeyError));
  PyErr_Clear();
}

static void count(int32_t level, const char* message, void* user) {
  if (level == FUNNEL_LOG_WARNING && strcmp(message, "of the host") == 0) ++*(int*)user;
}

/* A log function that is set before anything is loaded is used. */
static void early_log(void) {
  int logged = 0;
  CHECK(funnel_set_log(count, &logged, error, sizeof error) == FUNNEL_OK);
  CHECK(open_engine() == FUNNEL_OK);
  CHECK(PyRun_SimpleString("import logging; logging.warning('of the host')") == 0 && logged == 1);
  CHECK(funnel_set_log(NULL, NULL, error, sizeof error) == FUNNEL_OK);
  CHECK(PyRun_SimpleString("logging.warning('of the host')") == 0 && logged == 1);
}

static void subinterpreter(void) {
  PyThreadState* main_state = PyThreadState_Get();
  PyThreadState* other = Py_NewInterpreter();
  CHECK(other != NULL && refused(open_engine(), "sub-interpreters") && engine == NULL);
  Py_EndInterpreter(other);
  PyThreadState_Swap(main_state);
  CHECK(open_engine() == FUNNEL_OK);
  other = Py_NewInterpreter();
  CHECK(other != NULL && refused(embed_ids(COUNT), "sub-interpreters"));
  Py_EndInterpreter(other);
  PyThreadState_Swap(main_state);
  CHECK(embed_ids(COUNT) == FUNNEL_OK);
}

int main(int argc, char** argv) {
  const struct {
    const char* name;
    void (*run)(void);
  } cases[] = {{"stopped_before", stopped_before},
               {"stopped_after", stopped_after},
               {"stopped_under_calls", stopped_under_calls},
               {"pending_exception", pending_exception},
               {"early_log", early_log},
               {"subinterpreter", subinterpreter}};
  CHECK(argc == 4);
  start_python(argv[2]);
  checkpoint = argv[3];
  for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i) {
    if (strcmp(cases[i].name, argv[1]) == 0) {
      cases[i].run();
      return 0;
    }
  }
  return 2;
}
