"""A bare step of two ranks, by hand for one model and one technique: `bare_layout.py FOLDER tp|dp|cp|pp`.

Busway's native kernels, forward and backward written out, and plain MPI: `bare_mpi.cc` inside graphs, mpi4py between
them. Two ranks are known to be two, and everything blocks and spins, as each rank has a core. Weights and batches are
those of Busway's run.
"""

import sys
from itertools import cycle
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from steps.ranks import WORLD, serve
from steps.runs import SEQ, recipe_of

from models.attention import rotary_tables
from models.kernels import EMPTY_LSE, native
from models.kernels.build import compile_library
from models.weights import draw
from trainer.data.blend import Blend
from trainer.data.loader import Loader
from trainer.data.prepare import prepare

FOLDER, TECHNIQUE = sys.argv[1:]
RANK, BATCH, BATCHES = WORLD.rank, 8, 16
TP, PP = TECHNIQUE == "tp", TECHNIQUE == "pp"
RECIPE = recipe_of(FOLDER, [f"train.global_batch={BATCH}", "layout.micro_batch=1"])
SHAPE, SETTINGS = RECIPE.model, RECIPE.optimizer
INITIAL = {spec.name: draw(spec, RECIPE.train.seed, SHAPE.init_std) for spec in SHAPE.parameters()}
HEADS, FIRST_ROW = (SHAPE.heads // 2, RANK * SHAPE.vocab // 2) if TP else (SHAPE.heads, 0)
PLACES = np.arange(SEQ)
if TECHNIQUE == "cp":  # zigzag: chunks 0 and 3, or 1 and 2
    CHUNKS = np.split(PLACES, 4)
    PLACES, OTHERS = (np.concatenate([CHUNKS[rank], CHUNKS[3 - rank]]) for rank in (RANK, 1 - RANK))
TABLES = tuple(Tensor(table[PLACES]) for table in rotary_tables(SHAPE, SEQ))
TOKENS = len(PLACES) * {"pp": 1, "dp": BATCH // 2}.get(TECHNIQUE, BATCH)  # of one graph

ms.set_context(mode=ms.GRAPH_MODE)
LIBRARY, PREFIX = Path(FOLDER) / "bare_mpi.so", Path(sys.prefix)
if RANK == 0:
    link = [f"-L{PREFIX / 'lib'}", "-lmpi", f"-Wl,-rpath,{PREFIX / 'lib'}"]
    compile_library([str(Path(__file__).with_name("bare_mpi.cc"))], str(LIBRARY), [str(PREFIX / "include")], link)
WORLD.Barrier()


def _same(*tensors):
    return tensors if len(tensors) > 1 else tensors[0]


def mpi(name):
    """An operator of `bare_mpi.cc`."""
    return ops.Custom(f"{LIBRARY}:{name}", out_shape=_same, out_dtype=_same, func_type="aot")


def initial(name, dim):
    """A matrix, or under tp this rank's half along `dim`."""
    return np.split(INITIAL[name], 2, dim)[RANK] if TP else INITIAL[name]


class Sum(nn.Cell):
    """Over the ranks of tp."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.split, self.all_reduce = TP, mpi("AllReduce")

    def construct(self, x):
        return self.all_reduce(x) if self.split else x


class Matrix(nn.Cell):
    """y = x w^T, with rows of several parameters."""

    def __init__(self, *names, dim=0):
        super().__init__(auto_prefix=False)
        self.w = Parameter(Tensor(np.concatenate([initial(f"{name}.weight", dim) for name in names])), name=names[0])
        self.kernel = native.Matmul()

    def forward(self, x):
        return self.kernel.forward(x, self.w)

    def backward(self, dy, x):
        return self.kernel.backward_input(dy, self.w), self.kernel.backward_weight(dy, x)


class Norm(nn.Cell):
    def __init__(self, name):
        super().__init__(auto_prefix=False)
        self.w = Parameter(Tensor(INITIAL[f"{name}.weight"]), name=name)
        self.kernel = native.RMSNorm(SHAPE.norm_eps)

    def forward(self, x):
        return self.kernel.forward(x, self.w)

    def backward(self, dy, x):
        return self.kernel.backward(x, self.w, dy)


class Attention(nn.Cell):
    """Queries, keys and values of whole sequences, and attention: `(..., o, lse)`, all of which is saved."""

    def __init__(self, name):
        super().__init__(auto_prefix=False)
        self.qkv = Matrix(*(f"{name}.{letter}_proj" for letter in "qkv"))
        self.weights = (self.qkv.w,)
        self.kernel = native.Attention(HEADS, HEADS, SHAPE.head_width**-0.5)
        self.tables = (*TABLES, Tensor(np.zeros(TOKENS, np.int32)))

    def forward(self, x):
        qkv = self.qkv.forward(x)
        return (qkv,) + self.kernel.forward(qkv, *self.tables)

    def backward(self, do, x, saved):
        dx, dw = self.qkv.backward(self.kernel.backward(saved[0], *self.tables, saved[1], saved[2], do), x)
        return dx, (dw,)


class Ring(nn.Cell):
    """The same over two ranks: keys and values are exchanged, and the gradients of the other's are."""

    def __init__(self, name):
        super().__init__(auto_prefix=False)
        self.q, self.kv = Matrix(f"{name}.q_proj"), Matrix(f"{name}.k_proj", f"{name}.v_proj")
        self.weights = (self.q.w, self.kv.w)
        self.turn_q, self.turn_kv = native.Rotary(HEADS, 0), native.Rotary(0, HEADS)
        self.kernel, self.exchange = native.BlockAttention(HEADS, HEADS, SHAPE.head_width**-0.5), mpi("Exchange")
        base = np.repeat(np.arange(BATCH) * len(PLACES), len(PLACES)).astype(np.int32)
        own, other = (np.tile(np.searchsorted(p, PLACES, "right"), BATCH).astype(np.int32) for p in (PLACES, OTHERS))
        self.own, self.other = ((Tensor(base), Tensor(base + last)) for last in (own, other))
        o, lse = np.zeros((TOKENS, SHAPE.hidden), np.float32), np.full(HEADS * TOKENS, EMPTY_LSE, np.float32)
        self.start, self.tables = (Tensor(o), Tensor(lse)), TABLES

    def forward(self, x):
        kv = self.turn_kv.forward(self.kv.forward(x), *self.tables)
        q = self.turn_q.forward(self.q.forward(x), *self.tables)
        o, lse = self.kernel.forward(q, kv, *self.own, *self.start)
        return (q, kv) + self.kernel.forward(q, self.exchange(kv), *self.other, o, lse)

    def backward(self, do, x, saved):
        q, kv, o, lse = saved
        dq, dkv = self.kernel.backward(q, kv, *self.own, o, lse, do)
        more, other = self.kernel.backward(q, self.exchange(kv), *self.other, o, lse, do)
        dkv = self.turn_kv.backward(dkv + self.exchange(other), *self.tables)
        dx, dq = self.q.backward(self.turn_q.backward(dq + more, *self.tables), x)
        more, dkv = self.kv.backward(dkv, x)
        return dx + more, (dq, dkv)


class Layer(nn.Cell):
    def __init__(self, number):
        super().__init__(auto_prefix=False)
        name = f"layers.{number}"
        self.norm1, self.norm2 = Norm(f"{name}.attention_norm"), Norm(f"{name}.feed_forward_norm")
        self.attention = (Ring if TECHNIQUE == "cp" else Attention)(f"{name}.attention")
        self.o, self.down = Matrix(f"{name}.attention.o_proj", dim=1), Matrix(f"{name}.feed_forward.down_proj", dim=1)
        self.up = Matrix(f"{name}.feed_forward.gate_proj", f"{name}.feed_forward.up_proj")
        self.weights = (self.norm1.w, *self.attention.weights, self.o.w, self.norm2.w, self.up.w, self.down.w)
        self.swiglu, self.total = native.SwiGLU(), Sum()

    def forward(self, x):
        a = self.norm1.forward(x)
        attended = self.attention.forward(a)
        h = x + self.total(self.o.forward(attended[-2]))
        b = self.norm2.forward(h)
        up = self.up.forward(b)
        s = self.swiglu.forward(up)
        return h + self.total(self.down.forward(s)), (x, a) + attended + (h, b, up, s)

    def backward(self, dy, saved):
        x, a, attended = saved[0], saved[1], saved[2:-4]
        h, b, up, s = saved[-4:]
        ds, d_down = self.down.backward(dy, s)
        db, d_up = self.up.backward(self.swiglu.backward(up, ds), b)
        dh, d_norm2 = self.norm2.backward(self.total(db), h)
        dh = dh + dy
        do, d_o = self.o.backward(dh, attended[-2])
        da, d_attention = self.attention.backward(do, a, attended)
        dx, d_norm1 = self.norm1.backward(self.total(da), x)
        return dx + dh, (d_norm1,) + d_attention + (d_o, d_norm2, d_up, d_down)


class Layers(nn.Cell):
    """Several; `saved` is flat."""

    def __init__(self, numbers):
        super().__init__(auto_prefix=False)
        self.layers = nn.CellList([Layer(number) for number in numbers], auto_prefix=False)
        self.weights = tuple(weight for layer in self.layers for weight in layer.weights)
        self.saves = 10 if TECHNIQUE == "cp" else 9

    def forward(self, x):
        saved = ()
        for layer in self.layers:
            x, kept = layer.forward(x)
            saved = saved + kept
        return x, saved

    def backward(self, dx, saved):
        gradients = ()
        for j in range(len(self.layers)):
            i = len(self.layers) - 1 - j
            dx, some = self.layers[i].backward(dx, saved[self.saves * i : self.saves * (i + 1)])
            gradients = some + gradients
        return dx, gradients


class Embedding(nn.Cell):
    def __init__(self):
        super().__init__(auto_prefix=False)
        self.w, self.kernel = Parameter(Tensor(initial("embedding.weight", 0)), name="embedding"), native.Embedding()
        self.first_row, self.total = FIRST_ROW, Sum()

    def forward(self, tokens):
        return self.total(self.kernel.forward(tokens - self.first_row if self.first_row else tokens, self.w))

    def backward(self, dx, tokens):
        return self.kernel.backward(tokens - self.first_row if self.first_row else tokens, dx, self.w)


class Head(nn.Cell):
    """Norm, head and cross-entropy, forward and backward at once: `loss, dx, gradients`."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.norm, self.head, self.kernel = Norm("norm"), Matrix("head"), native.CrossEntropy()
        self.weights = (self.norm.w, self.head.w)
        self.mean = Tensor(np.full(TOKENS, 1 / (BATCH * SEQ), np.float32))
        self.split, self.first_row, self.total, self.exchange = TP, FIRST_ROW, Sum(), mpi("Exchange")
        self.sum = ops.ReduceSum()

    def run(self, x, labels):
        a = self.norm.forward(x)
        logits = self.head.forward(a)
        labels = labels - self.first_row if self.first_row else labels
        lse, target = self.kernel.forward(logits, labels)
        if self.split:
            more, rest = self.exchange(lse, target)
            largest = ops.maximum(lse, more)
            lse, target = largest + ops.log(ops.exp(lse - largest) + ops.exp(more - largest)), target + rest
        loss = self.sum((lse - target) * self.mean).reshape((1,))
        da, d_head = self.head.backward(self.kernel.backward(logits, labels, lse, self.mean), a)
        dx, d_norm = self.norm.backward(self.total(da), x)
        return loss, dx, (d_norm, d_head)


class Update(nn.Cell):
    """Clip and AdamW. A rank of tp or pp has gradients of its own, but those of norms are the same under tp."""

    def __init__(self, weights):
        super().__init__(auto_prefix=False)
        self.weights = ParameterTuple(weights)
        self.first, self.second = self.weights.clone("first", init="zeros"), self.weights.clone("second", init="zeros")
        self.decays = Tensor(np.array([SETTINGS.weight_decay * (w.ndim > 1) for w in weights], np.float32))
        self.square_sum, self.adamw = native.SquareSum(), native.AdamW(*SETTINGS.betas, SETTINGS.eps)
        self.lr, self.clip = Tensor(np.array([SETTINGS.lr], np.float32)), SETTINGS.clip
        self.tp, self.pp, self.all_reduce = TP, PP, mpi("AllReduce")

    def run(self, gradients, loss, number):
        own, norms = (), ()
        for gradient in gradients:
            if self.tp and gradient.ndim < 2:
                norms = norms + (gradient,)
            else:
                own = own + (gradient,)
        square = self.square_sum.forward(own)
        if self.tp:
            square = self.all_reduce(square) + self.square_sum.forward(norms)
        if self.pp:
            square, loss = self.all_reduce(square, loss)
        factor = ops.minimum(1.0, self.clip / (ops.sqrt(square) + 1e-6))
        moments = (self.first, self.second)
        return ops.depend(
            loss, self.adamw.forward(self.weights, *moments, gradients, self.decays, factor, self.lr, number)
        )


class Step(nn.Cell):
    """tp, dp and cp: one graph."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.embedding, self.layers, self.head = Embedding(), Layers(range(SHAPE.layers)), Head()
        self.update = Update([self.embedding.w, *self.layers.weights, *self.head.weights])
        self.sums, self.all_reduce = not TP, mpi("AllReduce")

    def construct(self, tokens, labels, number):
        x, saved = self.layers.forward(self.embedding.forward(tokens))
        loss, dx, gradients = self.head.run(x, labels)
        dx, inner = self.layers.backward(dx, saved)
        gradients = (self.embedding.backward(dx, tokens),) + inner + gradients
        if self.sums:
            summed = self.all_reduce(*gradients, loss)
            gradients, loss = summed[:-1], summed[-1]
        return self.update.run(gradients, loss, number)


class First(nn.Cell):
    """pp, the forward of rank 0: `(y, *saved)`."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.embedding, self.layers = Embedding(), Layers(range(SHAPE.layers // 2))
        self.weights = (self.embedding.w, *self.layers.weights)

    def construct(self, tokens):
        y, saved = self.layers.forward(self.embedding.forward(tokens))
        return (y,) + saved


class Adding(nn.Cell):
    """Sets the gradients of the first micro-batch and adds those of the others up."""

    def __init__(self, stage, sums, first):
        super().__init__(auto_prefix=False)
        self.stage, self.sums, self.put = stage, sums, ops.Assign() if first else ops.AssignAdd()

    def add(self, result, gradients):
        for i in range(len(gradients)):
            result = ops.depend(result, self.put(self.sums[i], gradients[i]))
        return result


class Backward(Adding):
    """pp, the backward of rank 0."""

    def construct(self, dy, tokens, *saved):
        dx, gradients = self.stage.layers.backward(dy, saved)
        return self.add(dx, (self.stage.embedding.backward(dx, tokens),) + gradients)


class Last(nn.Cell):
    """pp, rank 1."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.layers, self.head = Layers(range(SHAPE.layers // 2, SHAPE.layers)), Head()
        self.weights = (*self.layers.weights, *self.head.weights)


class Both(Adding):
    """pp, forward and backward of rank 1, which 1F1B has follow each other: `loss, dx`."""

    def construct(self, x, labels):
        y, saved = self.stage.layers.forward(x)
        loss, dy, gradients = self.stage.head.run(y, labels)
        dx, inner = self.stage.layers.backward(dy, saved)
        return self.add(loss, inner + gradients), dx


class Finish(nn.Cell):
    def __init__(self, weights, sums):
        super().__init__(auto_prefix=False)
        self.update, self.sums = Update(weights), sums

    def construct(self, loss, number):
        return self.update.run(self.sums, loss, number)


class Pipeline:
    """1F1B over two ranks."""

    def __init__(self):
        self.stage = First() if RANK == 0 else Last()
        sums = ParameterTuple(self.stage.weights).clone("sums", init="zeros")
        self.graphs = [(Backward if RANK == 0 else Both)(self.stage, sums, first) for first in (True, False)]
        self.finish, self.run = Finish(self.stage.weights, sums), self.first if RANK == 0 else self.last
        self.sent = []

    def __call__(self, tokens, labels, number):
        loss = Tensor(np.array([self.run(tokens, labels)], np.float32))
        for request, _ in self.sent:
            request.Wait()
        self.sent.clear()
        return self.finish(loss, number)

    def send(self, tensor):
        out = tensor.asnumpy()
        self.sent.append((WORLD.Isend(out, 1 - RANK), out))

    def receive(self):
        array = np.empty((SEQ, SHAPE.hidden), np.float32)
        WORLD.Recv(array, 1 - RANK)
        return Tensor.from_numpy(array)

    def first(self, tokens, labels):
        waiting = []
        for i in range(BATCH + 1):
            if i < BATCH:
                y, *saved = self.stage(tokens[i])
                self.send(y)
                waiting.append(saved)
            if i > 0:
                self.graphs[i > 1](self.receive(), tokens[i - 1], *waiting.pop(0))
        return 0.0

    def last(self, tokens, labels):
        total = 0.0
        for i in range(BATCH):
            loss, dx = self.graphs[i > 0](self.receive(), labels[i])
            self.send(dx)
            total += float(loss.asnumpy()[0])
        return total


def batches():
    """Tokens and labels of this rank, of the first steps of Busway's run."""
    corpus = prepare(RECIPE.data, SHAPE.vocab, print, False)
    loader = Loader(Blend(corpus.train, corpus.weights, RECIPE.train.seed), BATCH, 1, 0, 1)
    for _ in range(BATCHES):
        fields = next(loader)[:2]
        if TECHNIQUE == "dp":
            fields = [np.split(field, 2)[RANK] for field in fields]
        fields = [np.ascontiguousarray(field[:, PLACES]) for field in fields]
        yield [[Tensor(row) for row in field] if PP else Tensor(field.reshape(-1)) for field in fields]
    loader.close()


train, data, number = Pipeline() if PP else Step(), cycle(list(batches())), 0


def step() -> float:
    """One step; its loss."""
    global number
    number += 1
    return float(train(*next(data), Tensor(np.array([number], np.float32))).asnumpy()[0])


serve(step)
