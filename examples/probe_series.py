"""Look into a series of checkpoints: train, save one after each epoch, and show them by `rmsgd probe`.

    python examples/probe_series.py              # about twenty seconds; writes into probe-series/
    python examples/probe_series.py --out DIR

It needs scikit-learn and the extra `plot`. Open probe-series/index.html: it shows how the metrics
moved over the training, and links a page per checkpoint with a sortable table and the spectrum of every
layer.
"""

import argparse
import html
from pathlib import Path

import torch
from images import digits, network
from torch.nn.functional import cross_entropy

import rmsgd
from rmsgd.cli import main as rmsgd_command


def main(arguments: list[str] | None = None) -> Path:
    """Run the example; returns the index page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("probe-series"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    x, y = digits()
    model = network()
    optimizer = rmsgd.RMSGD(model.named_parameters(), lr=0.03)
    checkpoints = []
    for epoch in range(1, options.epochs + 1):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        optimizer.epoch_step()
        checkpoints.append(options.out / f"epoch_{epoch}.pt")
        torch.save(model.state_dict(), checkpoints[-1])

    # The same as on the command line: rmsgd probe epoch_*.pt --plot series.png
    figure = options.out / "series.png"
    rmsgd_command(["probe", *map(str, checkpoints), "--plot", str(figure)])
    links = []
    for checkpoint in checkpoints:
        page = checkpoint.with_suffix(".html")
        rmsgd_command(["probe", str(checkpoint), "--html", str(page), "--csv", str(page.with_suffix(".csv"))])
        links.append(f'<li><a href="{html.escape(page.name)}">{html.escape(checkpoint.name)}</a></li>')
    index = options.out / "index.html"
    title = "<!doctype html><meta charset='utf-8'><title>A training, seen from its weights</title>"
    index.write_text(
        f"{title}<ul>{''.join(links)}</ul><img src='{figure.name}' width='900'>", encoding="utf-8"
    )
    print(f"wrote {index}")
    return index


if __name__ == "__main__":
    main()
