// What a step of a call has to say: FUNNEL_OK, or a status and its message.
#ifndef FUNNEL_C_API_STATUS_H_
#define FUNNEL_C_API_STATUS_H_

#include <string>

#include "funnel.h"

namespace funnel_c_api {

struct Status {
  funnel_status code = FUNNEL_OK;
  std::string message;

  bool ok() const { return code == FUNNEL_OK; }
};

}  // namespace funnel_c_api

#endif  // FUNNEL_C_API_STATUS_H_
