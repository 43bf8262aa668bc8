from sge_det.engine.fingerprint import differences, source_hash


def test_edited_code_is_another(tmp_path, monkeypatch):
    """Of a module and of a package: each file counts, and its name; what is no code does not."""
    monkeypatch.syspath_prepend(tmp_path)
    module, package = tmp_path / "own_module.py", tmp_path / "own_package"
    (package / "deep").mkdir(parents=True)
    module.write_text("a = 1")
    for name in ("__init__.py", "deep/b.py"):
        (package / name).write_text("b = 1")
    before = {name: source_hash(name) for name in ("own_module", "own_package")}
    (tmp_path / "other.py").write_text("")
    (package / "notes.txt").write_text("")
    assert {name: source_hash(name) for name in before} == before
    module.write_text("a = 2")
    (package / "deep/b.py").write_text("b = 2")
    edited = {name: source_hash(name) for name in before}
    assert all(edited[name] != before[name] for name in before)
    (package / "deep/b.py").rename(package / "deep/c.py")
    assert source_hash("own_package") not in (before["own_package"], edited["own_package"])
    found = list(differences({"source": before, "processes": 1}, {"source": edited, "processes": 1}))
    assert found == ["other source code of own_module", "other source code of own_package"]
    assert list(differences({"processes": 1}, {"source": edited, "processes": 1})) == []
    assert list(differences({"processes": 1}, {"processes": 2})) == ["1 process, this command has 2"]


def test_a_run_from_before_a_key_was_there_had_its_default():
    """Read either way: a newer version's run by an older one, too."""
    for key, default, other in (
        ("MODEL.FPN.P7_RELU", "True", "False"),
        ("MODEL.SGE.NORMALIZE", "True", "False"),
        ("MODEL.ROI_HEADS.NUM_CLASSES", "80", "3"),
    ):
        without, usual, changed = ({"config": config, "processes": 1} for config in ({}, {key: default}, {key: other}))
        assert list(differences(without, usual)) == list(differences(usual, without)) == []
        assert list(differences(without, changed)) == [f"{key} absent, this command has {other}"]
        assert list(differences(usual, changed)) == [f"{key} {default}, this command has {other}"]
    own = {"config": {"train.seed": "0"}, "processes": 1}  # of a lazy config, whose defaults are its own
    assert list(differences({"config": {}, "processes": 1}, own)) == ["train.seed absent, this command has 0"]
