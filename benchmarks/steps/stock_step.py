"""The same step of stock MindSpore operators and autodiff, written without tricks."""

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from timing import serve

LAYERS, HIDDEN, HEADS, FFN, VOCAB, SEQ, BATCH = 4, 256, 8, 688, 1024, 256, 4
WIDTH = HIDDEN // HEADS
ms.set_context(mode=ms.GRAPH_MODE)
rng = np.random.default_rng(0)
angles = np.outer(np.arange(SEQ), 10000.0 ** (-np.arange(0, WIDTH, 2) / WIDTH))
COS, SIN = (Tensor(f(angles).astype(np.float32)) for f in (np.cos, np.sin))
MASK = Tensor(np.triu(np.full((SEQ, SEQ), -1e9, np.float32), 1))


def weight(*shape):
    return Parameter(Tensor((0.02 * rng.standard_normal(shape)).astype(np.float32)))


class Norm(nn.Cell):
    def __init__(self):
        super().__init__()
        self.weight = Parameter(Tensor(np.ones(HIDDEN, np.float32)))

    def construct(self, x):
        return x * ops.rsqrt(ops.mean(x * x, -1, True) + 1e-6) * self.weight


class Attention(nn.Cell):
    def __init__(self):
        super().__init__()
        self.qkv, self.o = weight(3 * HIDDEN, HIDDEN), weight(HIDDEN, HIDDEN)
        self.cos, self.sin, self.mask = COS, SIN, MASK
        self.linear, self.scores, self.mix = (
            ops.MatMul(transpose_b=True),
            ops.BatchMatMul(transpose_b=True),
            ops.BatchMatMul(),
        )

    def rotate(self, x):
        a, b = x[..., : WIDTH // 2], x[..., WIDTH // 2 :]
        return ops.concat((a * self.cos - b * self.sin, b * self.cos + a * self.sin), -1)

    def construct(self, x):
        qkv = self.linear(x, self.qkv).reshape((BATCH, SEQ, 3, HEADS, WIDTH)).transpose((2, 0, 3, 1, 4))
        scores = self.scores(self.rotate(qkv[0]), self.rotate(qkv[1])) * WIDTH**-0.5 + self.mask
        o = self.mix(ops.softmax(scores, -1), qkv[2])
        return self.linear(o.transpose((0, 2, 1, 3)).reshape((BATCH * SEQ, HIDDEN)), self.o)


class FeedForward(nn.Cell):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = weight(FFN, HIDDEN), weight(FFN, HIDDEN), weight(HIDDEN, FFN)
        self.linear = ops.MatMul(transpose_b=True)

    def construct(self, x):
        return self.linear(ops.silu(self.linear(x, self.gate)) * self.linear(x, self.up), self.down)


class Llama(nn.Cell):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = weight(VOCAB, HIDDEN), weight(VOCAB, HIDDEN)
        self.norms = nn.CellList([Norm() for _ in range(2 * LAYERS + 1)])
        self.blocks = nn.CellList([block() for _ in range(LAYERS) for block in (Attention, FeedForward)])
        self.linear = ops.MatMul(transpose_b=True)

    def construct(self, tokens, labels):
        x = ops.gather(self.embedding, tokens, 0)
        for i, block in enumerate(self.blocks):
            x = x + block(self.norms[i](x))
        return ops.cross_entropy(self.linear(self.norms[-1](x), self.head), labels)


class Step(nn.Cell):
    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model = model
        weights = model.trainable_params()
        for index, parameter in enumerate(weights):
            parameter.name = f"{index}.{parameter.name}"
        self.weights = ParameterTuple(weights)
        self.gradient = ops.value_and_grad(model, None, self.weights)
        matrices = [w for w in weights if w.ndim > 1]
        norms = [w for w in weights if w.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms}, {"order_params": weights}]
        self.optimizer = nn.AdamWeightDecay(groups, learning_rate=3e-4, beta1=0.9, beta2=0.95, eps=1e-8)

    def construct(self, tokens, labels):
        loss, gradients = self.gradient(tokens, labels)
        gradients = ops.clip_by_global_norm(gradients, 1.0)
        return ops.depend(loss, self.optimizer(gradients))


tokens = rng.integers(0, VOCAB, (BATCH, SEQ + 1)).astype(np.int32)
inputs, labels = Tensor(tokens[:, :-1].reshape(-1)), Tensor(tokens[:, 1:].reshape(-1))
train = Step(Llama())


def step() -> float:
    """One step; its loss."""
    return float(train(inputs, labels).asnumpy())


serve(step)
