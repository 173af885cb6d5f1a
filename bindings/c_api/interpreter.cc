#include "interpreter.h"

#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <string>

#include "environment.h"

namespace funnel_c_api {
namespace {

// The process that has an interpreter, or 0. In its children there are neither the threads that JAX needs nor those
// that may have held a lock when they were made.
std::atomic<pid_t> python_process{0};

bool forked() {
  const pid_t process = python_process;
  return process != 0 && process != getpid();
}

// The calls that run. Never destroyed: threads may call until the process ends.
struct Running {
  std::mutex mutex;
  std::condition_variable changed;
  int calls = 0;
  bool stopping = false;
};

Running& running() {
  static Running& only = *new Running;
  return only;
}

thread_local int calls_here = 0;  // of the thread: 1 inside a call
thread_local bool in_callback = false;

// Python's lock belongs to a thread of the main interpreter or of another, and Python cannot say which.
bool has_subinterpreters() { return PyInterpreterState_Head() != PyInterpreterState_Main(); }

// Refuses calls from now on, and waits for those that run, except this thread's own.
void stop() {
  Running& all = running();
  std::unique_lock<std::mutex> lock(all.mutex);
  all.stopping = true;
  all.changed.wait(lock, [&] { return all.calls <= calls_here; });
}

void stop_at_exit() {
  if (forked()) return;
  const bool locked = Py_IsInitialized() && !has_subinterpreters() && PyGILState_Check();
  PyThreadState* saved = locked ? PyEval_SaveThread() : nullptr;  // the calls that run need the lock
  stop();
  if (locked) PyEval_RestoreThread(saved);
}

// For Python's module atexit: the host stops its interpreter.
PyObject* stop_before_python(PyObject*, PyObject*) {
  if (!forked()) {
    Py_BEGIN_ALLOW_THREADS;
    stop();
    Py_END_ALLOW_THREADS;
  }
  Py_RETURN_NONE;
}

// Has Python call the above before it ends. Needs the lock.
bool wait_before_python_ends() {
  static bool done = false;
  static PyMethodDef method = {"funnel_stop", stop_before_python, METH_NOARGS, nullptr};
  if (done) return true;
  const Reference module(PyImport_ImportModule("atexit")), function(PyCFunction_New(&method, nullptr));
  const Reference answer(module && function ? PyObject_CallMethod(module.get(), "register", "O", function.get())
                                            : nullptr);
  return done = static_cast<bool>(answer);
}

// Whether an interpreter ran here before and is gone, whoever started it: the first start gives each built-in type its
// base, for good.
bool was_stopped() { return !Py_IsInitialized() && PyDict_Type.tp_base != nullptr; }

// Starts Python as `python` would: with its environment's packages, but without PYTHON* variables, signal handlers, or
// the working directory on its path. UTF-8 is its encoding whatever the host's locale is.
PyStatus initialize(const char* python) {
  PyPreConfig before;
  PyPreConfig_InitIsolatedConfig(&before);
  before.utf8_mode = 1;
  PyStatus status = Py_PreInitialize(&before);
  if (PyStatus_Exception(status)) return status;
  PyConfig config;
  PyConfig_InitIsolatedConfig(&config);
  config.install_signal_handlers = 0;
  status = PyConfig_SetBytesString(&config, &config.program_name, python);
  if (!PyStatus_Exception(status)) status = Py_InitializeFromConfig(&config);
  PyConfig_Clear(&config);
  return status;
}

// Python's module `signal` takes over SIGINT when it is first imported, whatever the configuration says. That happens
// here, and the host gets its handler back.
void keep_sigint() {
  struct sigaction before;
  sigaction(SIGINT, nullptr, &before);
  Reference module(PyImport_ImportModule("signal"));
  PyErr_Clear();
  sigaction(SIGINT, &before, nullptr);
}

Reference take_exception() {
#if PY_VERSION_HEX >= 0x030C0000
  return Reference(PyErr_GetRaisedException());
#else
  PyObject *type, *value, *traceback;
  PyErr_Fetch(&type, &value, &traceback);
  PyErr_NormalizeException(&type, &value, &traceback);
  Py_XDECREF(type);
  Py_XDECREF(traceback);
  return Reference(value);
#endif
}

}  // namespace

Call::Call() {
  if (forked()) {
    status = {FUNNEL_PYTHON,
              "this process is a fork of the one that opened an engine, and neither Python's threads "
              "nor JAX's are in it; open engines after the fork only, or start a new program"};
  } else if (in_callback) {
    status = {FUNNEL_INVALID_ARGUMENT, "a callback cannot call this library; return from it first"};
  } else if (has_subinterpreters()) {
    status = {FUNNEL_PYTHON,
              "this process has Python sub-interpreters, in which neither NumPy nor JAX runs; end them "
              "before the call, or use a process of its own"};
  } else {
    Running& all = running();
    std::lock_guard<std::mutex> guard(all.mutex);
    if (all.stopping) {
      status = {FUNNEL_PYTHON, "the process or its interpreter is ending; start a new process"};
    } else {
      entered_ = true;
      ++all.calls;
      ++calls_here;
    }
  }
}

Call::~Call() {
  if (!entered_) return;
  Running& all = running();
  std::lock_guard<std::mutex> guard(all.mutex);
  --all.calls;
  --calls_here;
  if (all.stopping) all.changed.notify_all();
}

bool Callback::runs_here() { return in_callback; }

Callback::Callback() : saved_(PyEval_SaveThread()) { in_callback = true; }

Callback::~Callback() {
  in_callback = false;
  PyEval_RestoreThread(saved_);
}

bool stopping() {
  std::lock_guard<std::mutex> guard(running().mutex);
  return running().stopping;
}

void wait_at_exit() { std::atexit(stop_at_exit); }

Status start_interpreter(const char* python) {
  static std::mutex& mutex = *new std::mutex;  // never destroyed: threads may call until the process ends
  static std::string& started = *new std::string;
  std::lock_guard<std::mutex> guard(mutex);
  if (Py_IsInitialized()) {
    if (python == nullptr || started == python) {
      python_process = getpid();
      return {};
    }
    const std::string owner = started.empty() ? "was started by the host" : "runs as " + started;
    return {FUNNEL_INVALID_ARGUMENT, std::string("python is ") + python + ", but this process's interpreter " + owner +
                                         " and cannot be exchanged; give NULL"};
  }
  if (was_stopped()) {
    return {FUNNEL_PYTHON,
            "the interpreter of this process was stopped, or failed to start, and cannot run again, "
            "because NumPy and JAX load once per process; start a new process"};
  }
  std::string path;
  const Status found = find_python(python, &path);
  if (!found.ok()) return found;
  python_process = getpid();
  const PyStatus status = initialize(path.c_str());
  if (PyStatus_Exception(status)) {
    const std::string reason = status.err_msg != nullptr ? status.err_msg : "no reason given";
    return {FUNNEL_PYTHON, "Python cannot be started as " + path + ": " + reason};
  }
  keep_sigint();
  started = path;
  PyEval_SaveThread();  // the start has left this thread with the lock
  return {};
}

Status import_host(Reference* host) {
  *host = Reference(PyImport_ImportModule("funnel_engine.c_host"));
  if (!*host) {
    const Reference error = take_exception(), text(PyObject_Str(error.get()));
    const char* reason = text ? PyUnicode_AsUTF8(text.get()) : nullptr;
    PyErr_Clear();
    return {FUNNEL_PYTHON, std::string("Python ") + PY_VERSION +
                               " cannot import funnel_engine: " + (reason != nullptr ? reason : "no reason given") +
                               "; install funnel-engine in the environment of funnel_options.python, which must have "
                               "this version of Python"};
  }
  const Reference version(PyObject_GetAttrString(host->get(), "API_VERSION"));
  if (!version || PyLong_AsLong(version.get()) != FUNNEL_API_VERSION) {
    PyErr_Clear();
    return {FUNNEL_PYTHON, "the Python package funnel-engine is of another version than this library, " FUNNEL_VERSION
                           "; build the library and install the package from the same sources"};
  }
  return wait_before_python_ends() ? Status{} : raised(host->get());
}

Status raised(PyObject* host) {
  const Reference error = take_exception();
  const Reference answer(PyObject_CallMethod(host, "explain", "O", error.get()));
  int code;
  const char* message;
  Py_ssize_t length;
  if (!answer || !PyArg_ParseTuple(answer.get(), "iy#", &code, &message, &length)) {
    PyErr_Clear();
    return {FUNNEL_INTERNAL, "Python raised an error that cannot be described"};
  }
  return {static_cast<funnel_status>(code), std::string(message, static_cast<size_t>(length))};
}

}  // namespace funnel_c_api
