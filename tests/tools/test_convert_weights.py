import pytest
import torch
from reference_models import torchvision_resnet

FASTER = "sample/faster_rcnn_SGE_R_50_FPN.yaml"
R18 = ["MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.STEM_OUT_CHANNELS", "64", "MODEL.SGE.GROUPS", "64"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    state = torchvision_resnet(18, True).state_dict()
    release = {"epoch": 1, "state_dict": {f"module.{key}": value for key, value in state.items()}}
    torch.save(release, folder / "sge_resnet18.pth.tar")
    torch.save(torchvision_resnet(18, False).state_dict(), folder / "resnet18.pth")
    return folder


def test_the_releases_file_becomes_detectron2s(run_tool, sources, tmp_path):
    run = run_tool("convert_weights.py", sources / "sge_resnet18.pth.tar", "weights/sge.pth")
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0].endswith(
        "sge_resnet18.pth.tar is an SGE-ResNet of the release, trained on ImageNet: SGE-ResNet-18 (64 groups), BN"
    )
    assert "138 tensors: 116 renamed, 22 dropped" in lines[1]
    assert "wrote weights/sge.pth" in lines
    assert lines[-1] == (
        "use it with: INPUT.FORMAT RGB MODEL.PIXEL_MEAN '[123.675,116.28,103.53]' "
        "MODEL.PIXEL_STD '[58.395,57.12,57.375]' MODEL.RESNETS.STRIDE_IN_1X1 False"
    )
    content = torch.load(tmp_path / "weights/sge.pth", weights_only=True)
    assert content["metadata"]["source"] == "sge-imagenet"
    assert content["model"]["res2.0.sge.weight"].shape == (1, 64, 1, 1)


def test_transplanted_for_a_config_in_any_order_of_arguments(call_tool, sources, tmp_path):
    for arguments in (
        ["--transplant", "--config-file", FASTER, sources / "resnet18.pth", "out.safetensors", *R18],
        [sources / "resnet18.pth", "out.safetensors", *R18, "--config-file", FASTER, "--transplant"],
    ):
        run = call_tool("convert_weights.py", *arguments)
        assert run.returncode == 0, run.stderr
        assert "added SGE to 8 blocks (64 groups), the norms before it times 1.3678794" in run.stdout
        assert "they fill 116 of the" in run.stdout
        assert "  at its random start: proposal_generator.rpn_head.conv.weight" in run.stdout
        (tmp_path / "out.safetensors").unlink()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{}/nowhere.pth", "out.pth"], "there is no weights file"),
        (["{}/resnet18.pth", "out.pkl"], "out.pkl: the output must end in .pth or .safetensors"),
        (["{}/resnet18.pth", "out.pth", "MODEL.SGE.GROUPS", "32"], "go with --config-file"),
        (["{}/sge_resnet18.pth.tar", "out.pth", "--transplant"], "has SGE already"),
        (["{}/resnet18.pth", "out.pth", "--config-file", "nowhere.yaml"], "nowhere.yaml"),
        (["{}/resnet18.pth", "out.pth", "--config-file", FASTER, *R18], "convert it with --transplant"),
        (["{}/resnet18.pth", "out.pth", "--config-file", FASTER], "tensors of the model's backbone"),
        ([__file__, "out.pth"], "cannot be read"),
    ],
)
def test_mistakes_end_with_a_sentence_and_code_2(call_tool, sources, tmp_path, arguments, words):
    run = call_tool("convert_weights.py", *(word.format(sources) for word in arguments))
    assert (run.returncode, run.stdout) == (2, "")
    last = run.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert words in last
    assert not list(tmp_path.glob("out*"))


def test_code_in_a_file_is_refused_by_the_tool(fork_tool, tmp_path):
    canary = tmp_path / "canary"
    (tmp_path / "R-50.pkl").write_bytes(b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.")
    run = fork_tool("convert_weights.py", "R-50.pkl", "out.pth")
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith("error: R-50.pkl is refused: to read it would call os.system")
    assert "Traceback" not in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["R-50.pkl"]
