"""``rmsgd.probe``: the report of a model or a checkpoint, from its weights alone."""

from collections.abc import Callable, Sequence

import torch

from rmsgd.inspection.measuring import ProbeSource
from rmsgd.inspection.probing import Probing
from rmsgd.inspection.report.report import Report
from rmsgd.inspection.selection import Selection


def probe(
    source: ProbeSource,
    *,
    filter: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    key: str | None = None,
    include_buffers: bool = False,
    merge_lora: bool = False,
    device: torch.device | str | None = None,
    progress: Callable[[float], object] | None = None,
) -> Report:
    """Measure every layer of a network: rank, noise, stable rank, condition number, quality, tail exponent.

    A layer is a tensor of two or more dimensions. A matrix is measured as it is, a tensor of three to
    five dimensions ``(o, i, *k)`` in its two unfoldings, "in" ``(i, o k)`` and "out" ``(o, i k)``. This
    holds for attention's packed q, k, v (one matrix) and for stacked experts ``(experts, m, n)`` too, since a
    checkpoint does not say what a tensor means, and so a report equals that of ``RMSGD.report``,
    which only lacks the metrics of all singular values (the tail exponent and two norms).
    Biases and norms are not layers. A layer that cannot be measured is in the report, with the reason in
    ``skipped``.

    A weight is measured as the network uses it. If it is stored in parts, they are put together, and the
    layer has the name that the weight has in its module: a pruned weight is ``weight_orig * weight_mask``, a
    quantised one is multiplied by its scales, and ``weight_norm`` and ``spectral_norm`` are applied. Of a
    module, every other parametrization is applied too. Masks, positional tables, fixed filters and the
    buffers of a module are skipped.

    Args:
        source: a module; a mapping of names to tensors or NumPy arrays (a state dict, also inside a
            training checkpoint's dict); or the path of a file (safetensors, torch, TorchScript, NumPy, GGUF,
            ONNX, also with gzip) or of a folder of shards. Files are read a tensor at a time, and nothing in
            them is executed. The parts of a DTensor are gathered one layer at a time: every process of its
            mesh must call this with the same arguments.
        filter: measure only layers whose name matches one of these shell patterns ("*.attn.*"); a
            pattern without any of ``*?[`` matches anywhere in the name.
        exclude: leave out layers whose name matches one of these, likewise.
        key: the place of the network in a checkpoint, a key or a path of keys with dots ("model_ema"). By
            default the network is searched for, and other networks that were found are named in the report's
            ``notes``.
        include_buffers: also measure tensors that look like masks, tables or other constants.
        merge_lora: also measure the product ``B A`` of every LoRA pair, as one more layer. The factor
            alpha / r, which changes the noise variance alone, is not applied.
        device: where to measure. By default a tensor is measured on its own device, and files on the CPU.
        progress: called from time to time with the share of the work that is done, in [0, 1].

    Returns:
        The report, whose metrics are float64 numbers in the units and ranges of ``rmsgd.metrics.METRICS``.
        Parts of a checkpoint that could not be read are named in its ``errors``, and the rest is measured.

    Raises:
        TypeError: ``source`` is none of these types.
        CheckpointError: nothing could be read, or there is no weight in it or under ``key`` (a ValueError).
        ValueError: the device is not available, RMSGD_BACKEND does not run there, or a mapping contains
            itself.
    """
    selection = Selection(filter, exclude, key, include_buffers, merge_lora, device)
    probing = Probing(source, selection)
    probing.run(progress)
    return Report(probing.layers, probing.errors, probing.notes)
