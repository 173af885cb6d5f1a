"""What else embeds with the same weights: encoders that the engine is measured against, each in a process of its own.

A peer is a module with `make(task) -> (call, facts)`; `peer.Peer` runs it in another process, which computes
only when it is asked to, so that ours and the peer's calls can alternate. `random_checkpoint.py` writes the weights.
`forms.py` has the table of all peers, and of the dtypes in which they run.

| module | what computes |
|---|---|
| `hugging_face` | transformers, eager or compiled |
| `sentence_transformers_peer` | `SentenceTransformer.encode`, from texts |
| `onnx_runtime_peer` | ONNX Runtime on the graph that torch.onnx exports (`exported_graph.py`); int8 is dynamic |
| `openvino_peer` | OpenVINO on the graph that torch.export makes (`exported_graph.py`); int8 is NNCF's |
| `llama_cpp_peer` | llama.cpp on a GGUF file (`gguf_file.py`); int8 is Q8_0 |
| `engine_peer` | the engine itself, in another dtype |

Their task is the same: `checkpoint`, a folder of such weights; `sequences`, lists of token ids; `batches`, for each
batch the numbers of its sequences; `cores`, how many threads may compute; `dtype`; and for a peer in int8
`float_dtype`, the faster of bfloat16 and float32 for what is not int8, and `multiplies_int8`, whether the processor has
products of int8 with int32 sums. `facts` have the `dtype`. `call(i)` embeds the sequences of batch `i` and returns a
float32 row for each. A row is the mean of a sequence's last hidden states; of a sentence model it is what the model's
own heads make of that.
"""
