"""A bare MindSpore step around Busway's native kernels: Cells with a bprop, MindSpore's autodiff, one graph."""

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from timing import serve

from models.kernels import native

LAYERS, HIDDEN, HEADS, FFN, VOCAB, SEQ, BATCH = 4, 256, 8, 688, 1024, 256, 4
WIDTH = HIDDEN // HEADS
ms.set_context(mode=ms.GRAPH_MODE)
rng = np.random.default_rng(0)
angles = np.outer(np.arange(SEQ), 10000.0 ** (-np.arange(0, WIDTH, 2) / WIDTH))
COS, SIN = (Tensor(f(angles).astype(np.float32)) for f in (np.cos, np.sin))
FIRST_KEY = Tensor(np.zeros(BATCH * SEQ, np.int32))


class Norm(nn.Cell):
    def __init__(self):
        super().__init__()
        self.weight = Parameter(Tensor(np.ones(HIDDEN, np.float32)))
        self.core = NormCore()

    def construct(self, x):
        return self.core(x, self.weight)


class NormCore(nn.Cell):
    def __init__(self):
        super().__init__()
        self.kernel = native.RMSNorm(1e-6)

    def construct(self, x, w):
        return self.kernel.forward(x, w)

    def bprop(self, x, w, out, dout):
        return self.kernel.backward(x, w, dout)


class SwiGLU(nn.Cell):
    def __init__(self):
        super().__init__()
        self.kernel = native.SwiGLU()

    def construct(self, gate_up):
        return self.kernel.forward(gate_up)

    def bprop(self, gate_up, out, dout):
        return (self.kernel.backward(gate_up, dout),)


class Attention(nn.Cell):
    def __init__(self):
        super().__init__()
        self.kernel = native.Attention(HEADS, HEADS, WIDTH**-0.5)
        self.cos, self.sin, self.first_key = COS, SIN, FIRST_KEY

    def construct(self, qkv):
        return self.kernel.forward(qkv, self.cos, self.sin, self.first_key)

    def bprop(self, qkv, out, dout):
        return (self.kernel.backward(qkv, self.cos, self.sin, self.first_key, out[0], out[1], dout[0]),)


class CrossEntropy(nn.Cell):
    def __init__(self):
        super().__init__()
        self.kernel = native.CrossEntropy()
        self.mean = Tensor(np.full(BATCH * SEQ, 1 / (BATCH * SEQ), np.float32))

    def construct(self, logits, labels):
        return self.kernel.forward(logits, labels)

    def bprop(self, logits, labels, out, dout):
        return self.kernel.backward(logits, labels, out[0], self.mean), ops.zeros_like(labels)


class Linear(nn.Cell):
    def __init__(self, columns, rows):
        super().__init__()
        self.weight = Parameter(Tensor((0.02 * rng.standard_normal((rows, columns))).astype(np.float32)))
        self.core = LinearCore()

    def construct(self, x):
        return self.core(x, self.weight)


class LinearCore(nn.Cell):
    def __init__(self):
        super().__init__()
        self.kernel = native.Matmul()

    def construct(self, x, w):
        return self.kernel.forward(x, w)

    def bprop(self, x, w, out, dout):
        return self.kernel.backward_input(dout, w), self.kernel.backward_weight(dout, x)


class Layer(nn.Cell):
    def __init__(self):
        super().__init__()
        self.norm1, self.qkv, self.attention, self.o = (
            Norm(),
            Linear(HIDDEN, 3 * HIDDEN),
            Attention(),
            Linear(HIDDEN, HIDDEN),
        )
        self.norm2, self.up, self.swiglu, self.down = Norm(), Linear(HIDDEN, 2 * FFN), SwiGLU(), Linear(FFN, HIDDEN)

    def construct(self, x):
        x = x + self.o(self.attention(self.qkv(self.norm1(x)))[0])
        return x + self.down(self.swiglu(self.up(self.norm2(x))))


class Llama(nn.Cell):
    def __init__(self):
        super().__init__()
        self.embedding = Parameter(Tensor((0.02 * rng.standard_normal((VOCAB, HIDDEN))).astype(np.float32)))
        self.layers = nn.CellList([Layer() for _ in range(LAYERS)])
        self.norm, self.head, self.loss = Norm(), Linear(HIDDEN, VOCAB), CrossEntropy()

    def construct(self, tokens, labels):
        x = ops.gather(self.embedding, tokens, 0)
        for layer in self.layers:
            x = layer(x)
        lse, target = self.loss(self.head(self.norm(x)), labels)
        return (lse - target).mean()


class Step(nn.Cell):
    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model = model
        model.set_grad()
        weights = model.trainable_params()
        for index, weight in enumerate(weights):
            weight.name = f"{index}.{weight.name}"
        self.weights = ParameterTuple(weights)
        self.first, self.second = self.weights.clone("first", init="zeros"), self.weights.clone("second", init="zeros")
        self.gradient = ops.GradOperation(get_by_list=True)
        self.decays = Tensor(np.array([0.1 if w.ndim > 1 else 0.0 for w in weights], np.float32))
        self.square_sum, self.adamw = native.SquareSum(), native.AdamW(0.9, 0.95, 1e-8)

    def construct(self, tokens, labels, lr, number):
        loss = self.model(tokens, labels)
        gradients = self.gradient(self.model, self.weights)(tokens, labels)
        factor = ops.minimum(1.0, 1.0 / (ops.sqrt(self.square_sum.forward(gradients)) + 1e-6))
        done = self.adamw.forward(self.weights, self.first, self.second, gradients, self.decays, factor, lr, number)
        return ops.depend(loss, done)


tokens = rng.integers(0, VOCAB, (BATCH, SEQ + 1)).astype(np.int32)
inputs, labels = Tensor(tokens[:, :-1].reshape(-1)), Tensor(tokens[:, 1:].reshape(-1))
train, lr, number = Step(Llama()), Tensor(np.array([3e-4], np.float32)), 0


def step() -> float:
    """One step; its loss."""
    global number
    number += 1
    return float(train(inputs, labels, lr, Tensor(np.array([number], np.float32))).asnumpy())


serve(step)
