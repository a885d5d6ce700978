"""Language models from GGUF files: generating and comparing under any mechanism."""

from __future__ import annotations

import codecs
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from . import _core
from ._call import take_apart
from ._core import Error


@dataclass(frozen=True)
class Comparison:
    """One mechanism's row of ``Model.compare``: seconds, work, and what was lost. nll is in nats a token."""

    mechanism: str
    tokens: int
    nll: float  # mean over positions 1 … tokens - 1
    ppl: float
    prefill_s: float
    score_s: float
    tokens_per_s: float
    attention_s: float
    linear_s: float
    plan_s: float
    density: float  # pairs attended / pairs of dense attention, layers replaced
    peak_bytes: int  # KV cache, scratch and plans; weights apart
    passkey: list[dict[str, Any]] = field(default_factory=list)
    copy: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: top-k, then top-p, then min-p of the tempered distribution."""

    temperature: float = 0  # 0: the likeliest token, the lowest id among equals
    top_k: int = 0  # 0: all
    top_p: float = 1  # the fewest tokens with this much probability
    min_p: float = 0  # tokens at least this share as likely as the likeliest
    seed: int = 0


class Session:
    """One sequence through a model under one mechanism; made by ``Model.session``."""

    def __init__(self, core: _core.Session) -> None:
        self._core = core

    @property
    def size(self) -> int:
        """Tokens held."""
        return self._core.size

    @property
    def density(self) -> float:
        """Pairs attended / pairs of dense attention, over the layers replaced, so far."""
        return self._core.density

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        """Reads tokens; returns the logits after the last one, f32 [vocabulary]. Ctrl-C ends it, and its tokens are
        forgotten."""
        return self._core.prefill(list(tokens))

    def decode(self, token: int) -> np.ndarray:
        """Reads one token; returns the logits after it."""
        return self._core.decode(token)

    def score(self, tokens: Sequence[int]) -> np.ndarray:
        """Reads tokens; returns -ln p(tokens[i] | tokens before it) for i = 1 … n - 1, f64 [n - 1], in nats."""
        return self._core.score(list(tokens))

    def truncate(self, size: int) -> None:
        """Forgets all tokens from `size` on."""
        if not 0 <= size <= self.size:
            raise Error(f"size = {size}, expected 0 … {self.size}")
        self._core.truncate(size)


class Model:
    """A language model read from a GGUF file (llama and gemma3 graphs).

    Args:
        path: the file.
        dtype: the arithmetic, "bf16" or "f32".

    Raises heed.Error for a file that is not one, or that needs more memory than there is.
    """

    def __init__(self, path: str | os.PathLike[str], dtype: str = "bf16") -> None:
        self._core = _core.load_model(os.fspath(path), dtype)
        #: architecture, name, layers, width, ffn, heads, kv_heads, head_size, vocabulary, context, window (of local
        #: layers, in tokens), weight_bytes
        self.info: dict[str, Any] = self._core.info()

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        """Ids of a text; with `bos` the model's first token before them, where it has one; with `special` control
        tokens are recognised in the text."""
        ids = self._core.encode(text, special)
        return [self._core.bos, *ids] if bos and self._core.bos is not None else ids

    def detokenize(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of ids; bytes that are not UTF-8 are replaced."""
        return self._core.decode(list(ids), special).decode("utf-8", "replace")

    def session(
        self,
        mechanism: str = "dense",
        *,
        layers: str = "",
        phase: str = "both",
        calibration: str | os.PathLike[str] | None = None,
        context: int = 0,
        chunk: int = 512,
        kv: str = "bf16",
        **params: Any,
    ) -> Session:
        """An empty sequence.

        Args:
            mechanism, params: as in ``heed.attend``.
            layers: those that the mechanism replaces, such as "0,3,5-9,20-"; by default every one with
                global attention.
            phase: where it applies: "prefill", "decode" or "both".
            calibration: what the mechanism learned, a file that ``heed calibrate`` wrote.
            context: most tokens to hold; 0: the model's context.
            chunk: tokens per step of the prefill.
            kv: numbers of the KV cache, "bf16" or "f32".
        """
        call, extra = take_apart(mechanism, params)
        if extra:
            raise Error(f"{next(iter(extra))}: a tensor, expected none: models take calibrations")
        if calibration is not None:
            calibration = os.fspath(calibration)
        return Session(_core.make_session(self._core, call, layers, phase, calibration, context, chunk, kv))

    def stream(
        self,
        prompt: str,
        mechanism: str = "dense",
        *,
        n: int = 64,
        chat: str = "auto",
        sampling: Sampling = Sampling(),
        **options: Any,
    ) -> Iterator[str]:
        """Like ``generate``, piece by piece."""
        if chat not in ("auto", "off"):
            raise Error(f"chat = {chat}, expected auto or off")
        if n < 0:
            raise Error(f"n = {n}, expected >= 0")
        sampler = _core.make_sampler(**asdict(sampling))
        if chat == "auto" and self._core.has_chat:
            ids = self._core.chat(prompt)
            if self._core.bos is not None:
                ids.insert(0, self._core.bos)
        else:
            ids = self.tokenize(prompt, bos=True)
        if not ids:
            raise Error("prompt: empty, expected at least one token")
        room = self.info["context"]
        if len(ids) > room:
            raise Error(f"prompt: {len(ids)} tokens, expected at most the context, {room}")
        options.setdefault("context", min(room, len(ids) + n))
        session = self.session(mechanism, **options)
        return self._write(session, sampler, session.prefill(ids), min(n, options["context"] - len(ids) + 1))

    def _write(self, session: Session, sampler: _core.Sampler, logits: np.ndarray, n: int) -> Iterator[str]:
        text = codecs.getincrementaldecoder("utf-8")("replace")
        for i in range(n):
            token = sampler.next(logits)
            if self._core.ends_text(token):
                break
            if piece := text.decode(self._core.piece(token)):
                yield piece
            # The last token needs no room of its own.
            if i + 1 < n:
                logits = session.decode(token)
        if rest := text.decode(b"", final=True):
            yield rest

    def generate(self, prompt: str, mechanism: str = "dense", **options: Any) -> str:
        """What the model writes after a prompt.

        Args:
            prompt: one turn of the model's chat template, where it has one and `chat` is "auto"; else bare text.
            mechanism: as in ``heed.attend``; its parameters go among the options (``block=64, top_k=8``).
            options: n (64), most tokens to write; sampling, a ``heed.Sampling``; chat ("auto" or "off"); and those of
                ``session``: layers, phase, calibration, context, chunk, kv.
        """
        return "".join(self.stream(prompt, mechanism, **options))

    def perplexity(self, text: str, mechanism: str = "dense", *, tokens: int | None = None, **options: Any) -> float:
        """exp of the mean of -ln p over a text's tokens, the first `tokens` of them (BOS counted) or all.

        options are the mechanism's parameters and those of ``session``.
        """
        ids = self._read(text, tokens)
        options.setdefault("context", len(ids))
        return math.exp(float(np.mean(self.session(mechanism, **options).score(ids))))

    def compare(
        self,
        text: str,
        mechanisms: Sequence[str] = ("dense", "streaming:sink=4,window=512", "moba:block=64,top_k=8,sink=64"),
        *,
        tokens: int | None = None,
        tasks: Sequence[str] = ("perplexity",),
        layers: str = "",
        phase: str = "both",
        passkey_lengths: Sequence[int] = (),
        passkey_depths: Sequence[float] = (0.1, 0.5, 0.9),
        copy_gaps: Sequence[int] = (1000,),
        seeds: Sequence[int] = (0,),
        chunk: int = 512,
        kv: str = "bf16",
    ) -> list[Comparison]:
        """Reads one text under several mechanisms, in turn: time, density, perplexity, and whether a key hidden in it
        is still found ("passkey") and a passage that occurs twice recognised ("copy"); as ``heed compare`` does.
        """
        ids = self._read(text, tokens)
        rows = self._core.compare(
            ids, text, list(mechanisms), layers, phase, list(tasks), list(passkey_lengths), list(passkey_depths),
            list(copy_gaps), list(seeds), chunk, kv,
        )  # fmt: skip
        return [Comparison(**row) for row in rows]

    def _read(self, text: str, tokens: int | None) -> list[int]:
        ids = self.tokenize(text, bos=True)
        if tokens is not None:
            if tokens < 2:
                raise Error(f"tokens = {tokens}, expected >= 2")
            if len(ids) < tokens:
                raise Error(f"text: {len(ids)} tokens, expected at least tokens = {tokens}")
            ids = ids[:tokens]
        if len(ids) < 2:
            raise Error(f"text: {len(ids)} tokens, expected at least 2")
        if len(ids) > self.info["context"]:
            raise Error(f"text: {len(ids)} tokens, expected at most the context, {self.info['context']}")
        return ids

    def __repr__(self) -> str:
        return f"<heed.Model {self.info['name']}: {self.info['architecture']}, {self.info['layers']} layers>"
