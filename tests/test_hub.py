"""Models that travel: what is written is read again, and a stranger's folder runs nothing."""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY
from sample_detectors import FASTER, save_weights

import sge_det
from sge_det import UserError, from_pretrained, hub, push_to_hub, save_pretrained
from sge_det.engine.training import setup_config


@pytest.fixture(scope="module")
def saved(sample_datasets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    save_weights(FASTER, folder / "weights.pth", sample_datasets)
    cfg = setup_config(FASTER, [*TINY, "MODEL.WEIGHTS", str(folder / "weights.pth")], sample_datasets)
    (folder / "report.json").write_text(json.dumps({"verdict": "sge - plain = +1.00 box AP | *a gain*\n<b>x</b>"}))
    save_pretrained(
        cfg, folder / "model", figures={"box AP": 36.2}, report=folder / "report.json", license="apache-2.0"
    )
    return folder / "model", cfg


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved[0], tmp_path / "model"))


def signed(folder):
    """Makes the checksums right again, as whoever writes a folder can."""
    about = json.loads((folder / "sge_det.json").read_text())
    about["sha256"] = {name: hub.sha256(folder / name) for name in ("config.yaml", "model.safetensors")}
    (folder / "sge_det.json").write_text(json.dumps(about))


def test_what_comes_back_detects_the_same(saved):
    folder, cfg = saved
    model = from_pretrained(folder, device="cpu")
    own = sge_det.engine.training.build_seeded_model(cfg)
    sge_det.checkpoint.checkpointer.Checkpointer(own, whole_model=True).load(cfg.MODEL.WEIGHTS)
    images = [{"image": torch.randint(0, 255, (3, 64, 80), generator=torch.Generator().manual_seed(0)).byte()}]
    with torch.no_grad():
        (ours,), (theirs,) = model(images), own.eval()(images)
    assert len(theirs["instances"]) > 0
    assert torch.equal(ours["instances"].pred_boxes.tensor, theirs["instances"].pred_boxes.tensor)
    assert torch.equal(ours["instances"].scores, theirs["instances"].scores)
    assert not model.training
    assert model.cfg.MODEL.SGE.GROUPS == cfg.MODEL.SGE.GROUPS
    assert model.classes == sge_det.hub.MetadataCatalog.get(cfg.DATASETS.TEST[0]).thing_classes


def test_the_folder_names_nothing_of_the_machine_and_its_card_is_escaped(saved):
    folder, _ = saved
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.yaml",
        "model.safetensors",
        "sge_det.json",
    ]
    assert str(folder.parent) not in (folder / "config.yaml").read_text()
    card = (folder / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "apache-2.0" and head["pipeline_tag"] == "object-detection"
    assert "| box AP | 36.20 |" in card
    assert r"> sge - plain = +1.00 box AP \| \*a gain\*" in card
    assert "<b>" not in card


def test_a_strangers_folder_runs_nothing(folder, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass E: pass")
    monkeypatch.syspath_prepend(tmp_path)
    (folder / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = (folder / "config.yaml").read_text()
    base = tmp_path / "base.yaml"
    base.write_text("SEED: 3\n")
    for text, words in (
        (f"X: !!python/object/apply:os.system ['touch {tmp_path}/ran']\n", "is not a config in YAML"),
        (f"_BASE_: {base}\n", "names no _BASE_"),
        (config.replace("ATTENTION: sge", "ATTENTION: evil:E"), "ATTENTION"),
        (config.replace("WEIGHTS: ''", "WEIGHTS: /etc/passwd"), "names other weights"),
        ("- 1\n", "config"),
        ("MODEL: {META_ARCHITECTURE: Nothing}\n", "builds no model here|Nothing"),
        (config.replace("DEPTH: 50", "DEPTH: 51"), "builds no model here|DEPTH"),
        (re.sub(r"FC_DIM: \d+", "FC_DIM: 60000", config), r"describes a model of \d+ bytes"),
        (re.sub(r"FC_DIM: \d+", "FC_DIM: 10000000000", config), r"FC_DIM: it is 10000000000"),
        ("".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}1]\n" for n in range(9)).replace("*a-1, ", ""), "YAML"),
    ):
        (folder / "config.yaml").write_text(text)
        signed(folder)
        with pytest.raises(UserError, match=words):
            from_pretrained(folder, device="cpu")
    assert not (tmp_path / "ran").exists()


def test_what_a_config_says_of_its_machine_is_left_out(folder):
    config = (folder / "config.yaml").read_text()
    config = config.replace("OUTPUT_DIR: ./output", "OUTPUT_DIR: /root/.ssh").replace(
        "REPORT_TO: ''", "REPORT_TO: wandb"
    )
    config = config.replace("PROPOSAL_FILES_TRAIN: []", "PROPOSAL_FILES_TRAIN: [/tmp/evil.pkl]")
    assert config.count("/root/.ssh") == config.count("wandb") == config.count("evil.pkl") == 1
    (folder / "config.yaml").write_text(config)
    signed(folder)
    cfg = from_pretrained(folder, device="cpu").cfg
    assert (cfg.OUTPUT_DIR, cfg.REPORT_TO, cfg.DATASETS.PROPOSAL_FILES_TRAIN) == ("./output", "", ())


def test_weights_are_no_pickle_and_files_no_pipes(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    (folder / "model.safetensors").write_bytes(pickle.dumps({"model": Evil()}) + bytes(1 << 20))
    signed(folder)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        from_pretrained(folder, device="cpu")
    assert not (tmp_path / "ran").exists()
    for name, words in (("sge_det.json", "a pipe"), ("model.safetensors", "has no"), ("config.yaml", "has no")):
        (folder / name).rename(tmp_path / name)
        os.mkfifo(folder / name)
        with pytest.raises(UserError, match=words):
            from_pretrained(folder, device="cpu")
        (folder / name).unlink()
        (tmp_path / name).rename(folder / name)


@pytest.mark.parametrize("name", ["README.md", "config.yaml"])
def test_a_link_is_not_uploaded(folder, tmp_path, monkeypatch, name):
    monkeypatch.setattr(hub, "_hub", lambda: pytest.fail("the hub is not asked"))
    (folder / name).rename(tmp_path / "secret")
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=f"{name} is a link"):
        push_to_hub(folder, "me/model")


def test_other_files_than_those_that_were_written_are_refused(folder):
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"model\.safetensors is not the file that"):
        from_pretrained(folder, device="cpu")
    signed(folder)
    with pytest.raises(UserError, match=r"damaged|checksum|differ"):  # that of the tensor, in the file itself
        from_pretrained(folder, device="cpu")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        from_pretrained(folder, device="cpu")


@pytest.mark.parametrize(
    "about",
    [
        "[]",
        "{",
        '{"schema": 9, "sha256": {}, "classes": []}',
        '{"schema": 1, "sha256": [], "classes": []}',
        "[" * 99999,
    ],
)
def test_an_index_that_is_none_is_refused(folder, about):
    (folder / "sge_det.json").write_text(about)
    with pytest.raises(UserError, match=r"sge_det\.json cannot be read"):
        from_pretrained(folder)


def test_what_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="a repository of the hub is named user/name"):
        from_pretrained(tmp_path / "nothing" / "here")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no sge_det\.json, so it is no model"):
        from_pretrained(tmp_path / "empty")
    monkeypatch.setattr(hub, "_hub", lambda: pytest.fail("the hub is not asked"))
    with pytest.raises(UserError, match="is no folder"):
        push_to_hub(tmp_path / "nothing", "me/model")
    cfg = sge_det.get_config(FASTER)
    with pytest.raises(UserError, match=r"name them in MODEL\.WEIGHTS, or give the model"):
        save_pretrained(cfg, tmp_path / "out")
    with pytest.raises(UserError, match=r"the report .* cannot be read"):
        save_pretrained(cfg, tmp_path / "out", report=tmp_path / "no.json")
    assert not (tmp_path / "out").exists()


class FakeHub:
    """Keeps what is uploaded in a folder; knows one repository."""

    def __init__(self, store):
        self.store = store

    def create_repo(self, name, **options):
        if name == "no/access":
            raise OSError("403 Forbidden")

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message, token):
        self.store.mkdir()
        for name in allow_patterns:
            shutil.copy(Path(folder_path) / name, self.store / name)
        return f"https://hub/{repo_id}"

    def snapshot_download(self, name, *, revision, token, allow_patterns):
        if name != "me/model":
            raise OSError("404 Client Error")
        return str(self.store)


def test_to_the_hub_and_back(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_hub", lambda: FakeHub(tmp_path / "store"))
    (folder / "notes.txt").write_text("mine")
    assert push_to_hub(folder, "me/model") == "https://hub/me/model"
    assert not (tmp_path / "store/notes.txt").exists()
    assert from_pretrained("me/model", device="cpu").classes
    with pytest.raises(UserError, match="the hub does not give a repository of that name: 404"):
        from_pretrained("me/other")
    with pytest.raises(UserError, match="the hub does not take no/access: 403"):
        push_to_hub(folder, "no/access")
