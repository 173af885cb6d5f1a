/* The C API of the funnel engine: load a converted checkpoint, hand in token ids, get float32 vectors or logits.
 *
 * The engine runs in a Python interpreter inside the calling process. What follows from that:
 *
 *  1. Python and the packages that `pip install funnel-engine` brings are needed at run time.
 *  2. A process has one interpreter. The first funnel_open starts it and nothing stops it before the process ends.
 *     Where the process already runs Python, that interpreter is used. Where it has run Python and stopped it, or has
 *     sub-interpreters, calls return FUNNEL_PYTHON. Signal handlers and a pending Python exception stay as they are.
 *  3. Every function may be called from any thread. Calls take turns on the interpreter's lock, which is free while a
 *     model computes. Throughput comes from many sequences in a call, not from many threads.
 *  4. In a child that fork() makes after funnel_open every call returns FUNNEL_PYTHON. Fork before, or call exec.
 *  5. `exit`, the return of `main`, and Py_FinalizeEx wait for the calls that run; a warm-up stops early. Later calls
 *     return FUNNEL_PYTHON. Only a call that compiles its bucket while `exit` begins may crash: warm up, or end threads
 *     before.
 *  6. Inputs are token ids, with the begin and end ids that the model expects; funnel_embed_texts takes texts.
 *  7. A batch is run in the next larger of a few sizes (buckets). The first call that needs one compiles it, which
 *     takes seconds for a large model; funnel_warmup compiles all of them beforehand. The option "compilation_cache"
 *     names a directory that keeps what was compiled for the next process.
 *  8. The first funnel_open changes the environment: JAX sets TF_CPP_MIN_LOG_LEVEL and TPU_SKIP_MDS_QUERY, and on
 *     machines with TPUs more. Other threads must not read or write the environment at that time.
 *
 * Sequences come as `ids`, one after another, and `offsets`, `count + 1` numbers: sequence b is
 * ids[offsets[b]] ... ids[offsets[b + 1] - 1]. So offsets[0] is 0, and offsets[count] is how many ids are read.
 *
 * A Funnel-Transformer reads a type of each token too: 0 for the first text of a pair, 1 for the second, 2 for [CLS].
 * Functions with `types` take as many of them as ids; NULL means that all are 0, as in the functions without.
 *
 * Results go to memory of the caller, whose length is given in floats (not bytes) and checked before anything is read
 * or run. With `out` NULL and `out_floats` 0 a call checks the other arguments and returns FUNNEL_BUFFER_TOO_SMALL if
 * they are right. Nothing is written unless the call returns FUNNEL_OK. No pointer is kept after a call,
 * except by funnel_set_log.
 *
 * Every function that can fail takes `error` and `error_size`: a buffer for a message in UTF-8 that names the value,
 * the limit and the remedy. It is cut to the size given, always ends with 0, and is empty after FUNNEL_OK. 512 bytes
 * hold nearly every message; NULL with size 0 asks for none.
 */
#ifndef FUNNEL_H_
#define FUNNEL_H_

#include <stddef.h>
#include <stdint.h>

#define FUNNEL_API __attribute__((visibility("default")))

/* Grows when functions or fields are added; nothing that was there is removed or changes its meaning. */
#define FUNNEL_API_VERSION 3

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
  FUNNEL_INPUT = 4,               /* what cannot be run: a sequence too long or empty, an id out of vocabulary, types */
  FUNNEL_CONFIG = 5,              /* an option, or a combination of options, that no model or funnel can have */
  FUNNEL_CHECKPOINT = 6,          /* the checkpoint is missing, damaged, or of another version */
  FUNNEL_BACKEND_UNAVAILABLE = 7, /* no such backend here */
  FUNNEL_PYTHON = 8,              /* Python cannot be started or used here, or lacks the funnel-engine package */
  FUNNEL_INTERNAL = 9,            /* anything else, such as running out of memory; the engine stays usable */
  FUNNEL_CANCELLED = 10           /* a progress function, or the end of the process, has stopped the warm-up */
} funnel_status;

typedef enum funnel_task {
  FUNNEL_TASK_NONE = 0,
  FUNNEL_TASK_CLASSIFY = 1,
  FUNNEL_TASK_TAG = 2,
  FUNNEL_TASK_ANSWER = 3
} funnel_task;

/* How to open an engine. Set every field that struct_size covers, or start from FUNNEL_OPTIONS_INIT. Later versions may
 * add fields at the end; a program compiled against an older header gives a smaller struct_size, and gets the defaults
 * for what lies beyond. */
typedef struct funnel_options {
  size_t struct_size;     /* sizeof(funnel_options) */
  const char* checkpoint; /* directory that `funnel convert` has written */
  const char* python;     /* Python executable of the environment that has funnel-engine. NULL: that of an interpreter
                             which already runs, or else that of the environment which the library is installed in
                             or was built for. An interpreter that runs cannot be exchanged: another value is refused */
  const char* options;    /* JSON object, or NULL for the defaults: the keyword arguments of Python's Engine.load by
                             name, except path and mesh. "funnel" is a short form such as "6:2/mean", an object with
                             the fields of FunnelConfig, or a list that chooses by the number of tokens of a sequence,
                             [[0, null], [64, "6:2/mean"]]; without it, the checkpoint's own is used.
                             An empty string is not JSON. For example
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

typedef enum funnel_log_level {
  FUNNEL_LOG_DEBUG = 10,
  FUNNEL_LOG_INFO = 20,
  FUNNEL_LOG_WARNING = 30,
  FUNNEL_LOG_ERROR = 40,
  FUNNEL_LOG_CRITICAL = 50
} funnel_log_level;

/* Gets a message in UTF-8 and its level, which is one of funnel_log_level or lies between two of them. The message is
 * valid during the call only. Called from any thread, but by one at a time. */
typedef void (*funnel_log_function)(int32_t level, const char* message, void* user);

/* Told after each program of a warm-up how many of all are compiled, by the thread that called for the warm-up.
 * Returns 0 to go on, and anything else to stop. */
typedef int (*funnel_progress_function)(int32_t done, int32_t total, void* user);

/* Both kinds of functions run inside a call. They must return, without exit and without a C++ exception, and must not
 * wait for another thread's call. What they call of this library returns FUNNEL_INVALID_ARGUMENT. */

/* FUNNEL_API_VERSION of the library, to be compared with that of the header. */
FUNNEL_API int32_t funnel_api_version(void);

/* Version of the library, such as "0.1.0". */
FUNNEL_API const char* funnel_version(void);

/* Sends what Python logs, warnings of the module `warnings` included, to a function, for the whole process; NULL
 * restores what was before. May be called before the first funnel_open, whose messages the function then gets too.
 * After the return the function given before is not called any more. What XLA itself writes to standard error stays
 * there.
 *   user  handed to the function as it is */
FUNNEL_API funnel_status funnel_set_log(funnel_log_function log, void* user, char* error, size_t error_size);

/* Loads a checkpoint. *engine is NULL unless FUNNEL_OK is returned. */
FUNNEL_API funnel_status funnel_open(const funnel_options* options, funnel_engine** engine, char* error,
                                     size_t error_size);

/* Compiles every bucket, so that no later call compiles. Takes seconds to minutes. */
FUNNEL_API funnel_status funnel_warmup(funnel_engine* engine, char* error, size_t error_size);

/* Compiles some buckets, and tells how far it is.
 *   buckets   `count` numbers of rows: of each, the smallest bucket that holds them is compiled. A sequence takes as
 *             many rows as it has tokens, rounded up to a multiple of the funnel's total stride. NULL with count 0: all
 *   progress  NULL for none
 *   user      handed to progress as it is
 * FUNNEL_CANCELLED: progress has stopped it. What was compiled stays, so that a second call goes on from there. */
FUNNEL_API funnel_status funnel_warmup_buckets(funnel_engine* engine, const int32_t* buckets, int32_t count,
                                               funnel_progress_function progress, void* user, char* error,
                                               size_t error_size);

FUNNEL_API funnel_status funnel_get_info(funnel_engine* engine, funnel_info* info, char* error, size_t error_size);

/* One vector per sequence, [count, width], where width is truncate_dim, or embedding_size if that is 0.
 *   normalize     not 0: each vector is scaled to length 1, after it was cut
 *   truncate_dim  number of first dimensions to keep; 0 keeps all
 *   out_floats    at least count * width */
FUNNEL_API funnel_status funnel_embed(funnel_engine* engine, const int32_t* ids, const int32_t* offsets, int32_t count,
                                      int32_t normalize, int32_t truncate_dim, float* out, size_t out_floats,
                                      char* error, size_t error_size);

/* As funnel_embed, of texts, by the checkpoint's tokenizer. Begin and end ids are added.
 *   texts        `count` pointers to UTF-8
 *   lengths      their bytes; NULL: each text ends with 0
 *   prompt_name  which of the checkpoint's prompts goes before each text. NULL: its default prompt, if it has one
 *   truncate     not 0: cut the end off texts that are longer than max_length tokens; 0 refuses them
 * FUNNEL_INPUT: the checkpoint has no tokenizer or no such prompt, or a text is empty, too long or not UTF-8. */
FUNNEL_API funnel_status funnel_embed_texts(funnel_engine* engine, const char* const* texts, const size_t* lengths,
                                            int32_t count, const char* prompt_name, int32_t truncate, int32_t normalize,
                                            int32_t truncate_dim, float* out, size_t out_floats, char* error,
                                            size_t error_size);

/* Raw logits of each sequence, [count, labels]; out_floats is at least count * labels.
 * FUNNEL_CONFIG: the checkpoint has no sequence classifier. */
FUNNEL_API funnel_status funnel_classify(funnel_engine* engine, const int32_t* ids, const int32_t* offsets,
                                         int32_t count, float* out, size_t out_floats, char* error, size_t error_size);

/* Raw logits of each token, [offsets[count], labels]; out_floats is at least offsets[count] * labels.
 * FUNNEL_CONFIG: the checkpoint has no token classifier, or the funnel leaves no row per token. */
FUNNEL_API funnel_status funnel_tag(funnel_engine* engine, const int32_t* ids, const int32_t* offsets, int32_t count,
                                    float* out, size_t out_floats, char* error, size_t error_size);

/* As funnel_embed, funnel_classify and funnel_tag, with the types of tokens.
 *   types  offsets[count] of them, from 0 to 2, or NULL
 * FUNNEL_INPUT: the model has no token types, or one is not from 0 to 2. */
FUNNEL_API funnel_status funnel_embed_typed(funnel_engine* engine, const int32_t* ids, const int32_t* types,
                                            const int32_t* offsets, int32_t count, int32_t normalize,
                                            int32_t truncate_dim, float* out, size_t out_floats, char* error,
                                            size_t error_size);
FUNNEL_API funnel_status funnel_classify_typed(funnel_engine* engine, const int32_t* ids, const int32_t* types,
                                               const int32_t* offsets, int32_t count, float* out, size_t out_floats,
                                               char* error, size_t error_size);
FUNNEL_API funnel_status funnel_tag_typed(funnel_engine* engine, const int32_t* ids, const int32_t* types,
                                          const int32_t* offsets, int32_t count, float* out, size_t out_floats,
                                          char* error, size_t error_size);

/* Raw logits that an answer starts, and ends, at each token, [offsets[count], 2]. A sequence is a question and a
 * context; the answer is the part of the context with the largest sum of both.
 *   types  as in funnel_embed_typed
 * FUNNEL_CONFIG: the checkpoint has no head for answers, or the funnel leaves no row per token. */
FUNNEL_API funnel_status funnel_answer(funnel_engine* engine, const int32_t* ids, const int32_t* types,
                                       const int32_t* offsets, int32_t count, float* out, size_t out_floats,
                                       char* error, size_t error_size);

/* Counters since the engine was opened, as a JSON object: calls, sequences, tokens, batches, padding_rows,
 * compilations, compilations_after_warmup, compile_seconds. With a funnel by length, by_length is a list of objects,
 * one for each class: from_tokens, funnel, and the same counters without calls.
 *   json       receives the text and its final 0
 *   json_size  bytes there; if they are too few, FUNNEL_BUFFER_TOO_SMALL is returned and nothing written
 *   needed     receives the bytes that are needed, final 0 included, whether they fit or not; may be NULL. With json
 *              NULL and json_size 0 a call asks for it alone */
FUNNEL_API funnel_status funnel_stats(funnel_engine* engine, char* json, size_t json_size, size_t* needed, char* error,
                                      size_t error_size);

/* What runs here and how, for people: Python's Engine.describe. The text may change from version to version.
 *   text, text_size, needed  as json, json_size, needed of funnel_stats */
FUNNEL_API funnel_status funnel_describe(funnel_engine* engine, char* text, size_t text_size, size_t* needed,
                                         char* error, size_t error_size);

/* Closes an engine. Calls that run in other threads finish, and the last of them frees its memory. */
FUNNEL_API funnel_status funnel_close(funnel_engine* engine, char* error, size_t error_size);

#ifdef __cplusplus
}
#endif

#endif /* FUNNEL_H_ */
