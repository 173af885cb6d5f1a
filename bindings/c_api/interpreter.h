// The Python interpreter of the process: starting it, holding its lock, calling into it.
#ifndef FUNNEL_C_API_INTERPRETER_H_
#define FUNNEL_C_API_INTERPRETER_H_

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <utility>

#include "status.h"

namespace funnel_c_api {

// Makes sure that an interpreter runs. `python` is as in funnel_options. Not to be called with the lock held.
Status start_interpreter(const char* python);

// Holds the interpreter's lock, from any thread, whether it holds it already or Python has never seen it.
class InterpreterLock {
 public:
  InterpreterLock() : state_(PyGILState_Ensure()) {}
  ~InterpreterLock() { PyGILState_Release(state_); }
  InterpreterLock(const InterpreterLock&) = delete;
  InterpreterLock& operator=(const InterpreterLock&) = delete;

 private:
  PyGILState_STATE state_;
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
  void forget() { object_ = nullptr; }
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
