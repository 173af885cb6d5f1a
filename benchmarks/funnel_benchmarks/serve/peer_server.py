"""What users would otherwise run: sentence-transformers behind FastAPI. Its arguments are MODEL DTYPE CORES.

One POST route takes texts and gives vectors of length 1, as TEI's `/embed`. FastAPI calls it in a thread for each
request. A lock lets one of them compute at a time, with all cores: several at once would only take these from one
another. Nothing is refused: all that cannot be computed yet waits.

It listens at once, on a free port, which it logs as `funnel serve` does; it answers when the model is loaded.
"""

import importlib
import json
import socket
import sys
import threading
from typing import Any

from funnel_benchmarks.peers.hugging_face import use_cores
from funnel_benchmarks.serve.connections import allow_many

PACKAGES = ("torch", "transformers", "sentence_transformers", "fastapi", "uvicorn")
KEEP_ALIVE = 75  # seconds, as of `funnel serve`


def make_app(folder: str, dtype: str, cores: str) -> Any:
    """The application, with the model loaded."""
    torch, library, fastapi = map(importlib.import_module, ("torch", "sentence_transformers", "fastapi"))
    use_cores(torch, int(cores))
    model = library.SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": getattr(torch, dtype)})
    one_at_a_time = threading.Lock()
    app = fastapi.FastAPI()

    @app.post("/embed")  # type: ignore[untyped-decorator]
    def embed(inputs: list[str] = fastapi.Body(embed=True)) -> list[list[float]]:  # noqa: B008
        with one_at_a_time:
            vectors = model.encode(inputs, normalize_embeddings=True, show_progress_bar=False)
        rows: list[list[float]] = vectors.tolist()
        return rows

    @app.get("/health/ready")  # type: ignore[untyped-decorator]
    def ready() -> str:
        return "ready"

    return app


def main() -> None:
    allow_many()
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    print(json.dumps({"message": "listening", "port": listener.getsockname()[1]}), file=sys.stderr, flush=True)
    uvicorn: Any = importlib.import_module("uvicorn")
    config = uvicorn.Config(make_app(*sys.argv[1:]), log_level="warning", timeout_keep_alive=KEEP_ALIVE)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
