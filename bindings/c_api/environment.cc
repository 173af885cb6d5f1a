#include "environment.h"

#include <dlfcn.h>
#include <unistd.h>

#include <climits>
#include <cstdlib>

namespace funnel_c_api {

std::string library_directory() {
  Dl_info library;
  char path[PATH_MAX];
  if (dladdr(reinterpret_cast<void*>(&library_directory), &library) == 0) return {};
  if (realpath(library.dli_fname, path) == nullptr) return {};
  const std::string file = path;
  return file.substr(0, file.rfind('/'));
}

Status find_python(const char* given, std::string* python) {
  *python = given != nullptr ? given : FUNNEL_DEFAULT_PYTHON;
  if (python->empty()) {  // PREFIX/lib/python3.11/site-packages/funnel_native/lib -> PREFIX/bin/python3.11
    const std::string prefix = library_directory() + "/../../../../..";
    char path[PATH_MAX];
    *python = (realpath(prefix.c_str(), path) != nullptr ? path : prefix) + "/bin/python" FUNNEL_PYTHON_VERSION;
  }
  if (access(python->c_str(), X_OK) == 0) return {};
  return {FUNNEL_PYTHON, "there is no Python executable at " + *python +
                             "; set funnel_options.python to that of an environment with funnel-engine"};
}

}  // namespace funnel_c_api
