#include "interpreter.h"

#include <signal.h>

#include <mutex>
#include <string>

#include "environment.h"

namespace funnel_c_api {
namespace {

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

Status start_interpreter(const char* python) {
  static std::mutex& mutex = *new std::mutex;  // never destroyed: threads may call until the process ends
  static std::string& started = *new std::string;
  std::lock_guard<std::mutex> guard(mutex);
  if (Py_IsInitialized()) {
    if (python == nullptr || started == python) return {};
    const std::string owner = started.empty() ? "was started by the host" : "runs as " + started;
    return {FUNNEL_INVALID_ARGUMENT, std::string("python is ") + python + ", but this process's interpreter " + owner +
                                         " and cannot be exchanged; give NULL"};
  }
  if (!started.empty()) {
    return {FUNNEL_PYTHON, "the interpreter of this process was stopped and cannot run again; start a new process"};
  }
  std::string path;
  const Status found = find_python(python, &path);
  if (!found.ok()) return found;
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
    return {FUNNEL_PYTHON, std::string("Python ") + PY_VERSION + " cannot import funnel_engine: " +
                               (reason != nullptr ? reason : "no reason given") +
                               "; install funnel-engine in the environment of funnel_options.python, which must have "
                               "this version of Python"};
  }
  const Reference version(PyObject_GetAttrString(host->get(), "API_VERSION"));
  if (!version || PyLong_AsLong(version.get()) != FUNNEL_API_VERSION) {
    PyErr_Clear();
    return {FUNNEL_PYTHON, "the Python package funnel-engine is of another version than this library, " FUNNEL_VERSION
                           "; build the library and install the package from the same sources"};
  }
  return {};
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
