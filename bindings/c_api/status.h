// What a step of a call has to say: FUNNEL_OK, or a status and its message; and how that gets to the caller.
#ifndef FUNNEL_C_API_STATUS_H_
#define FUNNEL_C_API_STATUS_H_

#include <cstring>
#include <exception>
#include <string>

#include "funnel.h"

namespace funnel_c_api {

struct Status {
  funnel_status code = FUNNEL_OK;
  std::string message;

  bool ok() const { return code == FUNNEL_OK; }
};

// Copies a message into the caller's buffer, cut between two characters of UTF-8 if it is too long.
inline void write_error(const char* message, char* error, size_t error_size) {
  if (error == nullptr || error_size == 0) return;
  size_t length = std::strlen(message);
  if (length >= error_size) {
    length = error_size - 1;
    while (length > 0 && (static_cast<unsigned char>(message[length]) & 0xC0) == 0x80) --length;
  }
  std::memcpy(error, message, length);
  error[length] = '\0';
}

// Runs the body of an exported function, so that neither a C++ exception nor a status without its message gets out.
template <typename Body>
funnel_status answer(char* error, size_t error_size, Body body) {
  try {
    const Status status = body();
    write_error(status.message.c_str(), error, error_size);
    return status.code;
  } catch (const std::exception& exception) {
    write_error(exception.what(), error, error_size);
    return FUNNEL_INTERNAL;
  }
}

}  // namespace funnel_c_api

#endif  // FUNNEL_C_API_STATUS_H_
