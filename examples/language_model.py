"""Train a small language model without epochs, and measure its layers after every few steps.

    python examples/language_model.py                # about a minute on one core
    python examples/language_model.py --steps 60     # shorter

The text is the source of Python's own argparse module, character by character, so that nothing has to be
downloaded. The script prints the loss and the range of the learning rates after every measurement. A model
that knows only how frequent each character is would stay at a loss of about 3 nats.
"""

import argparse
from itertools import pairwise

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import rmsgd

CONTEXT = 64


class LanguageModel(nn.Module):
    """Two transformer blocks of 64 channels over characters."""

    def __init__(self, characters: int, channels: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, channels)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, channels))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                channels, 4, 4 * channels, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, characters)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (batch, length, characters) of tokens (batch, length)."""
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        x = self.embedding(tokens) + self.position[:length]
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.head(self.norm(x))


def main(arguments: list[str] | None = None) -> list[float]:
    """Run the example; returns the mean loss before each measurement."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--every", type=int, default=20, help="steps between measurements")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    with open(argparse.__file__, encoding="utf-8") as file:
        text = file.read()
    characters = sorted(set(text))
    number = {c: i for i, c in enumerate(characters)}
    tokens = torch.tensor([number[c] for c in text])
    print(f"{len(tokens)} characters, {len(characters)} different ones")

    model = LanguageModel(len(characters))
    optimizer = rmsgd.RMSGD(model.named_parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=40)  # a warm-up
    losses, means = [], []
    for step in range(1, options.steps + 1):
        starts = torch.randint(len(tokens) - CONTEXT, (16, 1))
        batch = tokens[starts + torch.arange(CONTEXT + 1)]
        optimizer.zero_grad()
        logits = model(batch[:, :-1])
        loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % options.every == 0:
            optimizer.epoch_step()  # there are no epochs, so the steps say when to measure
            rates = optimizer.learning_rates().values()
            means.append(sum(losses[-options.every :]) / options.every)
            print(f"step {step:4}  loss {means[-1]:.3f}  rates {min(rates):.4f} to {max(rates):.4f}")
    fell = sum(after < before for before, after in pairwise(means))
    print(f"the loss fell in {fell} of {len(means) - 1} intervals")
    return means


if __name__ == "__main__":
    main()
