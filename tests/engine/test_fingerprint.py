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
