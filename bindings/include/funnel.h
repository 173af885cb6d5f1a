/* The C API of the funnel engine: load a converted checkpoint, hand in token ids, get float32 vectors or logits.
 *
 * The engine runs in a Python interpreter inside the calling process. What follows from that:
 *
 *  1. Python and the packages that `pip install funnel-engine` brings are needed at run time.
 *  2. A process has one interpreter. The first funnel_open starts it and nothing stops it before the process ends.
 *     Where the process already runs Python, that interpreter is used. Signal handlers are left as they are.
 *  3. Every function may be called from any thread. Calls take turns on the interpreter's lock, which is free while a
 *     model computes. Throughput comes from many sequences in a call, not from many threads.
 *  4. fork() after funnel_open is not supported in the child, unless it calls exec at once.
 *  5. There is no tokenizer here: inputs are token ids, with the begin and end ids that the model expects.
 *  6. A batch is run in the next larger of a few sizes (buckets). The first call that needs one compiles it, which
 *     takes seconds for a large model; funnel_warmup compiles all of them beforehand.
 *
 * Sequences come as `ids`, one after another, and `offsets`, `count + 1` numbers: sequence b is
 * ids[offsets[b]] ... ids[offsets[b + 1] - 1]. So offsets[0] is 0, and offsets[count] is how many ids are read.
 *
 * Results go to memory of the caller, whose length is given in floats (not bytes) and checked before anything is read
 * or run. Nothing is written unless the call returns FUNNEL_OK. No pointer is kept after a call.
 *
 * Every function that can fail takes `error` and `error_size`: a buffer for a message in UTF-8 that names the value,
 * the limit and the remedy. It is cut to the size given, always ends with 0, and is empty after FUNNEL_OK. 512 bytes hold
 * nearly every message; NULL with size 0 asks for none.
 */
#ifndef FUNNEL_H_
#define FUNNEL_H_

#include <stddef.h>
#include <stdint.h>

#define FUNNEL_API __attribute__((visibility("default")))

/* Grows when functions or fields are added; nothing that was there is removed or changes its meaning. */
#define FUNNEL_API_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif

/* An open engine. It is a number in disguise and never points to anything: after funnel_close every use of it, from any
 * thread, returns FUNNEL_CLOSED. */
typedef struct funnel_engine funnel_engine;

typedef enum funnel_status {
  FUNNEL_OK = 0,
  FUNNEL_INVALID_ARGUMENT = 1,    /* NULL, an unknown struct_size, malformed offsets, truncate_dim out of range */
  FUNNEL_BUFFER_TOO_SMALL = 2,    /* the result needs more memory than was given; the message says how much */
  FUNNEL_CLOSED = 3,              /* the engine was closed */
  FUNNEL_INPUT = 4,               /* ids that cannot be run: a sequence too long or empty, an id out of vocabulary */
  FUNNEL_CONFIG = 5,              /* an option, or a combination of options, that no model or funnel can have */
  FUNNEL_CHECKPOINT = 6,          /* the checkpoint is missing, damaged, or of another version */
  FUNNEL_BACKEND_UNAVAILABLE = 7, /* no such backend here */
  FUNNEL_PYTHON = 8,              /* Python cannot be started, or does not have the funnel-engine package */
  FUNNEL_INTERNAL = 9             /* anything else, such as running out of memory; the engine stays usable */
} funnel_status;

typedef enum funnel_task { FUNNEL_TASK_NONE = 0, FUNNEL_TASK_CLASSIFY = 1, FUNNEL_TASK_TAG = 2 } funnel_task;

/* How to open an engine. Set every field that struct_size covers, or start from FUNNEL_OPTIONS_INIT. Later versions may
 * add fields at the end; a program compiled against an older header gives a smaller struct_size, and gets the defaults
 * for what lies beyond. */
typedef struct funnel_options {
  size_t struct_size;     /* sizeof(funnel_options) */
  const char* checkpoint; /* directory that `funnel convert` has written */
  const char* python;     /* Python executable of the environment that has funnel-engine. NULL: that of an interpreter
                             which already runs, or else that of the environment which the library is installed in
                             or was built for. An interpreter that runs cannot be exchanged: another value is refused */
  const char* options;    /* JSON object, or NULL: the keyword arguments of Python's Engine.load by name, except path
                             and mesh. "funnel" is itself an object with the fields of FunnelConfig. For example
                             {"backend": "xla", "max_batch_tokens": 4096, "funnel": {"strides": [1, 1, 2]}} */
} funnel_options;

#define FUNNEL_OPTIONS_INIT {sizeof(funnel_options), NULL, NULL, NULL}

/* What an engine is. Set struct_size before the call; only that much is written. */
typedef struct funnel_info {
  size_t struct_size;      /* sizeof(funnel_info) */
  int32_t embedding_size;  /* floats of a vector that funnel_embed returns */
  int32_t labels;          /* logits of the classifier; 0 without one */
  int32_t max_length;      /* tokens of the longest sequence */
  int32_t vocabulary_size; /* ids lie in 0 ... vocabulary_size - 1 */
  int32_t task;            /* a funnel_task: what the classifier is for */
} funnel_info;

#define FUNNEL_INFO_INIT {sizeof(funnel_info), 0, 0, 0, 0, FUNNEL_TASK_NONE}

/* FUNNEL_API_VERSION of the library, to be compared with that of the header. */
FUNNEL_API int32_t funnel_api_version(void);

/* Version of the library, such as "0.1.0". */
FUNNEL_API const char* funnel_version(void);

/* Loads a checkpoint. *engine is NULL unless FUNNEL_OK is returned. */
FUNNEL_API funnel_status funnel_open(const funnel_options* options, funnel_engine** engine, char* error,
                                     size_t error_size);

/* Compiles every bucket, so that no later call compiles. Takes seconds to minutes. */
FUNNEL_API funnel_status funnel_warmup(funnel_engine* engine, char* error, size_t error_size);

FUNNEL_API funnel_status funnel_get_info(funnel_engine* engine, funnel_info* info, char* error, size_t error_size);

/* One vector per sequence, [count, width], where width is truncate_dim, or embedding_size if that is 0.
 *   normalize     not 0: each vector is scaled to length 1, after it was cut
 *   truncate_dim  keep only so many of the first dimensions; 0 keeps all
 *   out_floats    at least count * width */
FUNNEL_API funnel_status funnel_embed(funnel_engine* engine, const int32_t* ids, const int32_t* offsets, int32_t count,
                                      int32_t normalize, int32_t truncate_dim, float* out, size_t out_floats,
                                      char* error, size_t error_size);

/* Raw logits of each sequence, [count, labels]; out_floats is at least count * labels.
 * FUNNEL_CONFIG: the checkpoint has no sequence classifier. */
FUNNEL_API funnel_status funnel_classify(funnel_engine* engine, const int32_t* ids, const int32_t* offsets,
                                         int32_t count, float* out, size_t out_floats, char* error, size_t error_size);

/* Raw logits of each token, [offsets[count], labels]; out_floats is at least offsets[count] * labels.
 * FUNNEL_CONFIG: the checkpoint has no token classifier, or the funnel leaves no row per token. */
FUNNEL_API funnel_status funnel_tag(funnel_engine* engine, const int32_t* ids, const int32_t* offsets, int32_t count,
                                    float* out, size_t out_floats, char* error, size_t error_size);

/* Counters since the engine was opened, as a JSON object: calls, sequences, tokens, batches, padding_rows,
 * compilations, compilations_after_warmup, compile_seconds.
 *   json       receives the text and its final 0
 *   json_size  bytes there; if they are too few, FUNNEL_BUFFER_TOO_SMALL is returned and nothing written
 *   needed     receives the bytes that are needed, final 0 included, whether they fit or not; may be NULL. With json
 *              NULL and json_size 0 a call asks for it alone */
FUNNEL_API funnel_status funnel_stats(funnel_engine* engine, char* json, size_t json_size, size_t* needed, char* error,
                                      size_t error_size);

/* Closes an engine. Calls that run in other threads finish, and the last of them frees its memory. */
FUNNEL_API funnel_status funnel_close(funnel_engine* engine, char* error, size_t error_size);

#ifdef __cplusplus
}
#endif

#endif /* FUNNEL_H_ */
