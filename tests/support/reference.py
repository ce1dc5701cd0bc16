"""Slow references that the tests of layers, bases and forms compare with."""

from torch import Tensor

from mote.tuner import MoteConfig
from mote.tuner.layer import MoteLinear


def slow_layer(layer: MoteLinear, conf: MoteConfig, x: Tensor, steps: Tensor) -> Tensor:
    """The equation of section 3.2, written out token by token and expert by expert."""
    r = conf.r
    scaling = conf.lora_alpha / conf.r
    a = layer.mote_A["default"].weight
    b = layer.mote_B["default"].weight

    def expert(index: int, token: Tensor) -> Tensor:
        part = slice(index * r, (index + 1) * r)
        return scaling * (b[:, part] @ (a[part] @ token))

    out = layer.base_layer(x).clone()
    shared = int(conf.shared)
    for row in range(x.shape[0]):
        for t in range(x.shape[1]):
            step = int(steps[row, t])
            names = list(conf.experts)
            if step:
                own = expert(shared + step - 1, x[row, t])
            elif conf.question_expert == "mean":
                own = sum(expert(shared + i, x[row, t]) for i in range(len(names))) / len(names)
            else:
                own = expert(shared + names.index(conf.question_expert), x[row, t])
            out[row, t] += conf.mix * own
            if shared:
                out[row, t] += (1 - conf.mix) * expert(0, x[row, t])
    return out
