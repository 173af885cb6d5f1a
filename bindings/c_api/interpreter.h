// The Python interpreter of the process: starting it, holding its lock, calling into it, and when neither is possible.
#ifndef FUNNEL_C_API_INTERPRETER_H_
#define FUNNEL_C_API_INTERPRETER_H_

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <utility>

#include "status.h"

namespace funnel_c_api {

// One call of an exported function. `status` says why the call must not touch Python: in a child of the process that
// started it, after the process has begun to end, beside sub-interpreters, or inside a callback.
class Call {
 public:
  Call();
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  Status status;

 private:
  bool entered_ = false;
};

// Runs a callback of the host, without the interpreter's lock. The host must not call this library from inside.
class Callback {
 public:
  Callback();
  ~Callback();
  Callback(const Callback&) = delete;
  Callback& operator=(const Callback&) = delete;

  static bool runs_here();  // on this thread

 private:
  PyThreadState* saved_;
};

// Whether the process has begun to end.
bool stopping();

// Makes `exit` wait for the calls that run, and refuse later ones, before it destroys what was made until now. JAX
// makes objects that `exit` destroys when it first compiles and runs, so this is called again after that.
void wait_at_exit();

// Makes sure that an interpreter runs. `python` is as in funnel_options. Not to be called with the lock held.
Status start_interpreter(const char* python);

// Holds the interpreter's lock, from any thread, whether it holds it already or Python has never seen it. An exception
// that the host has pending is put aside and comes back.
class InterpreterLock {
 public:
  InterpreterLock() : state_(PyGILState_Ensure()) { PyErr_Fetch(&type_, &value_, &traceback_); }
  ~InterpreterLock() {
    PyErr_Restore(type_, value_, traceback_);
    PyGILState_Release(state_);
  }
  InterpreterLock(const InterpreterLock&) = delete;
  InterpreterLock& operator=(const InterpreterLock&) = delete;

 private:
  PyGILState_STATE state_;
  PyObject *type_, *value_, *traceback_;
};

// One reference to a Python object, or none. Lives and dies under the interpreter's lock.
class Reference {
 public:
  explicit Reference(PyObject* owned = nullptr) : object_(owned) {}
  ~Reference() { Py_XDECREF(object_); }
  Reference(Reference&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Reference& operator=(Reference&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }

  PyObject* get() const { return object_; }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_;
};

// The module funnel_engine.c_host. Needs the lock.
Status import_host(Reference* host);

// The status and message of the Python exception that has just been raised, which is cleared. Needs the lock.
Status raised(PyObject* host);

}  // namespace funnel_c_api

#endif  // FUNNEL_C_API_INTERPRETER_H_
