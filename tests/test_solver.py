import pytest
import torch
from detectron2.config import get_cfg
from detectron2.solver import build_lr_scheduler
from torch import nn

import sge_det
from sge_det import SpatialGroupEnhance, build_optimizer, scale_sge_lr
from sge_det.solver import clip_whole_gradient


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), SpatialGroupEnhance(2))


def rate(optimizer, parameter):
    (group,) = [group for group in optimizer.param_groups if any(p is parameter for p in group["params"])]
    return group["lr"]


@pytest.mark.parametrize("name", ["SGD", "ADAMW"])
@pytest.mark.parametrize("factor", [1.0, 10.0, 0.0])
def test_lr_factor_is_that_of_sge_parameters_alone(factor, name):
    cfg = sge_det.get_config(
        "sample/faster_rcnn_SGE_R_50_FPN.yaml", ["MODEL.SGE.LR_FACTOR", str(factor), "SOLVER.OPTIMIZER", name]
    )
    net = Net()
    optimizer = build_optimizer(cfg, net)
    base = cfg.SOLVER.BASE_LR
    for parameter in net[2].parameters():
        assert rate(optimizer, parameter) == pytest.approx(base * factor)
    for module in (net[0], net[1]):
        for parameter in module.parameters():
            assert rate(optimizer, parameter) == pytest.approx(base)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 6


def test_scheduler_and_weight_decay_keep_the_factor():
    cfg = sge_det.get_config(
        "sample/faster_rcnn_SGE_R_50_FPN.yaml",
        [
            *("MODEL.SGE.LR_FACTOR", "5.0", "SOLVER.WARMUP_ITERS", "0", "SOLVER.STEPS", "(1,)", "SOLVER.MAX_ITER", "3"),
            *("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR"),
        ],
    )
    net = Net()
    optimizer = build_optimizer(cfg, net)
    scheduler = build_lr_scheduler(cfg, optimizer)
    optimizer.step()
    scheduler.step()
    assert rate(optimizer, net[2].weight) == pytest.approx(cfg.SOLVER.BASE_LR * 0.1 * 5)
    assert rate(optimizer, net[0].weight) == pytest.approx(cfg.SOLVER.BASE_LR * 0.1)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    # SGE is no norm: it decays as convolutions do
    assert decay[id(net[2].weight)] == cfg.SOLVER.WEIGHT_DECAY
    assert decay[id(net[1].weight)] == cfg.SOLVER.WEIGHT_DECAY_NORM


@pytest.mark.parametrize("factor", [1.0, 10.0])
def test_sge_parameters_can_have_a_decay_of_their_own(factor):
    cfg = sge_det.get_config(
        "sample/faster_rcnn_SGE_R_50_FPN.yaml",
        ["MODEL.SGE.LR_FACTOR", str(factor), "MODEL.SGE.WEIGHT_DECAY", "0.5", "SOLVER.BASE_LR", "0.01"],
    )
    net = Net()
    optimizer = build_optimizer(cfg, net)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    # without a gradient AdamW takes lr * decay off each weight and does no more (its eq. 12)
    kept = {"0": 1 - 0.01 * cfg.SOLVER.WEIGHT_DECAY, "1": 1.0, "2": 1 - 0.01 * factor * 0.5}
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * kept[name[0]])


def test_adamw_steps_as_torchs_own_with_the_decays_of_the_config():
    overrides = ["SOLVER.OPTIMIZER", "ADAMW", "SOLVER.WEIGHT_DECAY", "0.1", "SOLVER.WEIGHT_DECAY_NORM", "0.0"]
    cfg = sge_det.get_config(
        "sample/faster_rcnn_SGE_R_50_FPN.yaml", [*overrides, "SOLVER.BASE_LR", "0.01", "MODEL.SGE.LR_FACTOR", "1.0"]
    )
    net = Net()
    optimizer = build_optimizer(cfg, net)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, -3.0)
    optimizer.step()
    for name, parameter in net.named_parameters():
        # the first step of Adam is lr * sign(gradient), and decay apart from it is lr * decay * weight (AdamW, eq. 12)
        decay = 0.0 if name.startswith("1.") else 0.1
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.01 * decay) + 0.01)


def test_detectron2s_own_clipping_holds_for_adamw():
    clip = [f"SOLVER.CLIP_GRADIENTS.{key}" for key in ("ENABLED", "CLIP_TYPE", "CLIP_VALUE")]
    overrides = [clip[0], "True", clip[1], "value", clip[2], "0.5"]
    net = Net()
    optimizer = build_optimizer(sge_det.get_config("sample/faster_rcnn_SGE_R_50_FPN.yaml", overrides), net)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, -3.0)
    optimizer.step()
    assert {value for parameter in net.parameters() for value in parameter.grad.flatten().tolist()} == {-0.5}


def test_an_unknown_optimizer_is_named_with_those_that_there_are():
    with pytest.raises(sge_det.UserError, match=r"SOLVER\.OPTIMIZER 'LION' is not one of SGD, ADAMW"):
        sge_det.get_config("sample/faster_rcnn_SGE_R_50_FPN.yaml", ["SOLVER.OPTIMIZER", "LION"])


def test_a_config_that_never_heard_of_the_key_gets_sgd():
    assert isinstance(build_optimizer(get_cfg(), Net()), torch.optim.SGD)


def test_any_optimizer_can_be_scaled():
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    scale_sge_lr(optimizer, net, 4.0)
    assert rate(optimizer, net[2].bias) == pytest.approx(4e-3)
    assert rate(optimizer, net[0].bias) == pytest.approx(1e-3)
    without_decay = torch.optim.Rprop(net.parameters(), lr=1e-3)
    with pytest.raises(sge_det.UserError, match="Rprop has no weight decay"):
        scale_sge_lr(without_decay, net, 4.0, 0.5)
    scale_sge_lr(without_decay, net, 4.0)
    assert rate(without_decay, net[2].bias) == pytest.approx(4e-3)
    of_one_group = torch.optim.LBFGS(net.parameters())
    with pytest.raises(sge_det.UserError, match="LBFGS has one rate"):
        scale_sge_lr(of_one_group, net, 4.0)
    assert sum(map(len, (group["params"] for group in of_one_group.param_groups))) == len(list(net.parameters()))


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5),
        lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [1]),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5),
        lambda optimizer: build_lr_scheduler(get_cfg(), optimizer),
    ],
    ids=["lambda", "steps", "cycle", "detectron2"],
)
def test_a_rate_is_not_scaled_behind_the_schedulers_back(scheduler):
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    kept = scheduler(optimizer)
    for arguments in ((4.0,), (1.0, 0.5)):
        with pytest.raises(sge_det.UserError, match="before the learning-rate scheduler is built"):
            scale_sge_lr(optimizer, net, *arguments)
    scale_sge_lr(optimizer, net, 1.0)  # changes nothing
    assert len(optimizer.param_groups) == 1 and kept.optimizer is optimizer


def test_full_model_clipping_bounds_the_norm_of_all_gradients_together():
    weights = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD([{"params": [weights[0]]}, {"params": [weights[1]]}], lr=1.0)
    clip_whole_gradient(optimizer, 35.0)
    weights[0].grad, weights[1].grad = torch.tensor([300.0]), torch.tensor([-400.0])
    optimizer.step()
    # 35 * (3/5, -4/5)
    torch.testing.assert_close(torch.cat([w.detach() for w in weights]), torch.tensor([-21.0, 28.0]))


def test_coco_configs_clip_the_whole_gradient():
    cfg = sge_det.get_config("COCO-Detection/faster_rcnn_SGE_R_50_FPN_1x.yaml", ["SOLVER.BASE_LR", "1.0"])
    net = Net()
    optimizer = build_optimizer(cfg, net)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 1000.0)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    optimizer.step()
    steps = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, net.parameters())])
    assert steps.norm().item() == pytest.approx(35.0, rel=1e-3)
