// The Python environment that has the package: found without Python, because it is needed to load Python.
#ifndef FUNNEL_C_API_ENVIRONMENT_H_
#define FUNNEL_C_API_ENVIRONMENT_H_

#include <string>

#include "status.h"

namespace funnel_c_api {

// The directory that this library is in, without symbolic links.
std::string library_directory();

// The Python executable to start: `given`; or, if that is NULL, the one that the library was built for; or else that of
// the environment in whose site-packages/funnel_native/lib the library is.
Status find_python(const char* given, std::string* python);

}  // namespace funnel_c_api

#endif  // FUNNEL_C_API_ENVIRONMENT_H_
