import json
import runpy

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
        main([*few, "--seed", seed, "--output", str(tmp_path / f"part{seed}")])
    main(["--merge", *(str(tmp_path / f"part{seed}.json") for seed in "12"), "--output", str(tmp_path / "all")])
    one, whole = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("part1", "all"))
    assert one["experiments"].keys() == whole["experiments"].keys()
    assert set(one["experiments"].values()) == {2}
    assert set(whole["experiments"].values()) == {4}
    written = (tmp_path / "all.md").read_text()
    assert "4 experiments of each kind" in written
    assert capsys.readouterr().out.endswith(written)
