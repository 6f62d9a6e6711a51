"""FLOPs, seconds and money: all formulas that a plan is made with, but those of bytes, which are in `sizes`.

Sources: a product of a token with n weights takes 2 n FLOPs, and attention of a query to a key with its value takes
4 head_dim in each head (Kaplan et al., arXiv 2001.08361, table 1; Hoffmann et al., arXiv 2203.15556, appendix F). A
step takes what it computes over FLOP/s, or what it reads over bytes/s, whichever is longer (the roofline of Williams et
al., doi 10.1145/1498765.1498785); a token that is generated reads all weights and all K/V once (Pope et al., arXiv
2211.05102). What the passes of a compression compute is what the code of this package does: `ScoredMethod`,
`Repetition` and `Beacon`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from beacon_memory.kv.levels import LEVELS

from .hardware import Speed
from .models import ModelShape
from .sizes import Way, WindowSize

__all__ = [
    "Work",
    "break_even",
    "compression_seconds",
    "compression_work",
    "first_token_seconds",
    "prefill_work",
    "token_seconds",
]

PIECE = 256  # tokens that are repeated at a time, as `modeling.repetition`
VIEW = 2048  # slots of earlier windows that a window is read behind at most, as `compression.selection`
ROWS = 4096  # rows of a pass, as `BeaconCompressor` has them by default


@dataclass(frozen=True, slots=True)
class Work:
    """FLOPs of one kind and another, see `Speed`; moved: numbers; passes: through all layers."""

    linear: float = 0.0
    attention: float = 0.0
    repeated: float = 0.0
    moved: float = 0.0
    passes: float = 0.0

    @property
    def flops(self) -> float:
        """All FLOPs."""
        return self.linear + self.attention + self.repeated

    def __add__(self, other: Work) -> Work:
        return Work(
            self.linear + other.linear,
            self.attention + other.attention,
            self.repeated + other.repeated,
            self.moved + other.moved,
            self.passes + other.passes,
        )

    def __mul__(self, factor: float) -> Work:
        return Work(
            self.linear * factor,
            self.attention * factor,
            self.repeated * factor,
            self.moved * factor,
            self.passes * factor,
        )


def prefill_work(shape: ModelShape, tokens: int, behind: float = 0.0) -> Work:
    """Return the work of reading a prompt of so many tokens up to the first token of the answer.

    behind: slots of K/V in front of it. Linear: 2 FLOPs for each weight of a layer and token, and the head once.
    Attention: a token sees what is in front and, in the mean, half of the prompt.
    """
    linear = 2.0 * shape.layers * shape.layer_weights * tokens + 2.0 * shape.head_weights
    attention = _attention(shape, shape.layers, tokens * behind + tokens * (tokens + 1) / 2)
    return Work(linear=linear, attention=attention, moved=_moved(shape, tokens), passes=1.0)


def compression_work(shape: ModelShape, windows: Sequence[WindowSize], way: Way) -> Work:
    """Return the work of compressing a document.

    `select` with `repeat`, and `hybrid`: each window is read behind the memory of those before it, and once more behind
    itself, in pieces of 256 tokens that see all of the window. Either pass ends at the attention of its last layer.
    `expected`: without the second pass; the queries of each head are multiplied with themselves, and each key with
    their covariance. `beacon`: one pass, with a row more for each beacon, which sees what the tokens before it do; and
    where heads choose among beacons, a second one as of `repeat`, behind the beacons.
    """
    whole = Work()
    for number, window in enumerate(windows):
        seen = _view(way, windows[:number])
        whole += _read_once(shape, window, way, seen)
        if not way.chooses or not window.ratio:
            continue
        repeats = way.scored == "repeat"
        whole += _repeated(shape, window, seen) if repeats else _expected(shape, window.tokens)
    return whole


def _read_once(shape: ModelShape, window: WindowSize, way: Way, seen: float) -> Work:
    tokens, beacons = window.tokens, window.beacons if window.ratio else 0
    if way.compression == "beacon" and way.chooses and window.ratio:
        beacons = window.among
    own = tokens * (tokens + 1) / 2 + beacons * (tokens + 1) / 2
    if way.compression == "beacon" and way.config.beacon_attn == "full-coverage":
        own += tokens * beacons / 2
    rows = tokens + beacons
    whole = not way.chooses  # beacons of the paper, for which the last layer is computed, too
    linear = float(shape.layers * shape.layer_weights) if whole else _without_last(shape)
    layers = shape.layers if whole else shape.layers - 1
    attention = _attention(shape, layers, rows * seen + own)
    return Work(linear=2.0 * linear * rows, attention=attention, moved=_moved(shape, rows), passes=rows / ROWS)


def _repeated(shape: ModelShape, window: WindowSize, seen: float) -> Work:
    tokens = window.tokens
    full, rest = divmod(tokens, PIECE)
    pairs = tokens * (window.among + seen) + full * PIECE * PIECE + rest * rest
    # the last layer works out the weights of attention, and does not use them
    attention = _attention(shape, shape.layers, pairs) - _attention(shape, 1, pairs) / 2
    linear = 2.0 * _without_last(shape) * tokens
    return Work(linear=linear, repeated=attention, moved=_moved(shape, tokens), passes=tokens / ROWS)


def _expected(shape: ModelShape, tokens: int) -> Work:
    products = 4.0 * shape.layers * shape.heads * tokens * shape.head_dim**2
    return Work(attention=products)


def _without_last(shape: ModelShape) -> float:
    """Return the weights of all layers where of the last one only queries, keys and values are computed."""
    return (shape.layers - 1) * shape.layer_weights + shape.attention_weights


def _attention(shape: ModelShape, layers: int, pairs: float) -> float:
    """Return the FLOPs of attention between so many queries and keys: 2 head_dim for the score, 2 for the value."""
    return 4.0 * layers * shape.heads * shape.head_dim * pairs


def _moved(shape: ModelShape, rows: float) -> float:
    """Return the numbers that go in and out between products, where norms, rotations, gates and sums are computed.

    In and out of two norms and two sums, 10 hidden; of the rotation of queries and keys, 6 of each; of the gate, 5
    intermediate.
    """
    rotated = (shape.heads + shape.kv_heads) * shape.head_dim
    return rows * shape.layers * (10.0 * shape.hidden + 6.0 * rotated + 5.0 * shape.intermediate)


def _view(way: Way, before: Sequence[WindowSize]) -> float:
    """Return the slots that a window is read behind: the sink, and what is seen of the windows before it."""
    sink = way.config.beacon_sink_size
    if not way.chooses:
        return sink + sum(window.slots for window in before)
    seen = [sum(window.seen_from(level) for window in before) for level in range(LEVELS)]
    return sink + next((slots for slots in seen if slots <= VIEW), min(VIEW, seen[-1]))


def compression_seconds(shape: ModelShape, work: Work, speed: Speed) -> float:
    """Return the seconds of compressing: each kind of work at its speed, and what each layer of a pass takes anyway."""
    return _seconds(shape, work, speed)


def first_token_seconds(shape: ModelShape, work: Work, kv_bytes: float, speed: Speed, weight_bytes: int) -> float:
    """Return the seconds from a prompt to the first token of its answer, the model and the memory being there.

    Not below what reading all weights and the K/V in front of the prompt takes.
    """
    least = _step_bytes(shape, kv_bytes, weight_bytes) / speed.bandwidth
    overhead = work.passes * shape.layers * speed.layer
    return max(_seconds(shape, work, speed) - overhead, least) + overhead


def token_seconds(shape: ModelShape, kv_bytes: float, speed: Speed, weight_bytes: int) -> float:
    """Return the seconds of each further token of one answer: all weights and K/V are read once."""
    return _step_bytes(shape, kv_bytes, weight_bytes) / speed.bandwidth + shape.layers * speed.layer


def break_even(compress: float, from_text: float, from_memory: float) -> float:
    """Return after how many questions a document has cost as much as prefilling it for each of them.

    All in seconds of the same device. Infinite where a memory saves nothing.
    """
    return compress / (from_text - from_memory) if from_text > from_memory else float("inf")


def _seconds(shape: ModelShape, work: Work, speed: Speed) -> float:
    computing = work.linear / speed.linear + work.attention / speed.attention + work.repeated / speed.repeated
    return computing + work.moved / speed.moving + work.passes * shape.layers * speed.layer


def _step_bytes(shape: ModelShape, kv_bytes: float, weight_bytes: int) -> float:
    return shape.step_weights * weight_bytes + kv_bytes
