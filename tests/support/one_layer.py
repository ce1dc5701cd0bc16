"""A model of one adapted layer."""

from torch import Tensor, nn


class OneLayer(nn.Module):
    """The smallest model that reads ids through a linear layer."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, 6)
        self.linear = nn.Linear(6, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.linear(self.embed(input_ids))
        return out
