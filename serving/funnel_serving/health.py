"""What the server tells about its state: it loads, it compiles, it is ready, it stops, or it failed."""

import dataclasses


@dataclasses.dataclass
class Health:
    """Written by the thread that loads the model and by signals, read by routes.

    Attributes:
        state: "loading", "compiling", "ready", "stopping" or "failed".
        compiled, programs: how far the warm-up is.
    """

    state: str = "loading"
    compiled: int = 0
    programs: int = 0

    def facts(self) -> dict[str, str | int]:
        progress = {"compiled": self.compiled, "programs": self.programs} if self.state == "compiling" else {}
        return {"status": self.state} | progress
