import json
import runpy

import pytest
from conftest import ROOT


def test_slices_are_added_up(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    main = runpy.run_path(str(ROOT / "tools/simulate_coverage.py"))["main"]
    few = [
        "--experiments",
        "2",
        "--each",
        "2",
        "--images",
        "20",
        "--arms",
        "2",
        "--samples",
        "30",
        "--population",
        "300",
    ]
    for seed in ("1", "2"):
        main([*few, "--seed", seed, "--output", str(tmp_path / f"part.{seed}")])
    main(["--merge", *(str(tmp_path / f"part.{seed}.json") for seed in "12"), "--output", str(tmp_path / "all")])
    one, whole = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("part.1", "all"))
    assert one["experiments"].keys() == whole["experiments"].keys()
    assert set(one["experiments"].values()) == {2}
    assert set(whole["experiments"].values()) == {4}
    written = (tmp_path / "all.md").read_text()
    assert "4 experiments of each kind" in written
    assert capsys.readouterr().out.endswith(written)


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "[1]",
        "{}",
        '{"x": {"y": "z"}}',
        "whole",
        '{"hits": {"a": true}}',
        '{"hits": {"b": 1}}',
        "unknown",
        "none",
    ],
)
def test_what_is_no_simulation_is_not_added(tmp_path, capsys, monkeypatch, content):
    monkeypatch.syspath_prepend(ROOT / "tools")
    main = runpy.run_path(str(ROOT / "tools/simulate_coverage.py"))["main"]
    kinds = ("experiments", "hits", "draws", "squares", "products", "hit_squares")
    whole = {kind: {"a": 1} for kind in kinds}
    cell = "60|two arms|normal|0.0|0.0|3|covers: seeds"
    if content == "unknown":
        content = json.dumps(whole)
    elif content == "none":
        content = json.dumps({kind: {cell: 0} for kind in kinds})
    elif content == "whole":
        content = json.dumps({**whole, "hits": {"a": -1}})
    elif content and content.startswith('{"hits"'):
        content = json.dumps({**whole, **json.loads(content)})
    if content is not None:
        (tmp_path / "part.json").write_text(content)
    with pytest.raises(SystemExit, match="2"):
        main(["--merge", str(tmp_path / "part.json"), "--output", str(tmp_path / "all")])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'part.json'} ") and "simulate_coverage.py --output wrote" in line
    assert not (tmp_path / "all.json").exists()


@pytest.mark.parametrize("option", ["--experiments", "--each", "--images", "--samples", "--seed-counts", "--arms"])
def test_numbers_of_nothing_are_told(capsys, monkeypatch, option):
    monkeypatch.syspath_prepend(ROOT / "tools")
    main = runpy.run_path(str(ROOT / "tools/simulate_coverage.py"))["main"]
    with pytest.raises(SystemExit, match="2"):
        main([option, "0"])
    assert f"argument {option}: 0 must be a whole number of at least" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--merge", "a.json", "./a.json"], "--merge names a file twice"),
        (["--output", "."], "--output . is a folder"),
        (["--output", "/dev/null/x"], "/dev/null is a file"),
    ],
)
def test_what_would_be_in_vain_is_told_at_once(capsys, monkeypatch, options, words):
    monkeypatch.syspath_prepend(ROOT / "tools")
    main = runpy.run_path(str(ROOT / "tools/simulate_coverage.py"))["main"]
    with pytest.raises(SystemExit, match="2"):
        main(options)
    assert words in capsys.readouterr().err
