"""The C++ kernels against the plain ones, over odd shapes, in one graph an implementation.

Run as a script it prints a digest of all that the native kernels return: the number of threads must not change it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

from models.kernels import native, plain

SEED = 21
# Tokens of documents: the first key that each sees restarts at their starts.
ATTENTION = [  # batch, seq, heads, kv_heads, dim, document length
    (2, 37, 4, 2, 16, 37),
    (1, 70, 2, 1, 80, 9),
    (1, 9, 3, 3, 96, 9),
    (1, 131, 2, 2, 256, 50),
    (2, 300, 6, 2, 32, 280),  # longer than a block of keys, a document that starts inside the second one
    (1, 65, 2, 1, 10, 65),
    (1, 1, 1, 1, 16, 1),
]
ROTARY = [(74, 37, 4, 2, 16), (5, 5, 1, 1, 10), (60, 12, 3, 1, 80)]  # tokens, seq, heads, kv_heads, dim
BLOCKS = [  # queries, keys, heads, kv_heads, dim
    (37, 50, 4, 2, 16),
    (70, 9, 2, 1, 33),
    (1, 1, 1, 1, 17),
    (131, 300, 2, 2, 256),
    (200, 515, 6, 2, 47),
]
MATMUL = [(1, 1, 1), (5, 7, 3), (130, 33, 600), (600, 19, 130)]  # tokens, into, out of a linear
NORM = [(5, 7), (33, 96), (1, 256), (70, 80), (300, 19)]
SWIGLU = [(5, 7), (33, 43), (3, 160)]
VOCAB = [(5, 11), (3, 4099), (1, 128)]
EMBEDDING = [(9, 7, 70), (64, 5, 130)]
SIZES = [(3, 5), (1,), (0,), (40000,), (16385,), (7, 11, 2)]

needs_native = pytest.mark.skipif(bool(native.missing()), reason=native.missing())


def cases(room, random) -> list[tuple[nn.Cell, list[np.ndarray]]]:
    """Every kernel of `room` on every shape, with the same inputs for the same seed; they are exact in float32."""

    def draw(*shape):
        return random.standard_normal(shape).astype(np.float32)

    made = []
    for batch, seq, heads, kv_heads, dim, document in ATTENTION:
        first = np.tile(np.arange(seq) // document * document, batch).astype(np.int32)
        qkv, do = draw(batch * seq, (heads + 2 * kv_heads) * dim), draw(batch * seq, heads * dim)
        attention = room.Attention(heads, kv_heads, dim**-0.5, documents=document < seq)
        made.append((AttentionBoth(attention), [do, qkv, *angles(seq, dim), first]))
        wq, wk, dy = draw(dim), draw(dim), draw(*qkv.shape)
        made.append((Both(room.HeadNorm(heads, kv_heads, 1e-5)), [dy, qkv, wq, wk]))
    for tokens, seq, heads, kv_heads, dim in ROTARY:
        qkv, dqkv = (draw(tokens, (heads + 2 * kv_heads) * dim) for _ in range(2))
        made.append((RotaryBoth(room.Rotary(heads, kv_heads)), [dqkv, qkv, *angles(seq, dim)]))
    for queries, keys, heads, kv_heads, dim in BLOCKS:
        first, last = spans(random, queries, keys)
        q, kv, do = draw(queries, heads * dim), draw(keys, 2 * kv_heads * dim), draw(queries, heads * dim)
        o, lse = draw(queries, heads, dim), draw(heads, queries)
        new = random.random(queries) < 0.3  # no block came before, or none that shows these queries a key
        o[new], lse[:, new] = 0, plain.EMPTY_LSE
        block = BlockBoth(room.BlockAttention(heads, kv_heads, dim**-0.5))
        made.append((block, [do, q, kv, first, last, o.reshape(queries, -1), lse.reshape(-1)]))
    for tokens, into, out in MATMUL:
        made.append((MatmulBoth(room.Matmul()), [draw(tokens, out), draw(tokens, into), draw(out, into)]))
    for rows, hidden in NORM:
        made.append((Both(room.RMSNorm(1e-6)), [draw(rows, hidden), draw(rows, hidden), draw(hidden)]))
    for rows, width in SWIGLU:
        made.append((Both(room.SwiGLU()), [draw(rows, width), draw(rows, 2 * width) * 4]))
    for rows, vocab in VOCAB:
        labels = random.integers(-2, vocab + 2, rows).astype(np.int32)
        labels[0] = vocab - 1
        made.append((LossBoth(room.CrossEntropy()), [draw(rows), draw(rows, vocab) * 8, labels]))
    for rows, vocab, hidden in EMBEDDING:
        ids = random.integers(-1, vocab + 1, rows).astype(np.int32)
        ids[0] = 0
        made.append((EmbeddingBoth(room.Embedding()), [draw(rows, hidden), ids, draw(vocab, hidden)]))
    made.append((Squares(room.SquareSum()), [draw(*shape) for shape in SIZES]))
    return made


def angles(seq, dim) -> list[np.ndarray]:
    turn = np.outer(np.arange(seq), 1 / 10000 ** (np.arange(0, dim, 2) / dim))
    return [np.cos(turn).astype(np.float32), np.sin(turn).astype(np.float32)]


def spans(random, queries, keys) -> tuple[np.ndarray, np.ndarray]:
    """First and last keys of queries: in order and not, past both ends, empty; the first query sees the first key."""
    first, last = random.integers(-3, keys + 3, (2, queries)).astype(np.int32)
    last = np.where(random.random(queries) < 0.7, np.maximum(first, last), last)
    some = slice(queries // 3, 2 * queries // 3)
    first[some], last[some] = 0, np.arange(queries, dtype=np.int32)[some]
    first[0], last[0] = 0, keys
    return first, last


class MatmulBoth(nn.Cell):
    def __init__(self, kernel):
        super().__init__()
        self.kernel = kernel

    def construct(self, dy, x, w):
        return self.kernel.forward(x, w), self.kernel.backward_input(dy, w), self.kernel.backward_weight(dy, x)


class Both(nn.Cell):
    def __init__(self, kernel):
        super().__init__()
        self.kernel = kernel

    def construct(self, dy, *inputs):
        return self.kernel.forward(*inputs), self.kernel.backward(*inputs, dy)


class AttentionBoth(Both):
    def construct(self, do, qkv, cos, sin, first_key):
        o, lse = self.kernel.forward(qkv, cos, sin, first_key)
        return o, lse, self.kernel.backward(qkv, cos, sin, first_key, o, lse, do)


class RotaryBoth(Both):
    def construct(self, dqkv, qkv, cos, sin):
        return self.kernel.forward(qkv, cos, sin), self.kernel.backward(dqkv, cos, sin)


class BlockBoth(Both):
    def construct(self, do, q, kv, first, last, o, lse):
        o, lse = self.kernel.forward(q, kv, first, last, o, lse)
        empty = lse == plain.EMPTY_LSE  # not to be the largest number of the output
        return o, lse.masked_fill(empty, 0), empty.astype(o.dtype), self.kernel.backward(q, kv, first, last, o, lse, do)


class LossBoth(Both):
    def construct(self, weight, logits, labels):
        lse, target = self.kernel.forward(logits, labels)
        return lse, target, self.kernel.backward(logits, labels, lse, weight)


class EmbeddingBoth(Both):
    def construct(self, dx, ids, table):
        return self.kernel.forward(ids, table), self.kernel.backward(ids, dx, table)


class Squares(Both):
    def construct(self, *gradients):
        return self.kernel.forward(gradients)


class All(nn.Cell):
    """One graph for all cases: a graph a case would take a second each to compile."""

    def __init__(self, cells, counts):
        super().__init__()
        self.parts = nn.CellList(cells)
        ends = np.cumsum(counts).tolist()
        self.spans = tuple((end - count, end) for end, count in zip(ends, counts, strict=True))

    def construct(self, *inputs):
        results = ()
        for i, part in enumerate(self.parts):
            results = results + (part(*inputs[self.spans[i][0] : self.spans[i][1]]),)
        return results


def flat(result) -> list[np.ndarray]:
    if isinstance(result, Tensor):
        return [result.asnumpy()]
    return [array for part in result for array in flat(part)]


def run(made, dtype) -> list[list[np.ndarray]]:
    """What each case returns, as arrays."""
    ms.set_context(mode=ms.GRAPH_MODE)
    arrays = [a for _, inputs in made for a in inputs]
    tensors = [Tensor(a.astype(dtype) if a.dtype == np.float32 else a) for a in arrays]
    return [flat(result) for result in All([cell for cell, _ in made], [len(i) for _, i in made])(*tensors)]


@pytest.fixture(scope="module")
def expected():
    print(f"seed {SEED}")
    return run(cases(plain, np.random.default_rng(SEED)), np.float64)


@needs_native
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-5)])
def test_every_kernel_equals_its_plain_definition_forward_and_backward(expected, dtype, tolerance):
    made = cases(native, np.random.default_rng(SEED))
    wrong = []
    for (cell, inputs), ours, theirs in zip(made, run(made, dtype), expected, strict=True):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert a.dtype == dtype and a.shape == b.shape
            # A target may be 0 alone; everything else has a largest value.
            error = np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)
            if not error <= tolerance:
                wrong.append(f"{type(cell.kernel).__name__} {[x.shape for x in inputs]} output {i}: {error:.1e}")
    assert not wrong, "\n".join(wrong)


@needs_native
def test_a_nan_or_an_infinity_in_any_input_comes_out_not_finite():
    """The loop stops on a loss that is not finite, so no kernel may swallow one."""
    random = np.random.default_rng(SEED)
    poisoned, names = [], []
    for cell, inputs in cases(native, random):
        for i, value in enumerate(inputs):
            if value.dtype != np.float32 or not 0 < value.shape[0] <= 64:
                continue
            for poison in (np.nan, np.inf):
                if isinstance(cell.kernel, native.SwiGLU) and poison == np.inf:
                    continue  # silu(-inf) is 0 in the limit
                bad = value.copy()
                bad.flat[0] = poison
                poisoned.append((cell, [*inputs[:i], bad, *inputs[i + 1 :]]))
                names.append(f"{type(cell.kernel).__name__} {poison} in input {i} {[x.shape for x in inputs]}")
    assert len(names) > 40
    results = run(poisoned, np.float32)
    finite = [name for name, r in zip(names, results, strict=True) if all(np.isfinite(a).all() for a in r)]
    assert not finite, "\n".join(finite)


class Update(nn.Cell):
    def __init__(self, kernel, weights, decays):
        super().__init__()
        self.kernel, self.decays = kernel, decays
        self.weights, self.first, self.second = (
            ms.ParameterTuple([Parameter(Tensor(w * keep), name=f"{name}{i}") for i, w in enumerate(weights)])
            for name, keep in (("w", 1), ("m", 0), ("v", 0))
        )

    def construct(self, factor, lr, step, *gradients):
        return self.kernel.forward(self.weights, self.first, self.second, gradients, self.decays, factor, lr, step)


@needs_native
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.0, 0.95), (0.9, 0.0)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-6)])
def test_adamw_writes_weights_and_moments_as_plain_does(dtype, tolerance, betas):
    print(f"seed {SEED}")
    random = np.random.default_rng(SEED)
    weights = [random.standard_normal(shape).astype(dtype) for shape in SIZES]
    decays = Tensor(np.array([0.1, 0, 0.1, 0.1, 0.3, 0.2], dtype))
    ours, theirs = (Update(room.AdamW(*betas, 1e-8), weights, decays) for room in (native, plain))
    for step in range(1, 4):
        gradients = [Tensor(random.standard_normal(shape).astype(dtype)) for shape in SIZES]
        numbers = [Tensor(np.array([x], dtype)) for x in (0.3, 1e-2)]
        done = [update(*numbers, Tensor([step], ms.int32), *gradients) for update in (ours, theirs)]
        assert [float(x.asnumpy()[0]) for x in done] == [step, step]
    for group in ("weights", "first", "second"):
        for a, b in zip(getattr(ours, group), getattr(theirs, group), strict=True):
            largest = np.abs(b.asnumpy()).max(initial=0)
            np.testing.assert_allclose(a.asnumpy(), b.asnumpy(), rtol=0, atol=tolerance * largest)
    ours(*numbers, Tensor([4], ms.int32), Tensor(np.full(SIZES[0], np.nan, dtype)), *gradients[1:])
    assert np.isnan(ours.weights[0].asnumpy()).all() and np.isfinite(ours.weights[3].asnumpy()).all()


@needs_native
@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        ((b"float32", b"float64"), "busway_swiglu: tensor 1 must be float32, but is float64"),
        ((b"float16", b"float16"), "busway_swiglu takes float32 or float64, not float16"),
    ],
)
def test_a_dtype_that_does_not_fit_is_an_error_and_not_rubbish(capfd, dtypes, message):
    """Called by hand: a failed operator leaves MindSpore's other operators failing in the same process."""
    names = (ctypes.c_char_p * 2)(*dtypes)
    assert ctypes.CDLL(str(native.LIBRARY)).busway_swiglu(2, None, None, None, names, None, None) != 0
    assert message in capfd.readouterr().err


@needs_native
def test_the_number_of_threads_does_not_change_a_bit():
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-P", __file__]
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, "OMP_NUM_THREADS": str(n), "PYTHONPATH": str(root)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in (1, 3)
    ]
    digests = [process.communicate()[0].split()[-1] for process in started]
    assert len(digests[0]) == 64 and len(set(digests)) == 1, digests


def digest() -> str:
    total = hashlib.sha256()
    for dtype in (np.float32, np.float64):
        for result in run(cases(native, np.random.default_rng(SEED)), dtype):
            for array in result:
                total.update(array.tobytes())
    return total.hexdigest()


if __name__ == "__main__":
    print(digest())
