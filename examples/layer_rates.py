"""Train a small language model with AdamW and a learning rate per layer, by a rule of your choice.

    python examples/layer_rates.py                          # about half a minute on one core
    python examples/layer_rates.py --rule llr --steps 60    # shorter, by another rule
    python examples/layer_rates.py --rule none              # AdamW alone, to compare

The model and the text are those of language_model.py. After every measurement the script prints the loss, the
scheduler's `group["lr"]` and the factors on the rates of the layers.
"""

import argparse

import torch
from language_model import CONTEXT, LanguageModel
from torch.nn.functional import cross_entropy

import rmsgd


def main(arguments: list[str] | None = None) -> tuple[list[float], dict[str, float]]:
    """Run the example; returns the mean loss before each measurement, and the ratios at the end."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rule", default="rank-momentum", help="rank-momentum, tempbalance, llr or none")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=20, help="steps between measurements")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    with open(argparse.__file__, encoding="utf-8") as file:
        text = file.read()
    number = {c: i for i, c in enumerate(sorted(set(text)))}
    tokens = torch.tensor([number[c] for c in text])

    model = LanguageModel(len(number))
    groups = rmsgd.layer_groups(model.named_parameters(), weight_decay=0.01)
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=options.steps)
    rates = None if options.rule == "none" else rmsgd.LayerRates(optimizer, rule=options.rule)
    if options.rule in ("tempbalance", "llr"):
        rates.step()  # these rules depend on the weights only, and so have ratios before the training
    losses, means, ratios = [], [], {}
    for step in range(1, options.steps + 1):
        starts = torch.randint(len(tokens) - CONTEXT, (16, 1))
        batch = tokens[starts + torch.arange(CONTEXT + 1)]
        optimizer.zero_grad()
        logits = model(batch[:, :-1])
        loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % options.every == 0:
            means.append(sum(losses[-options.every :]) / options.every)
            lr = optimizer.param_groups[0]["lr"]
            line = f"step {step:4}  loss {means[-1]:.3f}  lr {lr:.5f}"
            if rates is not None:
                rates.step()
                ratios = {name: rate / lr for name, rate in rates.learning_rates().items()}
                line += f"  times {min(ratios.values()):.3f} to {max(ratios.values()):.3f}"
            print(line)
        schedule.step()
    return means, ratios


if __name__ == "__main__":
    main()
