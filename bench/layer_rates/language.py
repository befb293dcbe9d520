"""A small GPT on the sources of Python's standard library: AdamW alone, and with each rule of LayerRates.

Every run of a seed starts from the same weights and sees the same batches. All runs have the same warm-up and
cosine. A rule must gain more than another rate does: AdamW alone also runs at the mean rates that
rank-momentum and LLR come to, four thirds and three times lr, and LLR at a third of lr.
"""

import json
import math
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import rmsgd
from bench import atomic
from bench.models.gpt import GPT
from bench.study.statistics import paired
from rmsgd.tail_rules import LLR

LR, LENGTH, BATCH = 1e-3, 128, 8
WIDTH = 2 / 3
"""The fraction of the full width of 384 channels: 256 channels and 4.9 million parameters."""
EVERY = 25
"""Steps between two measurements, and between two losses that are kept."""
HELD_OUT = 24
"""The number of batches of held-out text that judge a run."""

_LLR = replace(LLR, at_highest=("tokens", "positions"))  # the names of this GPT's embeddings


@dataclass(frozen=True)
class Variant:
    """AdamW with a rule, or without one."""

    rule: Any = None
    factor: float = 1.0
    """The factor on the learning rate."""


VARIANTS = {
    "adamw": Variant(),
    "adamw at 4/3 lr": Variant(factor=4 / 3),
    "adamw at 3 lr": Variant(factor=3.0),
    "rank-momentum": Variant("rank-momentum"),
    "tempbalance": Variant("tempbalance"),
    "llr": Variant(_LLR),
    "llr at lr / 3": Variant(_LLR, factor=1 / 3),
}


@cache
def text() -> tuple[Tensor, Tensor]:
    """The bytes of the library's modules, training and held out: every tenth module is held out."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in folder.glob("*.py") if path.is_file())
    parts: tuple[list[bytes], list[bytes]] = [], []
    for i, path in enumerate(files):
        parts[i % 10 == 9].append(path.read_bytes())
    training, held_out = (
        torch.from_numpy(np.frombuffer(b"".join(p), np.uint8).astype(np.int64)) for p in parts
    )
    return training, held_out


def _batch(tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(tokens) - LENGTH - 1, (BATCH, 1), generator=generator)
    chosen = tokens[starts + torch.arange(LENGTH + 1)]
    return chosen[:, :-1], chosen[:, 1:]


def _loss(model: GPT, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


@torch.no_grad()
def _held_out(model: GPT) -> float:
    generator = torch.Generator().manual_seed(1)
    losses = [float(_loss(model, _batch(text()[1], generator))) for _ in range(HELD_OUT)]
    return sum(losses) / len(losses)


def run(variant: Variant, seed: int, steps: int) -> dict[str, Any]:
    """The losses of one run, in nats per byte: one per `EVERY` steps of training, and the held-out one."""
    torch.manual_seed(seed)
    model, generator = GPT(256, WIDTH), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        rmsgd.layer_groups(model.named_parameters()), lr=LR * variant.factor, weight_decay=0.1
    )
    warm_up = max(steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: min((t + 1) / warm_up, 0.55 + 0.45 * math.cos(math.pi * t / steps)),
    )
    rates = None if variant.rule is None else rmsgd.LayerRates(optimizer, rule=variant.rule)
    if callable(variant.rule) or variant.rule == "tempbalance":
        assert rates is not None
        rates.step()
    losses, curve, held_out, measuring = [], [], [], 0.0
    begin = time.perf_counter()
    for t in range(steps):
        loss = _loss(model, _batch(text()[0], generator))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (t + 1) % EVERY == 0:
            curve.append(sum(losses[-EVERY:]) / EVERY)
            if (t + 1) % (4 * EVERY) == 0 or t + 1 == steps:
                held_out.append(_held_out(model))
            if rates is not None:
                before = time.perf_counter()
                rates.step()
                measuring += time.perf_counter() - before
    ratios = _ratios(optimizer, rates)
    return {
        "seed": seed,
        "steps": steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training": curve,
        "held_out": held_out,
        "lowest": min(ratios),
        "highest": max(ratios),
        "mean_ratio": sum(ratios) / len(ratios),
        "seconds": time.perf_counter() - begin,
        "seconds_measuring": measuring,
    }


def _ratios(optimizer: torch.optim.Optimizer, rates: rmsgd.LayerRates | None) -> list[float]:
    lr = optimizer.param_groups[0]["lr"]
    return [1.0] if rates is None else [rate / lr for rate in rates.learning_rates().values()]


def runs(
    folder: Path, seeds: int, steps: int, advance: Callable[[], object]
) -> dict[str, list[dict[str, Any]]]:
    """All runs. Those that the folder lacks are made and kept there."""
    path = folder / f"language-{round(1000 * WIDTH)}-{steps}.json"
    known: dict[str, list[dict[str, Any]]] = json.loads(path.read_text()) if path.exists() else {}
    for seed in range(seeds):
        for name, variant in VARIANTS.items():
            if not any(one["seed"] == seed for one in known.setdefault(name, [])):
                known[name].append(run(variant, seed, steps))
                atomic.write(path, json.dumps(known, indent=1).encode())
            advance()
    return {name: [one for one in known[name] if one["seed"] < seeds] for name in VARIANTS}


def summary(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The means over seeds, and every variant minus AdamW, paired by seed, with 95 % intervals."""
    rows = []
    for name, of_seeds in found.items():
        row: dict[str, Any] = {"variant": name, "seeds": len(of_seeds)}
        for key in ("held_out", "training"):
            last, base = _last(of_seeds, key), _last(found["adamw"], key)
            row[key] = sum(last) / len(last)
            if name != "adamw" and len(last) > 1:
                row[f"{key}_difference"] = list(paired(last, base)[:3])
        row["ratios"] = [min(one["lowest"] for one in of_seeds), max(one["highest"] for one in of_seeds)]
        row["measuring"] = sum(one["seconds_measuring"] for one in of_seeds) / sum(
            one["seconds"] for one in of_seeds
        )
        rows.append(row)
    return rows


def _last(of_seeds: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [one[key][-1] for one in sorted(of_seeds, key=lambda one: int(one["seed"]))]
