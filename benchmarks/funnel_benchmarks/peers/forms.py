"""In which form each peer runs: the fastest that its users would choose on this machine, beside the engine's dtype.

FUNNEL_CPU_ISA limits peers as it limits the engine (`peer.LIMITS`). A peer that has no such limit is left out where it
would use more than the engine.
"""

from collections.abc import Mapping
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

from funnel_benchmarks.machine import (
    INSTRUCTION_SETS,
    allowed_sets,
    instruction_sets,
    kernel_limit,
    multiplies_bfloat16,
)
from funnel_benchmarks.peers import (
    engine_peer,
    hugging_face,
    llama_cpp_peer,
    onnx_runtime_peer,
    openvino_peer,
    sentence_transformers_peer,
)
from funnel_benchmarks.results import LeftOut


class Forms(NamedTuple):
    """What a peer computes in, by what the engine has its weights in; None: there is no such form.

    Attributes:
        bfloat16: where the processor multiplies bfloat16 (AVX-512-BF16, AMX, a GPU).
        widened: with bfloat16 weights too, where it does not, and the engine computes in float32.
    """

    float32: str | None
    bfloat16: str | None
    widened: str | None
    int8: str | None


# fmt: off
#           beside the engine in    float32    bfloat16    widened    int8
PYTORCH =                     Forms("float32", "bfloat16", "float32", None)
FLASH_ATTENTION =             Forms(None,      "bfloat16", None,      None)
ONNX_RUNTIME =                Forms("float32", "float32",  "float32", "int8")
OPENVINO =                    Forms("float32", "bfloat16", "float32", "int8")
LLAMA_CPP =                   Forms("float32", "bfloat16", "float32", "int8")
OURS =                        Forms(None,      None,       None,      "bfloat16")
# fmt: on

# The instruction sets that a library uses whatever the limit is. MLAS makes ONNX Runtime's products, and those of
# OpenVINO in float32. llama.cpp is compiled for its machine.
MLAS = {"float32": {"avx512f"}, "int8": {"avx512f", "avx_vnni", "avx512_vnni", "amx_int8"}}
NATIVE = {dtype: set(INSTRUCTION_SETS) for dtype in ("float32", "bfloat16", "int8")}


class Kind(NamedTuple):
    """A peer.

    Attributes:
        module: see the package.
        options: the part of its task that is its own.
        packages: that it needs, beside those of `COMMON`.
        unlimited: by dtype, the instruction sets that it uses, if the processor has them, whatever the limit is.
    """

    module: ModuleType
    options: dict[str, Any]
    forms: Forms
    packages: tuple[str, ...] = ()
    unlimited: Mapping[str, set[str]] = MappingProxyType({})


COMMON = ("torch", "transformers")  # Hugging Face in float32 is what all agree with, or not
FLASH = "hugging-face-flash"  # of GPUs only
ENGINE = "funnel-engine"
SENTENCE = "sentence-transformers"  # has a model of its own, see `sentence_model`
PEERS = {
    **{f"hugging-face-{mode}": Kind(hugging_face, {"mode": mode}, PYTORCH) for mode in ("eager", "compiled", "frozen")},
    FLASH: Kind(hugging_face, {"mode": "flash"}, FLASH_ATTENTION, ("flash_attn",)),
    SENTENCE: Kind(sentence_transformers_peer, {}, PYTORCH, ("sentence_transformers",)),
    "onnx-runtime": Kind(onnx_runtime_peer, {}, ONNX_RUNTIME, ("onnx", "onnxruntime", "onnxscript"), MLAS),
    "openvino": Kind(openvino_peer, {}, OPENVINO, ("openvino", "nncf"), {"float32": MLAS["float32"]}),
    "llama-cpp": Kind(llama_cpp_peer, {}, LLAMA_CPP, ("llama_cpp", "gguf"), NATIVE),
    ENGINE: Kind(engine_peer, {}, OURS),
}


def dtype_beside(peer: str, ours: str, *, on_cpu: bool) -> str:
    """What a peer computes in beside an engine whose weights are in `ours`.

    Raises:
        LeftOut: it has no such form, or no limit where FUNNEL_CPU_ISA limits the engine.
    """
    kind = PEERS[peer]
    widened = ours == "bfloat16" and on_cpu and not multiplies_bfloat16()
    dtype: str | None = kind.forms._asdict()["widened" if widened else ours]
    if dtype is None:
        raise LeftOut(f"{peer} has no form that is compared with the engine in {ours}")
    beyond = kind.unlimited.get(dtype, set()).intersection(instruction_sets()).difference(allowed_sets())
    if on_cpu and beyond:
        limit, used = kernel_limit(), ", ".join(sorted(beyond))
        raise LeftOut(f"{peer} in {dtype} uses {used}, which FUNNEL_CPU_ISA={limit} does not allow the engine")
    return dtype
