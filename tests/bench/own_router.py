"""Routers that no package registers."""

import os
import signal

import torch
from torch import nn

from routerzoo import LogitRouter
from routerzoo.functional import gate_linear


class OwnRouter(LogitRouter):
    """A gate of its own."""

    def __init__(self, spec, *, top_k=2, init_std=0.02):
        super().__init__(spec, top_k=top_k)
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model) * init_std)

    def logits(self, x_TD, context):
        return gate_linear(x_TD, self.weight)


class NaNRouter(OwnRouter):
    def logits(self, x_TD, context):
        return super().logits(x_TD, context) * float("nan")


class RaisingRouter(OwnRouter):
    def logits(self, x_TD, context):
        return super().logits(x_TD[:, 1:], context)


class KilledRouter(OwnRouter):
    def logits(self, x_TD, context):
        if self.training and context.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().logits(x_TD, context)


class ExitingRouter(OwnRouter):
    def __init__(self, spec, *, top_k=2):
        os._exit(4)
