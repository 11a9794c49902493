"""A task file as a user may write one: two domains, told by the sign of the first coordinate."""

import torch

from routerzoo.bench.task import Batch, BenchTask, Prediction


class Signs(BenchTask):
    """The domain is a sign."""

    name = "signs"
    title = "sign of the first coordinate"
    predictions = (Prediction("LinearRouter", "HashRouter", "a hyperplane tells the sign"),)
    dim = 8
    num_experts = 4
    hidden_dim = 8
    num_domains = 2
    vocab_size = 8
    tokens = 64
    sequence_length = 8
    steps = 20
    evaluation_tokens = 256

    def batch(self, tokens, generator, progress):
        x_TD = torch.randn(tokens, self.dim, generator=generator)
        domain_T = (x_TD[:, 0] > 0).long()
        sign_T1 = 2.0 * domain_T.unsqueeze(1) - 1
        return Batch(x_TD, sign_T1 * x_TD, domain_T, self.random_ids(tokens, generator))
