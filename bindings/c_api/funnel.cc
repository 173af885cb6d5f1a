// funnel.h: checks what C callers hand in, keeps the table of open engines, and passes calls on to Python. It is in
// libfunnel_python.so, which libfunnel.so loads (library.cc).

#include "funnel.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

#include "interpreter.h"
#include "status.h"

namespace funnel_c_api {
namespace {

struct Engine {
  Reference host;    // module funnel_engine.c_host
  Reference python;  // funnel_engine.Engine
  funnel_info info;
  mutable std::atomic<uint64_t> runs{0};

  ~Engine() {  // inside a call, so Python still runs
    const InterpreterLock lock;
    host = Reference();
    python = Reference();
  }
};

using EnginePtr = std::shared_ptr<Engine>;

// The open engines by handle. Handles are numbers that are never used twice, so that a closed one is known as such. A
// call shares the engine that it runs on, so closing it meanwhile frees nothing that is in use.
class Table {
 public:
  funnel_engine* add(EnginePtr engine) {
    std::lock_guard<std::mutex> guard(mutex_);
    engines_.emplace(++last_, std::move(engine));
    return reinterpret_cast<funnel_engine*>(last_);
  }

  Status find(const funnel_engine* handle, EnginePtr* engine) { return look_up(handle, engine, /*remove=*/false); }
  Status remove(const funnel_engine* handle, EnginePtr* engine) { return look_up(handle, engine, /*remove=*/true); }

 private:
  Status look_up(const funnel_engine* handle, EnginePtr* engine, bool remove) {
    const auto number = reinterpret_cast<uintptr_t>(handle);
    std::lock_guard<std::mutex> guard(mutex_);
    if (number == 0 || number > last_) {
      return {FUNNEL_INVALID_ARGUMENT, "engine is " + std::string(number == 0 ? "NULL" : "no handle") +
                                           "; give one that funnel_open has returned"};
    }
    const auto found = engines_.find(number);
    if (found == engines_.end()) return {FUNNEL_CLOSED, "the engine was closed; open another one"};
    *engine = found->second;
    if (remove) engines_.erase(found);
    return {};
  }

  std::mutex mutex_;  // never held while waiting for the interpreter's lock
  std::unordered_map<uintptr_t, EnginePtr> engines_;
  uintptr_t last_ = 0;
};

Table& table() {
  static Table& only = *new Table;  // never destroyed: threads may call until the process ends
  return only;
}

Status invalid(std::string message) { return {FUNNEL_INVALID_ARGUMENT, std::move(message)}; }

// Runs the body of an exported function, if it may call Python.
template <typename Body>
funnel_status call(char* error, size_t error_size, Body body) {
  return answer(error, error_size, [&] {
    const Call call;
    return call.status.ok() ? body() : call.status;
  });
}

// `body(engine)` of an open engine.
template <typename Body>
Status with_engine(const funnel_engine* handle, Body body) {
  EnginePtr engine;
  const Status status = table().find(handle, &engine);
  return status.ok() ? body(*engine) : status;
}

// A struct's size is known if it ends after one of its fields.
Status check_struct_size(const char* name, size_t size, std::initializer_list<size_t> known) {
  if (std::find(known.begin(), known.end(), size) != known.end()) return {};
  return invalid(std::string(name) + ".struct_size is " + std::to_string(size) +
                 ", which this version of the library does not know; set it to sizeof(" + name + "), " +
                 std::to_string(*(known.end() - 1)) + " here");
}

Status read_options(const funnel_options* given, funnel_options* options) {
  if (given == nullptr) return invalid("options is NULL; give a funnel_options with a checkpoint");
  const Status status =
      check_struct_size("funnel_options", given->struct_size,
                        {offsetof(funnel_options, python), offsetof(funnel_options, options), sizeof(funnel_options)});
  if (!status.ok()) return status;
  *options = FUNNEL_OPTIONS_INIT;
  std::memcpy(options, given, given->struct_size);
  if (options->checkpoint == nullptr) return invalid("checkpoint is NULL; give a directory that funnel convert wrote");
  return {};
}

// What a caller hands in: see funnel.h.
struct Sequences {
  const int32_t* ids;
  const int32_t* types;
  const int32_t* offsets;
  int32_t count;

  int32_t tokens() const { return offsets[count]; }
};

// Checks the offsets, and with them how many ids may be read. Of the ids it reads none.
Status check_sequences(const Sequences& sequences, int32_t max_length) {
  if (sequences.ids == nullptr || sequences.offsets == nullptr) {
    return invalid(std::string(sequences.ids == nullptr ? "ids" : "offsets") + " is NULL; give token ids and offsets");
  }
  if (sequences.count < 1) {
    return invalid("count is " + std::to_string(sequences.count) + "; give at least one sequence");
  }
  const int32_t* offsets = sequences.offsets;
  if (offsets[0] != 0) return invalid("offsets[0] is " + std::to_string(offsets[0]) + "; it must be 0");
  for (int32_t b = 0; b < sequences.count; ++b) {
    const int64_t length = int64_t{offsets[b + 1]} - offsets[b];
    if (length < 0) {
      return invalid("offsets[" + std::to_string(b + 1) + "] is " + std::to_string(offsets[b + 1]) +
                     ", less than the " + std::to_string(offsets[b]) + " before it; offsets must grow");
    }
    if (length == 0) {
      return {FUNNEL_INPUT, "sequence " + std::to_string(b) + " is empty; give at least one token id"};
    }
    if (length > max_length) {
      return {FUNNEL_INPUT, "sequence " + std::to_string(b) + " has " + std::to_string(length) +
                                " tokens, more than the limit of " + std::to_string(max_length) +
                                "; shorten it, or raise max_batch_tokens if the model allows more"};
    }
  }
  return {};
}

Status check_truncate_dim(int32_t truncate_dim, int32_t size) {
  if (truncate_dim >= 0 && truncate_dim <= size) return {};
  return invalid("truncate_dim is " + std::to_string(truncate_dim) + "; give 1 ... " + std::to_string(size) +
                 ", or 0 for the whole vector");
}

Status check_output(const float* out, size_t out_floats, int32_t rows, int32_t width) {
  const uint64_t needed = uint64_t{static_cast<uint32_t>(rows)} * static_cast<uint32_t>(width);
  if (out == nullptr && out_floats > 0 && needed > 0) {
    return invalid("out is NULL; give memory for " + std::to_string(needed) + " floats");
  }
  if (out_floats >= needed) return {};
  return {FUNNEL_BUFFER_TOO_SMALL, "out has room for " + std::to_string(out_floats) + " floats, but the result has " +
                                       std::to_string(rows) + " x " + std::to_string(width) + " = " +
                                       std::to_string(needed) + "; give a larger buffer"};
}

Reference view(const void* data, size_t values, int flags) {
  auto* bytes = const_cast<char*>(static_cast<const char*>(data));  // PyBUF_READ keeps Python from writing
  return Reference(PyMemoryView_FromMemory(bytes, static_cast<Py_ssize_t>(values * 4), flags));
}

Reference view_out(float* out, int32_t rows, int32_t width) {
  static float nothing;  // for a result of no floats: without a classifier, labels is 0
  return view(out != nullptr ? out : &nothing, static_cast<size_t>(rows) * static_cast<size_t>(width), PyBUF_WRITE);
}

// Calls `function(engine, arguments...)` of the host, with the lock held.
template <typename... Arguments>
Status call_host(const Engine& engine, const char* function, const char* format, Arguments... arguments) {
  const Reference done(PyObject_CallMethod(engine.host.get(), function, format, engine.python.get(), arguments...));
  return done ? Status{} : raised(engine.host.get());
}

// After a program was compiled or the model has run. What JAX makes late, it makes in the first of these; later ones
// are followed ever more rarely, because `exit` keeps each entry.
void register_for_exit(const Engine& engine) {
  const uint64_t runs = ++engine.runs;
  if ((runs & (runs - 1)) == 0) wait_at_exit();
}

// Calls `function(engine, ids, types, offsets, extra..., out)` of the host; `out` has rows x width floats.
template <typename... Extra>
Status run(const Engine& engine, const char* function, const char* format, const Sequences& sequences, float* out,
           int32_t rows, int32_t width, Extra... extra) {
  const InterpreterLock lock;
  const size_t count = static_cast<size_t>(sequences.count), tokens = static_cast<size_t>(sequences.tokens());
  const Reference ids = view(sequences.ids, tokens, PyBUF_READ);
  const Reference types =
      sequences.types == nullptr ? Reference(Py_NewRef(Py_None)) : view(sequences.types, tokens, PyBUF_READ);
  const Reference offsets = view(sequences.offsets, count + 1, PyBUF_READ);
  const Reference result = view_out(out, rows, width);
  if (!ids || !types || !offsets || !result) return raised(engine.host.get());
  const Status status =
      call_host(engine, function, format, ids.get(), types.get(), offsets.get(), extra..., result.get());
  register_for_exit(engine);
  return status;
}

// Where funnel_set_log sends what is logged. The mutex is held while the function runs, and never waited for with the
// interpreter's lock.
struct Log {
  std::mutex mutex;
  std::atomic<funnel_log_function> function{nullptr};
  void* user = nullptr;
  PyObject* host = nullptr;  // module funnel_engine.c_host once it is imported; guarded by the interpreter's lock
};

Log& the_log() {
  static Log& only = *new Log;  // never destroyed, like the table
  return only;
}

// write_log(level, message), for Python.
PyObject* write_log(PyObject*, PyObject* arguments) {
  int level;
  const char* message;
  if (!PyArg_ParseTuple(arguments, "iy", &level, &message)) return nullptr;
  if (!Callback::runs_here()) {  // what a callback of the host logs itself would come back to it
    const Callback callback;
    Log& log = the_log();
    std::lock_guard<std::mutex> guard(log.mutex);
    const funnel_log_function function = log.function;
    if (function != nullptr) function(level, message, log.user);
  }
  Py_RETURN_NONE;
}

// Has Python log to `write_log` if a function is set, and to where it did before if none is. Needs the lock.
Status connect_log() {
  Log& log = the_log();
  if (log.host == nullptr) return {};
  static PyMethodDef method = {"write_log", write_log, METH_VARARGS, nullptr};
  const Reference write(log.function != nullptr ? PyCFunction_New(&method, nullptr) : Py_NewRef(Py_None));
  const Reference done(write ? PyObject_CallMethod(log.host, "log_to", "O", write.get()) : nullptr);
  return done ? Status{} : raised(log.host);
}

Status set_log(funnel_log_function function, void* user) {
  {
    Log& log = the_log();
    std::lock_guard<std::mutex> guard(log.mutex);
    log.function = function;
    log.user = user;
  }
  if (!Py_IsInitialized()) return {};
  const InterpreterLock lock;
  return connect_log();
}

Status open(const funnel_options* given, funnel_engine** handle) {
  if (handle == nullptr) return invalid("engine is NULL; give a place for the handle");
  funnel_options options;
  Status status = read_options(given, &options);
  if (!status.ok()) return status;
  status = start_interpreter(options.python);
  if (!status.ok()) return status;
  auto engine = std::make_shared<Engine>();
  {
    const InterpreterLock lock;
    status = import_host(&engine->host);
    if (!status.ok()) return status;
    the_log().host = engine->host.get();  // a module stays imported
    status = connect_log();
    if (!status.ok()) return status;
    const Reference opened(
        PyObject_CallMethod(engine->host.get(), "open_engine", "yy", options.checkpoint, options.options));
    funnel_info& info = engine->info;
    PyObject* python;
    if (!opened || !PyArg_ParseTuple(opened.get(), "O(iiiii)", &python, &info.embedding_size, &info.labels,
                                     &info.max_length, &info.vocabulary_size, &info.task)) {
      return raised(engine->host.get());
    }
    Py_INCREF(python);
    engine->python = Reference(python);
  }
  register_for_exit(*engine);
  *handle = table().add(std::move(engine));
  return {};
}

struct Progress {
  const Engine& engine;
  funnel_progress_function function;
  void* user;
};

// report_progress(done, total) -> whether to stop, for Python.
PyObject* report_progress(PyObject* progress, PyObject* arguments) {
  int done, total;
  if (!PyArg_ParseTuple(arguments, "ii", &done, &total)) return nullptr;
  const auto [engine, function, user] = *static_cast<Progress*>(PyCapsule_GetPointer(progress, nullptr));
  register_for_exit(engine);
  bool stop = stopping();
  if (!stop && function != nullptr) {
    const Callback callback;
    stop = function(done, total, user) != 0;
  }
  return PyBool_FromLong(stop);
}

Status warmup(const int32_t* buckets, int32_t count, Progress progress) {
  const Engine& engine = progress.engine;
  if (count < 0) return invalid("count is " + std::to_string(count) + "; give the number of buckets");
  if ((buckets == nullptr) != (count == 0)) {
    return invalid(std::string("buckets is ") + (buckets == nullptr ? "NULL" : "given") + " but count is " +
                   std::to_string(count) + "; give numbers of rows, or NULL and 0 for all buckets");
  }
  static PyMethodDef method = {"report_progress", report_progress, METH_VARARGS, nullptr};
  const InterpreterLock lock;
  const Reference rows =
      buckets == nullptr ? Reference(Py_NewRef(Py_None)) : view(buckets, static_cast<size_t>(count), PyBUF_READ);
  const Reference capsule(PyCapsule_New(&progress, nullptr, nullptr));
  const Reference report(capsule ? PyCFunction_New(&method, capsule.get()) : nullptr);
  if (!rows || !report) return raised(engine.host.get());
  return call_host(engine, "warmup", "OOO", rows.get(), report.get());
}

Status get_info(const Engine& engine, funnel_info* info) {
  if (info == nullptr) return invalid("info is NULL; give a funnel_info with its struct_size");
  const Status status = check_struct_size("funnel_info", info->struct_size, {sizeof(funnel_info)});
  if (!status.ok()) return status;
  *info = engine.info;
  info->struct_size = sizeof(funnel_info);
  return {};
}

Status embed(const Engine& engine, const Sequences& sequences, int32_t normalize, int32_t truncate_dim, float* out,
             size_t out_floats) {
  const int32_t size = engine.info.embedding_size;
  Status status = check_truncate_dim(truncate_dim, size);
  if (status.ok()) status = check_sequences(sequences, engine.info.max_length);
  if (!status.ok()) return status;
  const int32_t width = truncate_dim == 0 ? size : truncate_dim;
  status = check_output(out, out_floats, sequences.count, width);
  if (!status.ok()) return status;
  return run(engine, "embed", "OOOOiiO", sequences, out, sequences.count, width, static_cast<int>(normalize),
             static_cast<int>(truncate_dim));
}

// What a caller hands in: see funnel.h.
struct Texts {
  const char* const* texts;
  const size_t* lengths;
  int32_t count;
};

Status check_texts(const Texts& given) {
  if (given.texts == nullptr) return invalid("texts is NULL; give texts");
  if (given.count < 1) return invalid("count is " + std::to_string(given.count) + "; give at least one text");
  for (int32_t b = 0; b < given.count; ++b) {
    if (given.texts[b] == nullptr) return invalid("texts[" + std::to_string(b) + "] is NULL; give a text");
    if (given.lengths != nullptr && given.lengths[b] > PY_SSIZE_T_MAX) {
      return invalid("lengths[" + std::to_string(b) + "] is " + std::to_string(given.lengths[b]) +
                     ", more than memory can hold; give the number of bytes");
    }
  }
  return {};
}

Status embed_texts(const Engine& engine, const Texts& given, const char* prompt_name, int32_t truncate,
                   int32_t normalize, int32_t truncate_dim, float* out, size_t out_floats) {
  const int32_t size = engine.info.embedding_size, width = truncate_dim == 0 ? size : truncate_dim;
  Status status = check_truncate_dim(truncate_dim, size);
  if (status.ok()) status = check_texts(given);
  if (status.ok()) status = check_output(out, out_floats, given.count, width);
  if (!status.ok()) return status;
  const InterpreterLock lock;
  const Reference texts(PyList_New(given.count)), result = view_out(out, given.count, width);
  if (!texts || !result) return raised(engine.host.get());
  for (int32_t b = 0; b < given.count; ++b) {
    const size_t length = given.lengths != nullptr ? given.lengths[b] : std::strlen(given.texts[b]);
    PyObject* text = PyBytes_FromStringAndSize(given.texts[b], static_cast<Py_ssize_t>(length));
    if (text == nullptr) return raised(engine.host.get());
    PyList_SET_ITEM(texts.get(), b, text);
  }
  status = call_host(engine, "embed_texts", "OOyiiiO", texts.get(), prompt_name, static_cast<int>(truncate),
                     static_cast<int>(normalize), static_cast<int>(truncate_dim), result.get());
  register_for_exit(engine);
  return status;
}

// Classification writes one row of logits a sequence; tagging and answers write one a token.
Status label(const Engine& engine, const char* function, const Sequences& sequences, bool per_token, float* out,
             size_t out_floats) {
  Status status = check_sequences(sequences, engine.info.max_length);
  if (!status.ok()) return status;
  const int32_t rows = per_token ? sequences.tokens() : sequences.count;
  status = check_output(out, out_floats, rows, engine.info.labels);
  if (!status.ok()) return status;
  return run(engine, function, "OOOOO", sequences, out, rows, engine.info.labels);
}

// Writes the text that `function(engine)` of the host returns, with a final 0, into the caller's memory.
Status write_text(const Engine& engine, const char* function, const char* name, char* out, size_t out_size,
                  size_t* needed) {
  const InterpreterLock lock;
  const Reference text(PyObject_CallMethod(engine.host.get(), function, "O", engine.python.get()));
  char* bytes;
  Py_ssize_t length;
  if (!text || PyBytes_AsStringAndSize(text.get(), &bytes, &length) != 0) return raised(engine.host.get());
  const size_t size = static_cast<size_t>(length) + 1;
  if (needed != nullptr) *needed = size;
  if (out == nullptr && out_size > 0) {
    return invalid(std::string(name) + " is NULL but " + name + "_size is " + std::to_string(out_size));
  }
  if (out_size < size) {
    return {FUNNEL_BUFFER_TOO_SMALL, std::string(name) + " has room for " + std::to_string(out_size) +
                                         " bytes, but the text needs " + std::to_string(size) +
                                         "; give a larger buffer"};
  }
  std::memcpy(out, bytes, size);
  return {};
}

Status close(const funnel_engine* handle) {
  EnginePtr engine;  // freed here, after the table's lock, unless a call still shares it
  return table().remove(handle, &engine);
}

}  // namespace
}  // namespace funnel_c_api

using namespace funnel_c_api;  // the exported functions only pass on

funnel_status funnel_open(const funnel_options* options, funnel_engine** engine, char* error, size_t error_size) {
  if (engine != nullptr) *engine = nullptr;
  return call(error, error_size, [&] { return open(options, engine); });
}

funnel_status funnel_warmup(funnel_engine* engine, char* error, size_t error_size) {
  return funnel_warmup_buckets(engine, nullptr, 0, nullptr, nullptr, error, error_size);
}

funnel_status funnel_warmup_buckets(funnel_engine* engine, const int32_t* buckets, int32_t count,
                                    funnel_progress_function progress, void* user, char* error, size_t error_size) {
  return call(error, error_size, [&] {
    return with_engine(engine, [&](const Engine& open) { return warmup(buckets, count, {open, progress, user}); });
  });
}

funnel_status funnel_get_info(funnel_engine* engine, funnel_info* info, char* error, size_t error_size) {
  return call(error, error_size,
              [&] { return with_engine(engine, [&](const Engine& open) { return get_info(open, info); }); });
}

funnel_status funnel_embed(funnel_engine* engine, const int32_t* ids, const int32_t* offsets, int32_t count,
                           int32_t normalize, int32_t truncate_dim, float* out, size_t out_floats, char* error,
                           size_t error_size) {
  return funnel_embed_typed(engine, ids, nullptr, offsets, count, normalize, truncate_dim, out, out_floats, error,
                            error_size);
}

funnel_status funnel_embed_typed(funnel_engine* engine, const int32_t* ids, const int32_t* types,
                                 const int32_t* offsets, int32_t count, int32_t normalize, int32_t truncate_dim,
                                 float* out, size_t out_floats, char* error, size_t error_size) {
  return call(error, error_size, [&] {
    return with_engine(engine, [&](const Engine& open) {
      return embed(open, {ids, types, offsets, count}, normalize, truncate_dim, out, out_floats);
    });
  });
}

funnel_status funnel_embed_texts(funnel_engine* engine, const char* const* texts, const size_t* lengths, int32_t count,
                                 const char* prompt_name, int32_t truncate, int32_t normalize, int32_t truncate_dim,
                                 float* out, size_t out_floats, char* error, size_t error_size) {
  return call(error, error_size, [&] {
    return with_engine(engine, [&](const Engine& open) {
      return embed_texts(open, {texts, lengths, count}, prompt_name, truncate, normalize, truncate_dim, out,
                         out_floats);
    });
  });
}

funnel_status funnel_classify(funnel_engine* engine, const int32_t* ids, const int32_t* offsets, int32_t count,
                              float* out, size_t out_floats, char* error, size_t error_size) {
  return funnel_classify_typed(engine, ids, nullptr, offsets, count, out, out_floats, error, error_size);
}

funnel_status funnel_tag(funnel_engine* engine, const int32_t* ids, const int32_t* offsets, int32_t count, float* out,
                         size_t out_floats, char* error, size_t error_size) {
  return funnel_tag_typed(engine, ids, nullptr, offsets, count, out, out_floats, error, error_size);
}

funnel_status funnel_classify_typed(funnel_engine* engine, const int32_t* ids, const int32_t* types,
                                    const int32_t* offsets, int32_t count, float* out, size_t out_floats, char* error,
                                    size_t error_size) {
  return call(error, error_size, [&] {
    return with_engine(engine, [&](const Engine& open) {
      return label(open, "classify", {ids, types, offsets, count}, /*per_token=*/false, out, out_floats);
    });
  });
}

funnel_status funnel_tag_typed(funnel_engine* engine, const int32_t* ids, const int32_t* types, const int32_t* offsets,
                               int32_t count, float* out, size_t out_floats, char* error, size_t error_size) {
  return call(error, error_size, [&] {
    return with_engine(engine, [&](const Engine& open) {
      return label(open, "tag", {ids, types, offsets, count}, /*per_token=*/true, out, out_floats);
    });
  });
}

funnel_status funnel_answer(funnel_engine* engine, const int32_t* ids, const int32_t* types, const int32_t* offsets,
                            int32_t count, float* out, size_t out_floats, char* error, size_t error_size) {
  return call(error, error_size, [&] {
    return with_engine(engine, [&](const Engine& open) {
      return label(open, "answer", {ids, types, offsets, count}, /*per_token=*/true, out, out_floats);
    });
  });
}

funnel_status funnel_stats(funnel_engine* engine, char* json, size_t json_size, size_t* needed, char* error,
                           size_t error_size) {
  return call(error, error_size, [&] {
    return with_engine(engine,
                       [&](const Engine& open) { return write_text(open, "stats", "json", json, json_size, needed); });
  });
}

funnel_status funnel_describe(funnel_engine* engine, char* text, size_t text_size, size_t* needed, char* error,
                              size_t error_size) {
  return call(error, error_size, [&] {
    return with_engine(
        engine, [&](const Engine& open) { return write_text(open, "describe", "text", text, text_size, needed); });
  });
}

funnel_status funnel_set_log(funnel_log_function log, void* user, char* error, size_t error_size) {
  return call(error, error_size, [&] { return set_log(log, user); });
}

funnel_status funnel_close(funnel_engine* engine, char* error, size_t error_size) {
  return call(error, error_size, [&] { return close(engine); });
}
