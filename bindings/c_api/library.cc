// libfunnel.so, the library that programs link with. It does not need Python to be loaded itself: funnel_open finds
// libpython in the environment that has the package, and then loads the rest, libfunnel_python.so (funnel.cc), from
// beside this library. That one has undefined Python symbols, as extension modules have.

#include <dlfcn.h>

#include <atomic>
#include <climits>
#include <cstddef>
#include <cstdlib>
#include <mutex>
#include <string>

#include "environment.h"
#include "status.h"

namespace funnel_c_api {
namespace {

constexpr char kLibpython[] = "libpython" FUNNEL_PYTHON_VERSION ".so.1.0";

std::atomic<void*> functions{nullptr};  // libfunnel_python.so

// Loads libpython: the one beside the Python executable, as in /opt/python/{bin,lib}, or the system's.
Status load_libpython(const char* given) {
  std::string python;
  const Status found = find_python(given, &python);
  if (!found.ok()) return found;
  char path[PATH_MAX];
  const std::string executable = realpath(python.c_str(), path) != nullptr ? path : python;
  const std::string beside = executable.substr(0, executable.rfind('/')) + "/../lib/" + kLibpython;
  for (const char* library : {beside.c_str(), kLibpython}) {
    if (dlopen(library, RTLD_NOW | RTLD_GLOBAL) != nullptr) return {};
  }
  return {FUNNEL_PYTHON, "there is no " + std::string(kLibpython) + " for " + python + " (tried " + beside +
                             " and the loader's path); install it (Debian: libpython" FUNNEL_PYTHON_VERSION
                             "), or set funnel_options.python to a Python that was built with --enable-shared"};
}

// Makes Python's symbols visible in the whole process, where extension modules such as NumPy's look for them. A host
// may have them already, and a plugin of the host (dlopen with RTLD_LOCAL) may have them out of sight.
Status provide_python(const char* given) {
  const bool is_loaded = dlopen(kLibpython, RTLD_NOW | RTLD_NOLOAD | RTLD_GLOBAL) != nullptr;
  if (!is_loaded && dlsym(RTLD_DEFAULT, "Py_GetVersion") == nullptr) {
    const Status status = load_libpython(given);
    if (!status.ok()) return status;
  }
  const auto get_version = reinterpret_cast<const char* (*)()>(dlsym(RTLD_DEFAULT, "Py_GetVersion"));
  const std::string version = get_version == nullptr ? "unknown" : get_version();
  if (version.rfind(FUNNEL_PYTHON_VERSION ".", 0) == 0) return {};
  return {FUNNEL_PYTHON, "this process has Python " + version.substr(0, version.find(' ')) +
                             ", but this library is for Python " FUNNEL_PYTHON_VERSION "; build it for the other one"};
}

// `python` of the options; their size is checked later.
const char* python_of(const funnel_options* options) {
  const bool has_python = options != nullptr && options->struct_size >= offsetof(funnel_options, options);
  return has_python ? options->python : nullptr;
}

// Calls the function of the same name in libfunnel_python.so.
#define CALL(name, ...) reinterpret_cast<decltype(&name)>(dlsym(functions, #name))(__VA_ARGS__)

// What is known before libfunnel_python.so is loaded. Never destroyed: threads may call until the process ends.
struct Early {
  std::mutex mutex;
  funnel_log_function log = nullptr;
  void* user = nullptr;
};

Early& early() {
  static Early& only = *new Early;
  return only;
}

Status load_functions(const funnel_options* options) {
  if (functions != nullptr) return {};
  std::lock_guard<std::mutex> guard(early().mutex);
  if (functions != nullptr) return {};
  const Status status = provide_python(python_of(options));
  if (!status.ok()) return status;
  functions = dlopen((library_directory() + "/libfunnel_python.so").c_str(), RTLD_NOW | RTLD_LOCAL);
  if (functions == nullptr) {
    return {FUNNEL_PYTHON, std::string("the library's other half cannot be loaded: ") + dlerror()};
  }
  if (early().log != nullptr) CALL(funnel_set_log, early().log, early().user, nullptr, 0);
  return {};
}

Status no_engine(const funnel_engine* engine) {
  return {FUNNEL_INVALID_ARGUMENT, "engine is " + std::string(engine == nullptr ? "NULL" : "no handle") +
                                       "; give one that funnel_open has returned"};
}

}  // namespace
}  // namespace funnel_c_api

using namespace funnel_c_api;

int32_t funnel_api_version(void) { return FUNNEL_API_VERSION; }

const char* funnel_version(void) { return FUNNEL_VERSION; }

funnel_status funnel_set_log(funnel_log_function log, void* user, char* error, size_t error_size) {
  if (functions == nullptr) {
    std::lock_guard<std::mutex> guard(early().mutex);
    if (functions == nullptr) {
      early().log = log;
      early().user = user;
      return answer(error, error_size, [] { return Status{}; });
    }
  }
  return CALL(funnel_set_log, log, user, error, error_size);
}

funnel_status funnel_open(const funnel_options* options, funnel_engine** engine, char* error, size_t error_size) {
  const funnel_status status = answer(error, error_size, [&] { return load_functions(options); });
  if (status == FUNNEL_OK) return CALL(funnel_open, options, engine, error, error_size);
  if (engine != nullptr) *engine = nullptr;
  return status;
}

// A function of funnel.h whose first argument is an engine. Before the first funnel_open there is none.
#define FORWARD(name, parameters, ...)                                   \
  funnel_status name parameters {                                        \
    if (functions != nullptr) return CALL(name, __VA_ARGS__);            \
    return answer(error, error_size, [&] { return no_engine(engine); }); \
  }

FORWARD(funnel_warmup, (funnel_engine* engine, char* error, size_t error_size), engine, error, error_size)

FORWARD(funnel_warmup_buckets,
        (funnel_engine* engine, const int32_t* buckets, int32_t count, funnel_progress_function progress, void* user,
         char* error, size_t error_size),
        engine, buckets, count, progress, user, error, error_size)

FORWARD(funnel_get_info, (funnel_engine* engine, funnel_info* info, char* error, size_t error_size), engine, info,
        error, error_size)

FORWARD(funnel_embed,
        (funnel_engine* engine, const int32_t* ids, const int32_t* offsets, int32_t count, int32_t normalize,
         int32_t truncate_dim, float* out, size_t out_floats, char* error, size_t error_size),
        engine, ids, offsets, count, normalize, truncate_dim, out, out_floats, error, error_size)

FORWARD(funnel_embed_texts,
        (funnel_engine* engine, const char* const* texts, const size_t* lengths, int32_t count, const char* prompt_name,
         int32_t truncate, int32_t normalize, int32_t truncate_dim, float* out, size_t out_floats, char* error,
         size_t error_size),
        engine, texts, lengths, count, prompt_name, truncate, normalize, truncate_dim, out, out_floats, error,
        error_size)

FORWARD(funnel_classify,
        (funnel_engine* engine, const int32_t* ids, const int32_t* offsets, int32_t count, float* out,
         size_t out_floats, char* error, size_t error_size),
        engine, ids, offsets, count, out, out_floats, error, error_size)

FORWARD(funnel_tag,
        (funnel_engine* engine, const int32_t* ids, const int32_t* offsets, int32_t count, float* out,
         size_t out_floats, char* error, size_t error_size),
        engine, ids, offsets, count, out, out_floats, error, error_size)

FORWARD(funnel_embed_typed,
        (funnel_engine* engine, const int32_t* ids, const int32_t* types, const int32_t* offsets, int32_t count,
         int32_t normalize, int32_t truncate_dim, float* out, size_t out_floats, char* error, size_t error_size),
        engine, ids, types, offsets, count, normalize, truncate_dim, out, out_floats, error, error_size)

FORWARD(funnel_classify_typed,
        (funnel_engine* engine, const int32_t* ids, const int32_t* types, const int32_t* offsets, int32_t count,
         float* out, size_t out_floats, char* error, size_t error_size),
        engine, ids, types, offsets, count, out, out_floats, error, error_size)

FORWARD(funnel_tag_typed,
        (funnel_engine* engine, const int32_t* ids, const int32_t* types, const int32_t* offsets, int32_t count,
         float* out, size_t out_floats, char* error, size_t error_size),
        engine, ids, types, offsets, count, out, out_floats, error, error_size)

FORWARD(funnel_answer,
        (funnel_engine* engine, const int32_t* ids, const int32_t* types, const int32_t* offsets, int32_t count,
         float* out, size_t out_floats, char* error, size_t error_size),
        engine, ids, types, offsets, count, out, out_floats, error, error_size)

FORWARD(funnel_stats,
        (funnel_engine* engine, char* json, size_t json_size, size_t* needed, char* error, size_t error_size), engine,
        json, json_size, needed, error, error_size)

FORWARD(funnel_describe,
        (funnel_engine* engine, char* text, size_t text_size, size_t* needed, char* error, size_t error_size), engine,
        text, text_size, needed, error, error_size)

FORWARD(funnel_close, (funnel_engine* engine, char* error, size_t error_size), engine, error, error_size)
