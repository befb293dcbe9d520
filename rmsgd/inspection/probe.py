"""``rmsgd.probe``: the report of a model or a checkpoint, from its weights alone."""

from collections.abc import Callable, Sequence

import torch

from rmsgd.inspection.probing import ProbeSource, Probing
from rmsgd.inspection.report.report import Report


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
    """Measure every layer of a network: stable rank, condition number, quality, rank and noise.

    A layer is a tensor of two or more dimensions. A matrix is measured as it is, a tensor of three to
    five dimensions ``(o, i, *k)`` in its two unfoldings, "in" ``(i, o k)`` and "out" ``(o, i k)``. That
    goes for attention's packed q, k, v (one matrix) and for stacked experts ``(experts, m, n)`` too:
    what a tensor means does not show in a checkpoint, and a report equals that of ``RMSGD.report``.
    Biases and norms are no layers. A layer that cannot be measured is in the report, with the reason in
    ``skipped``.

    A weight is measured as the network uses it. Where it is stored in parts, they are put together, and the
    layer has the name that the weight has in its module: a pruned weight is ``weight_orig * weight_mask``, a
    quantised one is multiplied by its scales, ``weight_norm`` and ``spectral_norm`` are applied, and in a
    module every other parametrization. Masks, positional tables, fixed filters and the buffers of a module
    are skipped.

    Args:
        source: a module; a mapping of names to tensors or NumPy arrays (a state dict, also inside a
            training checkpoint's dict); or the path of a file (safetensors, torch, TorchScript, NumPy, GGUF,
            ONNX, also with gzip) or of a folder of shards. Files are read a tensor at a time, and nothing in
            them is executed. The parts of a DTensor are gathered one layer at a time: every process of its
            mesh must call this with the same arguments.
        filter: measure only layers whose name matches one of these shell patterns ("*.attn.*"); a
            pattern without any of ``*?[`` matches anywhere in the name.
        exclude: leave out layers whose name matches one of these, likewise.
        key: where in a checkpoint the network lies, a key or a path of keys with dots ("model_ema"). By
            default it is looked for; what else was found is in the report's ``notes``.
        include_buffers: measure also what is taken for a mask, a table or another constant.
        merge_lora: measure also the product ``B A`` of every LoRA pair, as one more layer. The factor
            alpha / r, which changes the noise variance alone, is not applied.
        device: where to measure. By default each tensor is measured where it lies; files, on the CPU.
        progress: called now and then with the share of the work that is done, in [0, 1].

    Returns:
        The report. What of a checkpoint could not be read is in ``errors``, the rest is measured.

    Raises:
        TypeError: ``source`` is none of these.
        CheckpointError: nothing could be read, or there is no weight in it or under ``key`` (a ValueError).
        ValueError: the device is not available, RMSGD_BACKEND does not run there, or a mapping holds itself.
    """
    probing = Probing(
        source,
        filter=filter,
        exclude=exclude,
        key=key,
        include_buffers=include_buffers,
        merge_lora=merge_lora,
        device=device,
    )
    probing.run(progress)
    return Report(probing.layers, probing.errors, probing.notes)
