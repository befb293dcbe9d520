"""README and docs are true: their code runs, their commands exist, and so does everything that they name."""

import ast
import logging
import re
import shlex
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from commands import run_bench
from torch import nn
from torch.nn.functional import cross_entropy

import rmsgd
from bench import tables
from bench.models.gpt import GPT
from rmsgd.cli import main as rmsgd_command
from rmsgd.metrics import METRICS

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
}
EPOCHS = 3


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    heading: str
    language: str
    text: str


def blocks(page):
    """The fenced blocks of a page, in order."""
    text = PAGES[page]
    return [
        Block(page, re.findall(r"^#+ (.+)$", text[: match.start()], re.M)[-1], match[1], match[2])
        for match in re.finditer(r"^```(\w+)[^\n]*\n(.+?)^```$", text, re.M | re.S)
    ]


def python(page):
    return [block for block in blocks(page) if block.language == "python"]


def execute(block, names):
    exec(compile(block.text, f"{block.page}: {block.heading}", "exec"), names)


def run(heading, page="docs/trainers.md", **names):
    """Run a page's block under a heading with these names, and return all names afterwards."""
    (block,) = [block for block in python(page) if block.heading == heading]
    namespace = {"rmsgd": rmsgd, "torch": torch, "epochs": EPOCHS, "loss_function": cross_entropy} | names
    execute(block, namespace)
    return namespace


def network():
    """A network whose first layer has a low-rank part of two directions, so that its stable rank moves."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    with torch.no_grad():
        model[0].weight += 0.5
        model[0].weight[::2, ::2] += 2.0
    return model


def samples():
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    return list(zip(x, torch.arange(20) % 3, strict=True))


def batches():
    return torch.utils.data.DataLoader(samples(), batch_size=4)


def assert_ended(optimizer, epochs=EPOCHS):
    """Check that RMSGD has ended ``epochs`` epochs; a schedule may have taken the rates to 0 by now."""
    states = optimizer.state_dict()["state"].values()
    assert {state["epoch"] for state in states} == {epochs}
    assert any(state["rate"] != 0.03 for state in states)


# -- Python --------------------------------------------------------------------------------------

TRAINERS = {
    *("Lightning", "Hugging Face Trainer", "LayerRates", "Accelerate", "timm", "TensorBoard"),
    "Without epochs",
}
"""Headings of docs/trainers.md whose blocks have a test of their own."""

RUN_WHOLE = [page for page in PAGES if python(page) and page != "docs/trainers.md"]
"""Pages whose Python blocks run one after the other, as a reader types them."""


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """The things that a reader of the pages has: a model, data, and checkpoints in the current folder."""
    monkeypatch.chdir(tmp_path)
    model = network()
    for name in ("model.pt", "before.pt", "after.pt", "epoch_1.pt", "epoch_2.pt"):
        torch.save(model.state_dict(), name)
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(dict(model.state_dict()), "model.safetensors")
    x, y = next(iter(batches()))
    names = {"rmsgd": rmsgd, "torch": torch, "nn": nn, "epochs": EPOCHS, "loss_function": cross_entropy}
    names |= {"model": model, "batches": batches(), "x": x, "y": y}
    return names | {
        "backbone": model[0],
        "head": model[2],
        "optimizer": rmsgd.RMSGD(model.named_parameters()),
    }


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_the_readme_uses_the_optimizer_in_a_page():
    assert [block.heading for block in python("README.md")] == ["Use"]
    assert len(PAGES["README.md"].splitlines()) <= 150


@pytest.mark.parametrize("page", [page for page in RUN_WHOLE if page != "docs/distributed.md"])
def test_the_python_of_a_page_runs_from_its_top_to_its_end(page, reader):
    for block in python(page):
        execute(block, reader)


def test_the_python_of_the_page_on_processes_runs(one_process, reader):
    for block in python("docs/distributed.md"):
        execute(block, reader)
    assert type(reader["model"]).__name__ == "DistributedDataParallel"
    assert_ended(reader["optimizer"], 1)


def test_the_loop_of_the_readme_measures_after_every_epoch(reader, capsys):
    run("Use", "README.md", **reader)
    rates = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rates) == EPOCHS
    assert any(before != after for before, after in pairwise(rates))


def test_a_checkpoint_of_sgd_goes_on_in_rmsgd_as_the_page_says(reader):
    names = run("Coming from SGD", "docs/checkpoints.md", **reader)
    theirs = names["sgd"].state_dict()["state"][0]["momentum_buffer"]
    assert theirs.abs().max() > 0
    assert any(
        torch.is_tensor(value) and value.shape == theirs.shape and value.abs().max() > 0
        for value in names["optimizer"].state_dict()["state"][0].values()
    )


def test_a_thinner_layer_computes_nearly_the_same(reader):
    layer = nn.Linear(96, 64)
    with torch.no_grad():
        layer.weight.copy_(0.01 * torch.randn(64, 96) + torch.randn(64, 3) @ torch.randn(3, 96))
    reader["model"] = nn.Sequential(layer)
    names = run("Compress a layer", "docs/rank-selection.md", **reader)
    thinner = names["thinner"][0]
    assert [part.weight.shape[0] for part in thinner] == [3, 64]
    x = torch.randn(10, 96)
    assert (thinner(x) - layer(x)).norm() < 0.02 * layer(x).norm()


def test_the_step_of_the_speed_gates_page_is_a_step_of_either_optimizer(reader):
    from bench.gate.cases import sgd

    names = run("A training step of yours", "docs/speed-gate.md", **reader)
    for make_optimizer in (rmsgd.RMSGD, sgd):
        before = names["model"][0].weight.detach().clone()
        names["training_step"](make_optimizer)()
        assert not torch.equal(before, names["model"][0].weight)


def test_no_block_of_the_trainers_is_left_out():
    assert {block.heading for block in python("docs/trainers.md")} == TRAINERS | {"A closure"}


def test_a_closure(reader):
    names = run("A closure", **reader)
    assert names["loss"].item() > 0


@pytest.fixture
def lightning_model(tmp_path, monkeypatch):
    lightning = pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, _):
            return cross_entropy(self.net(batch[0]), batch[1])

    return Lit()


def test_lightning(lightning_model):
    names = run("Lightning", model=lightning_model, batches=batches())
    assert_ended(names["trainer"].optimizers[0])


def test_layer_rates_under_lightning(lightning_model):
    names = run("LayerRates", model=lightning_model, batches=batches())
    (callback,) = (c for c in names["trainer"].callbacks if isinstance(c, names["EpochStep"]))
    (saved,) = callback.state_dict()["rates"].values()
    assert saved["rule"] == "llr"
    assert saved["transition"]["taken"] == names["trainer"].global_step > 0


def test_hugging_face_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x, labels):
            return {"loss": cross_entropy(self.net(x), labels)}

    names = run(
        "Hugging Face Trainer",
        model=Model(),
        dataset=[{"x": x, "labels": y} for x, y in samples()],
        arguments=transformers.TrainingArguments(
            output_dir=str(tmp_path), num_train_epochs=EPOCHS, use_cpu=True, report_to=[], disable_tqdm=True
        ),
    )
    assert_ended(names["optimizer"])
    assert sum("quality" in row for row in names["trainer"].state.log_history) == EPOCHS


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.tracking import GeneralTracker

    class Tracker(GeneralTracker):
        name, requires_logging_directory, tracker = "list", False, None

        def store_init_configuration(self, values): ...

        def log(self, values, step=None, **_):
            logged.append((step, values["quality"]))

    model, logged = network(), []
    try:
        accelerator = accelerate.Accelerator(cpu=True, log_with=Tracker())
        accelerator.init_trackers("readme")
        names = run(
            "Accelerate",
            accelerator=accelerator,
            model=model,
            optimizer=rmsgd.RMSGD(model.named_parameters()),
            batches=batches(),
        )
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    assert_ended(names["optimizer"].optimizer)
    assert [step for step, _ in logged] == list(range(EPOCHS))


def test_timm(timm):
    model = timm.create_model("resnet10t", num_classes=3)
    optimizer = run("timm", model=model)["optimizer"]
    assert type(optimizer) is rmsgd.RMSGD
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 1e-4]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    optimizer = rmsgd.RMSGD(network().named_parameters())
    optimizer.epoch_step()
    with SummaryWriter(tmp_path) as writer:
        run("TensorBoard", writer=writer, optimizer=optimizer, epoch=0)
    assert list(tmp_path.glob("events*"))


def test_without_epochs_a_small_transformer_learns_and_its_rates_move():
    torch.manual_seed(0)
    text = torch.arange(1000) * 5 % 16  # each token follows from the one before
    model = GPT(classes=16, width=1 / 6)  # 6 layers of 64 channels
    optimizer = rmsgd.RMSGD(model.named_parameters(), lr=0.05)
    losses, rates = [], []

    def loss_of(logits, tokens):
        loss = cross_entropy(logits, tokens)
        losses.append(loss.item())
        return loss

    def random_batches():
        for step in range(101):
            if step % 50 == 0:
                rates.append(optimizer.learning_rates())
            yield text[torch.randint(len(text) - 16, (4, 1)) + torch.arange(16)]

    run("Without epochs", model=model, optimizer=optimizer, cross_entropy=loss_of, batches=random_batches())
    assert sum(losses[-10:]) < sum(losses[:10]) / 10
    for before, after in pairwise(rates):
        assert any(before[name] != after[name] for name in before)  # others are at their bounds
    assert len(set(rates[-1].values())) > 5


# -- commands ------------------------------------------------------------------------------------

SHELL = [
    (page, line.split("#")[0].strip())
    for page in PAGES
    for block in blocks(page)
    if block.language == "bash"
    for line in block.text.splitlines()
    if line.split("#")[0].strip()
]
INLINE = [
    (page, command)
    for page, text in PAGES.items()
    for command in re.findall(r"`((?:python -m bench|rmsgd (?:probe|doctor)|make|pip install) ?[^`]*)`", text)
]
COMMANDS = [*SHELL, *INLINE]
MAKE = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "optional-dependencies"
]


@pytest.mark.parametrize(("page", "command"), [c for c in COMMANDS if "python -m bench" in c[1]])
def test_a_command_of_bench_has_the_options_that_a_page_gives_it(page, command, capsys):
    words = shlex.split(command.split("python -m bench")[1])
    if not words:
        return
    asked = words[:2] if words[0] == "study" and len(words) > 1 and words[1].isalpha() else words[:1]
    status, out, _ = run_bench(capsys, *asked, "--help")
    assert status == 0
    for word in words:
        if word.startswith("--"):
            assert re.search(rf"{word}\b", out), f"{page}: {command} has no {word}"


@pytest.mark.parametrize(("page", "command"), [c for c in SHELL if c[1].startswith("rmsgd ")])
def test_a_command_of_rmsgd_on_a_page_does_what_it_says(page, command, reader, capsys):
    words = []
    for word in shlex.split(command)[1:]:
        words += sorted(map(str, Path().glob(word))) if "*" in word else [word]
    assert rmsgd_command(words) == 0
    capsys.readouterr()
    written = [word for option, word in pairwise(words) if option in ("--plot", "--html", "--csv")]
    assert all(Path(name).stat().st_size > 100 for name in written)


@pytest.mark.parametrize(("page", "command"), [c for c in COMMANDS if c[1].startswith("make ")])
def test_what_a_page_makes_is_a_target_of_the_makefile(page, command):
    assert shlex.split(command)[1] in MAKE


@pytest.mark.parametrize(("page", "command"), [c for c in COMMANDS if c[1].startswith("pip install")])
def test_an_extra_that_a_page_installs_exists(page, command):
    assert set(re.findall(r"[\w]+", "".join(re.findall(r"\[(.*?)\]", command)))) <= EXTRAS.keys()


@pytest.mark.parametrize(("page", "command"), SHELL)
def test_every_command_on_a_page_is_of_a_kind_that_is_tested(page, command):
    known = r"(rmsgd|make|pip install|git|python -m bench) "
    example = re.match(r"python (examples/\w+\.py)", command)
    assert (ROOT / example[1]).is_file() if example else re.match(known, command)


# -- what the pages name -------------------------------------------------------------------------


def _texts(*patterns):
    files = [path for pattern in patterns for path in sorted(ROOT.glob(pattern)) if path.is_file()]
    return "\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in files)


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_are_there(page):
    named = re.findall(r"`((?:rmsgd|bench|csrc|tests|examples|docs)/[\w/.*-]*)`", PAGES[page])
    assert [name for name in named if not list(ROOT.glob(name.rstrip("/")))] == []


def test_environment_variables_of_the_pages_are_read_somewhere():
    named = set(re.findall(r"\bRMSGD_[A-Z_]+\b", "\n".join(PAGES.values())))
    code = _texts("rmsgd/**/*.py", "bench/**/*.py", "setup.py", "csrc/**/*", "Makefile", "tests/conftest.py")
    assert named == {name for name in named if name in code}


def test_messages_on_the_page_of_troubles_are_those_of_the_code():
    said = []
    for path in sorted(ROOT.glob("rmsgd/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                said.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
    headings = re.findall(r"^### (.*`.*)$", PAGES["docs/troubleshooting.md"], re.M)
    messages = [message for heading in headings for message in re.findall(r"`(.+?)`", heading)]
    assert len(messages) > 20
    for message in messages:
        pieces = [piece.strip() for piece in message.split("…") if piece.strip()]
        pattern = re.compile(".*?".join(map(re.escape, pieces)), re.S)
        assert any(pattern.search(text) for text in said), f"no such message: {message}"


@pytest.mark.parametrize("page", ["README.md", "docs/inside-a-checkpoint.md"])
def test_every_metric_has_a_line_with_its_range_and_its_better_direction(page):
    for metric in METRICS:
        (row,) = re.findall(rf"^\| `{metric.name}` \|.*$", PAGES[page], re.M)
        assert f"| {metric.range}" in row
        assert (metric.better or "") in row


def test_every_public_name_is_on_the_page_of_the_api():
    documented = re.findall(r"^::: rmsgd\.(\w+)$", PAGES["docs/api.md"], re.M)
    assert set(rmsgd.__all__) - {"__version__"} <= set(documented)


def test_pages_link_to_headings_and_files_that_are_there():
    def anchors(text):
        headings = re.findall(r"^#+ (.+)$", text, re.M)
        return {re.sub(r"[^\w -]", "", h.lower()).strip().replace(" ", "-") for h in headings}

    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith(("http://", "https://")):
                continue
            file, _, anchor = target.partition("#")
            there = (ROOT / page).parent / file if file else ROOT / page
            assert there.exists(), f"{page}: {target}"
            if anchor:
                assert anchor in anchors(there.read_text(encoding="utf-8")), f"{page}: {target}"


def test_measured_tables_are_those_of_the_recorded_results(tmp_path):
    results = tables.recorded(tables.RESULTS)
    for page in tables.PAGES:
        copy = tmp_path / page.name
        copy.write_bytes(page.read_bytes())
        tables.rewrite(copy, results)
        assert copy.read_text(encoding="utf-8") == page.read_text(encoding="utf-8"), (
            f"{page.name}: make it with python -m bench tables"
        )
