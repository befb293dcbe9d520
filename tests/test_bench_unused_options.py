"""An option that a command of the bench would not use is refused at once, and nothing is written."""

import pytest

from bench.__main__ import main


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("gpu --json", "--json is for --model"),
        ("gpu --readme page.md", "--readme is for --model"),
        ("gpu --model --only step", "--only is for what runs"),
        ("gpu --model --seconds 5", "--seconds is for what runs"),
        ("gpu --model tests", "--model runs no stages"),
        ("gpu tests --only step", "--only takes the place of stages"),
        ("layer-rates --parts groups --steps 5", "--steps is for the part language"),
        ("layer-rates --parts groups,epoch-end --seeds 1", "--seeds is for the part language"),
        ("layer-rates --parts language --models resnet18", "--models is for the parts groups and epoch-end"),
        ("layer-rates --parts language --rounds 1", "--rounds is for the parts groups and epoch-end"),
        ("probe-speed --large --models resnet18", "--models is not for --large"),
        ("probe-speed --large --rounds 1", "--rounds is not for --large"),
        ("same-lr --tasks digits --data cifar10.zip", "--data is for the task cifar10"),
        ("study run table1a --all", "--all is for --preset small"),
        ("train --samples 100", "--samples is for other data"),
    ],
)
def test_an_option_that_would_not_be_used_is_bad_usage(command, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(command.split())
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
