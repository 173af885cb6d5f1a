import dataclasses
import numpy as np
from tokenizers import Tokenizer
from funnel_engine import Engine, FunnelError
from funnel_serving.answers import Answer, Timing, Token
from funnel_serving.refusals import Refusal
from funnel_serving.service import Service
from funnel_serving.settings import Settings


class DirectService(Service):
    def __init__(self, settings: Settings):
        self.settings = settings
        self.engine = Engine.load(settings.checkpoint, max_batch_tokens=settings.max_batch_tokens)
        self.tok = Tokenizer.from_file(str(settings.checkpoint / "tokenizer.json"))

    async def run(self, f, inputs, prompt_name=None, truncate=None, max_tokens=None, truncate_left=False, **kw):
        try:
            t = self.settings.truncate if truncate is None else truncate
            if isinstance(inputs[0], tuple):
                inputs = [self.tok.encode(*p).ids for p in inputs]
            ids = self.engine.token_ids(inputs, prompt_name=prompt_name, truncate=t)
            if max_tokens:
                ids = self.engine.token_ids([s[:max_tokens] for s in np.split(ids.ids, ids.offsets[1:-1])])
            r = f(ids, **kw)
        except FunnelError as e:
            raise Refusal("unsupported" if "needs a classifier" in str(e) else "validation", str(e)) from None
        return Answer(r, ids.lengths.tolist(), 0, Timing(0.001, 0.002, 0.003))

    async def embed(self, inputs, *, normalize=True, dimensions=None, **kw):
        return await self.run(self.engine.embed, inputs, normalize=normalize, truncate_dim=dimensions, **kw)

    async def rows(self, inputs, **kw):
        return await self.run(self.engine.hidden_states, inputs, **kw)

    async def classify(self, inputs, **kw):
        return await self.run(self.engine.classify, inputs, **kw)

    async def tag(self, inputs, **kw):
        a = await self.run(self.engine.tag, inputs, **kw)
        return dataclasses.replace(a, tokens=await self.tokenize(inputs) if isinstance(inputs[0], str) else ())

    async def tokenize(self, inputs, *, add_special_tokens=True, prompt_name=None):
        out = []
        for e in self.tok.encode_batch(list(inputs), add_special_tokens=add_special_tokens):
            out.append([Token(i, t, bool(s), None if s else o[0], None if s else o[1]) for i, t, s, o in zip(e.ids, e.tokens, e.special_tokens_mask, e.offsets)])
        return out

    async def decode(self, ids, *, skip_special_tokens=True):
        return self.tok.decode_batch(ids, skip_special_tokens=skip_special_tokens)
