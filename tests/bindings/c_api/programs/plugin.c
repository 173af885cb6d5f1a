/* plugin LIBRARY CHECKPOINT [PYTHON]: opens libfunnel as plugins are opened, out of sight of the rest of the process,
 * and an engine with it. Prints the status and the message. */
#include <dlfcn.h>
#include <funnel.h>
#include <stdio.h>

int main(int argc, char** argv) {
  void* library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (library == NULL) {
    fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  funnel_status (*open_engine)(const funnel_options*, funnel_engine**, char*, size_t);
  *(void**)&open_engine = dlsym(library, "funnel_open");
  funnel_options options = FUNNEL_OPTIONS_INIT;
  options.checkpoint = argv[2];
  options.python = argc > 3 ? argv[3] : NULL;
  funnel_engine* engine;
  char error[1024];
  const funnel_status status = open_engine(&options, &engine, error, sizeof error);
  printf("%d %s\n", (int)status, error);
  return (engine != NULL) != (status == FUNNEL_OK);
}
