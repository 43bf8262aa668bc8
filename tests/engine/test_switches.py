"""The trainer's switches in lazy configs, against the same ones of YAML configs."""

import pytest
import torch
from detectron2.config import get_cfg
from slim_twins import NAMES, SLIM_YAML, lazy_config

from sge_det import UserError
from sge_det.config import LAZY_KEYS, add_sge_config, load_lazy_config
from sge_det.engine import lazy
from sge_det.engine.lazy import LazyTrainer, claimed_lazily, setup_lazy_config, train_lazily
from sge_det.engine.switches import switches_of
from sge_det.engine.training import Trainer, setup_config

FASTER = f"lazy/{NAMES['faster']}.py"
ALL = {
    "SOLVER.AMP.ENABLED": "True",
    "SOLVER.AMP.PRECISION": "bfloat16",
    "SOLVER.GRADIENT_ACCUMULATION_STEPS": "2",
    "SOLVER.CLIP_GRADIENTS.ENABLED": "True",
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "full_model",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": "0.5",
    "MODEL_EMA.ENABLED": "True",
    "MODEL_EMA.DECAY": "0.7",
}
LAZILY = {theirs: ours for ours, theirs in LAZY_KEYS.items()}


def trained(trainer):
    trainer.resume_or_load(resume=True)
    trainer.train()
    return torch.load(f"{trainer.checkpointer.save_dir}/model_final.pth", weights_only=False)


def test_with_all_switches_on_a_run_ends_as_the_yaml_configs(sample_datasets, tmp_path):
    schedule = {"MAX_ITER": 3, "BASE_LR": 0.002, "STEPS": (), "WARMUP_ITERS": 3, "WARMUP_FACTOR": 0.3333}
    given = [part for key, value in schedule.items() for part in (f"SOLVER.{key}", str(value))]
    switched = [part for pair in ALL.items() for part in pair]
    yaml_cfg = setup_config(f"{NAMES['faster']}.yaml", [*SLIM_YAML, *given, *switched], sample_datasets)
    yaml_cfg.DATASETS.TEST, yaml_cfg.OUTPUT_DIR = (), str(tmp_path / "yaml")
    yaml = Trainer(yaml_cfg)
    start = tmp_path / "start.pth"
    torch.save({"model": yaml.model.state_dict()}, start)
    yaml_cfg.MODEL.WEIGHTS = str(start)
    expected = trained(yaml)

    lines = [f"train.init_checkpoint={start}", "train.eval_period=0"]
    lines += [f"{LAZILY[key]}={value}" for key, value in ALL.items()]
    plain = trained(LazyTrainer(lazy_config("faster", sample_datasets, tmp_path / "plain", *lines[:2])))
    cut_off = lazy_config("faster", sample_datasets, tmp_path / "lazy", *lines)
    first = LazyTrainer(cut_off)
    first.max_iter = 2
    trained(first)
    found = trained(LazyTrainer(lazy_config("faster", sample_datasets, tmp_path / "lazy", *lines)))
    for part in ("model", "trained"):
        assert set(found[part]) == set(expected[part])
        assert all(torch.equal(tensor, expected[part][name]) for name, tensor in found[part].items()), part
    moved = [name for name, tensor in found["model"].items() if not torch.equal(tensor, plain["model"][name])]
    assert len(moved) > 50, "the switches do something"


def test_a_run_that_gets_no_better_ends_and_keeps_its_best(sample_datasets, tmp_path, monkeypatch):
    scores = iter([3.0, 5.0, 4.0, 4.5])
    monkeypatch.setattr(LazyTrainer, "test", classmethod(lambda *_: {"bbox": {"AP": next(scores)}}))
    lines = ["train.max_iter=6", "train.eval_period=1", "train.early_stopping.patience=2"]
    lines += ["train.best_checkpointer.enabled=True", "train.report_to=wandb"]
    reported = []
    monkeypatch.setattr(lazy, "build_report_writer", lambda switches, config: reported.append((switches, config)))
    folder = tmp_path / "run"
    cfg = lazy_config("faster", sample_datasets, folder, *lines)
    with claimed_lazily(cfg):
        train_lazily(cfg)
    assert torch.load(folder / "model_final.pth", weights_only=False)["iteration"] == 3
    assert torch.load(folder / "model_best.pth", weights_only=False)["iteration"] == 1
    ((switches, config),) = reported
    assert (switches.REPORT_TO, switches.OUTPUT_DIR, config["train.max_iter"]) == ("wandb", str(folder), "6")
    assert any("images/s" in line for line in (folder / "metrics.json").read_text().splitlines())
    # how often a run is evaluated counts where it ends by that, and patience may be raised
    other = lazy_config(
        "faster", sample_datasets, folder, *lines, "train.early_stopping.patience=3", "train.log_period=9"
    )
    with claimed_lazily(other, resume=True):
        pass


def test_switches_are_off_where_a_config_says_nothing():
    cfg = load_lazy_config(FASTER)
    found, plain = switches_of(cfg), get_cfg()
    add_sge_config(plain)
    for section in ("AMP", "CLIP_GRADIENTS", "EARLY_STOPPING", "BEST_CHECKPOINTER"):
        assert found.SOLVER[section] == plain.SOLVER[section]
    assert (found.MODEL_EMA, found.REPORT_TO) == (plain.MODEL_EMA, "")
    assert (found.SOLVER.IMS_PER_BATCH, found.SOLVER.MAX_ITER) == (16, cfg.train.max_iter)
    assert ALL.keys() <= LAZILY.keys()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+train.model_ema.decya=0.9", r"no config key train\.model_ema\.decya: train\.model_ema has enabled, decay"),
        ("train.model_ema.decya=0.9", r"no config key train\.model_ema\.decya: did you mean train\.model_ema\.decay"),
        ("+train.model_ema=0.9", r"train\.model_ema holds keys \(enabled, decay\)"),
        ("train.model_ema.decay=1.5", r"train\.model_ema\.decay: it is 1\.5; set a number from 0 to below 1"),
        ("train.amp.precision=float8", r"train\.amp\.precision.*one of float16, bfloat16"),
        ("train.model_ema.enabled=often", r"train\.model_ema\.enabled must be a value like False, not often"),
        ("train.gradient_accumulation_steps=3", r"which does not divide dataloader\.train\.total_batch_size 16"),
        ("train.early_stopping.patience=1", r"train\.eval_period 0 gives none before the last"),
        ("train.report_to=neptune", r"train\.report_to: it is 'neptune'; set one of"),
    ],
)
def test_mistakes_name_the_lazy_key(override, message):
    with pytest.raises(UserError, match=message):
        setup_lazy_config(FASTER, ["train.init_checkpoint=''", "train.eval_period=0", override])


def test_passes_need_the_number_of_images():
    cfg = load_lazy_config(FASTER)
    del cfg.dataloader.train["total_batch_size"]
    cfg.train.gradient_accumulation_steps = 2
    with pytest.raises(UserError, match=r"needs dataloader\.train\.total_batch_size"):
        switches_of(cfg)
