"""What else embeds with the same weights: encoders that the engine is measured against, each in a process of its own.

A peer is a module with `make(task) -> (call, facts)`; `peer.Peer` runs it in another process, which computes
only when it is asked to, so that ours and the peer's calls can alternate. `random_checkpoint.py` writes the weights.

| module | what computes | in |
|---|---|---|
| `hugging_face` | transformers, eager or compiled | `dtype` |
| `sentence_transformers_peer` | `SentenceTransformer.encode`, from texts | `dtype` |
| `exported_graph` | ONNX Runtime on the graph that torch.onnx exports | float32 |
| | OpenVINO on the graph that torch.export makes | `dtype` |
| `llama_cpp_peer` | llama.cpp on a GGUF file (`gguf_file.py`) | bfloat16 |

Their task is the same: `checkpoint`, a folder of such weights; `sequences`, lists of token ids; `batches`, for each
batch the numbers of its sequences; `cores`, how many threads may compute; `dtype`, the faster of bfloat16 and float32
on this machine. `facts` have the `dtype` that the peer computes in. `call(i)` embeds the sequences of batch `i` and
returns a float32 row for each. A row is the mean of a sequence's last hidden states; of a sentence model it is what the
model's own heads make of that.
"""
