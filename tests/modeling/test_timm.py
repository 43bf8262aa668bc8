import argparse
import subprocess
import sys

import pytest
import timm
import torch
from foreign_weights import assert_equal_features, backbone_config, build_backbone, load
from reference_models import PaperSGE, features, randomize
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV2, NativeScaler

import sge_det.modeling.timm
from sge_det import SpatialGroupEnhance
from sge_det.checkpoint import convert_file

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


@pytest.mark.parametrize("depth", BLOCKS)
def test_every_depth_is_timms_resnet_with_sge(depth):
    with torch.device("meta"):
        model, plain = timm.create_model(f"sge_resnet{depth}"), timm.create_model(f"resnet{depth}")
    extra = set(model.state_dict()) - set(plain.state_dict())
    assert extra == {
        f"layer{stage}.{block}.se.{name}"
        for stage, blocks in enumerate(BLOCKS[depth], 1)
        for block in range(blocks)
        for name in ("weight", "bias")
    }
    assert set(plain.state_dict()) <= set(model.state_dict())
    layers = [module for module in model.modules() if isinstance(module, SpatialGroupEnhance)]
    assert len(layers) == sum(BLOCKS[depth])
    assert {layer.groups for layer in layers} == {64}
    parameters = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
    assert parameters == 128 * len(layers)
    assert model.default_cfg["input_size"] == (3, 224, 224)
    assert tuple(model.default_cfg["mean"]) == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("depth", [18, 50])
def test_timm_and_converted_detectron2_give_equal_features(tmp_path, depth):
    narrow = {} if depth == 18 else {"base_width": 16}
    model = randomize(timm.create_model(f"sge_resnet{depth}", num_classes=7, **narrow))
    torch.save({"epoch": 3, "arch": f"sge_resnet{depth}", "state_dict": model.state_dict()}, tmp_path / "best.pth.tar")
    conversion = convert_file(str(tmp_path / "best.pth.tar"), str(tmp_path / "out.pth"))
    assert conversion.source.kind == "timm-sge"
    backbone = load(build_backbone(backbone_config(depth, True)), tmp_path / "out.pth")
    assert_equal_features(lambda x: features(model, x), backbone)
    with torch.no_grad():  # timm's own way to features
        x = torch.randn(1, 3, 70, 93)
        stages = model.forward_intermediates(x, intermediates_only=True)[1:]
        for theirs, ours in zip(stages, backbone(x).values(), strict=True):
            assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_what_timms_training_saves_is_converted(tmp_path):
    model = timm.create_model("sge_resnet18", num_classes=3)
    optimizer = create_optimizer_v2(model, opt="momentum", lr=0.1, weight_decay=1e-4)
    average = ModelEmaV2(randomize(timm.create_model("sge_resnet18", num_classes=3)))
    args = argparse.Namespace(model="sge_resnet18", lr=0.1, opt="momentum", decay_milestones=[90, 180, 270])
    saver = CheckpointSaver(
        *(model, optimizer, args, average, NativeScaler(device="cpu")), checkpoint_dir=str(tmp_path), max_history=1
    )
    saver.save_checkpoint(0, metric=50.0)
    convert_file(str(tmp_path / "model_best.pth.tar"), str(tmp_path / "out.pth"))
    backbone = load(build_backbone(backbone_config(18, True)), tmp_path / "out.pth")
    assert_equal_features(lambda x: features(average.module, x), backbone)


def test_the_layer_goes_into_any_resnet_of_timms():
    attention = {"attn_layer": sge_det.modeling.timm.SGEAttention}
    model = randomize(timm.create_model("resnet26", block_args=attention))
    other = timm.create_model("resnet26", block_args={"attn_layer": PaperSGE}).eval()
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 65, 80)
    with torch.no_grad():
        torch.testing.assert_close(model(x), other(x), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="64 channels cannot be divided into 48 groups"):
        sge_det.modeling.timm.SGEAttention(64, groups=48)


def test_it_trains():
    torch.manual_seed(0)
    model = timm.create_model("sge_resnet18", num_classes=3)
    model(torch.randn(4, 3, 64, 64)).logsumexp(1).sum().backward()
    gradients = [p.grad for name, p in model.named_parameters() if name.endswith("se.bias")]
    assert len(gradients) == 8
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


SCRIPT = """
import sys
import timm
import helper
model = timm.create_model("sge_resnet18")
print(helper.NAME, sys.argv[1:], sum("se.weight" in key for key in model.state_dict()))
if __name__ == "__main__":
    sys.exit(3)
"""


def run(*arguments, cwd):
    command = [sys.executable, "-m", "sge_det.modeling.timm", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_a_script_runs_with_the_models_registered(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/train.py").write_text(SCRIPT)
    (tmp_path / "scripts/helper.py").write_text("NAME = 'beside the script'\n")
    done = run("scripts/train.py", "data", "--model", "x", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert done.stdout.strip() == "beside the script ['data', '--model', 'x'] 8"


def test_a_script_that_is_not_there(capsys):
    for arguments in ([], ["nowhere.py"]):
        with pytest.raises(SystemExit) as stop:
            sge_det.modeling.timm._main(arguments)
        assert stop.value.code == 2
        assert capsys.readouterr().err.startswith("error: give a script: python -m sge_det.modeling.timm SCRIPT ...")


def test_without_timm_a_sentence_says_so(tmp_path):
    (tmp_path / "timm.py").write_text("raise ImportError('no timm')\n")
    done = run("x.py", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.endswith(
        "error: sge_det.modeling.timm registers models with timm, which is missing: pip install timm\n"
    )
    assert "Traceback" not in done.stderr
