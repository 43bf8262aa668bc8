"""Models that know nothing of sge_det, to hold its conversions against: torchvision's ResNets with SGE by the paper."""

import re

import numpy as np
import torch
from detectron2.modeling.backbone.regnet import AnyNet, ResBottleneckBlock, SimpleStem
from torch import nn
from torchvision.models import resnet


class PaperSGE(nn.Module):
    """Equations 1 to 5, written as they stand there; ``groups`` follow timm's way of building attention."""

    def __init__(self, channels, groups=64, device=None, dtype=None):
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.zeros(1, groups, 1, 1))
        self.bias = nn.Parameter(torch.ones(1, groups, 1, 1))

    def forward(self, x):
        x = x.unflatten(1, (self.groups, -1))
        s = (x * x.mean((3, 4), keepdim=True)).sum(2)
        t = (s - s.mean((2, 3), keepdim=True)) / (s.std((2, 3), keepdim=True) + 1e-5)
        return (x * torch.sigmoid(t * self.weight + self.bias).unsqueeze(2)).flatten(1, 2)


class BasicBlock(resnet.BasicBlock):
    def __init__(self, inplanes, planes, *args, **kwargs):
        super().__init__(inplanes, planes, *args, **kwargs)
        self.sge = PaperSGE(planes)

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(self.sge(out) + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(resnet.Bottleneck):
    def __init__(self, inplanes, planes, *args, **kwargs):
        super().__init__(inplanes, planes, *args, **kwargs)
        self.sge = PaperSGE(4 * planes)

    def forward(self, x):
        out = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        out = self.bn3(self.conv3(out))
        return self.relu(self.sge(out) + (x if self.downsample is None else self.downsample(x)))


def torchvision_resnet(depth, sge):
    """ResNet-18, or a ResNet-50 with narrow bottlenecks, from random weights."""
    if depth == 18:
        model = resnet.ResNet(BasicBlock if sge else resnet.BasicBlock, [2, 2, 2, 2])
    else:
        model = resnet.ResNet(Bottleneck if sge else resnet.Bottleneck, [3, 4, 6, 3], width_per_group=16)
    return randomize(model)


def randomize(model, seed=0):
    """Gives norms and SGE layers values as training leaves them, none of them 0 or 1; for evaluation."""
    generator = torch.Generator().manual_seed(seed)

    def draw(value, low, high):
        value.copy_(torch.rand(value.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.dim() == 4 and ".sge." not in name and ".se." not in name:
                fan = value[0].numel()
                value.copy_(torch.randn(value.shape, generator=generator) * (2 / fan) ** 0.5)
            elif name.endswith("running_var"):
                draw(value, 0.5, 1.5)
            elif name.endswith("running_mean") or (name.endswith("bias") and value.dim() == 1):
                draw(value, -0.2, 0.2)
            elif name.endswith("weight") and value.dim() == 1:
                draw(value, 0.3, 0.9)
            elif re.search(r"\.(sge|se)\.(weight|bias)$", name):
                draw(value, -1.5, 1.5)
    return model.eval()


@torch.no_grad()
def features(model, x):
    """What the four stages of torchvision's or timm's ResNet give."""
    x = model.maxpool(torch.relu(model.bn1(model.conv1(x))))
    found = {}
    for stage in range(1, 5):
        x = found[f"res{stage + 1}"] = getattr(model, f"layer{stage}")(x)
    return found


def torchvision_names(state):
    """A Detectron2 backbone's state dict under torchvision's names (``state`` has bare names)."""
    renamed = {}
    for key, value in state.items():
        name = re.sub(r"^stem\.conv1\.norm\.", "bn1.", key)
        name = re.sub(r"^stem\.conv1\.", "conv1.", name)
        name = re.sub(r"^res(\d)", lambda found: f"layer{int(found[1]) - 1}", name)
        name = re.sub(r"\.conv(\d)\.norm\.", r".bn\1.", name)
        name = name.replace(".shortcut.norm.", ".downsample.1.").replace(".shortcut.", ".downsample.0.")
        renamed[name] = value
    return renamed


def gates_by_formula(x, gamma, beta, groups, eps=1e-5):
    """Equations 1 to 5 in float64 NumPy, sample by sample and group by group."""
    samples, channels, height, width = x.shape
    size = channels // groups
    gates = np.empty((samples, groups, height, width))
    for n in range(samples):
        for group in range(groups):
            vectors = x[n, group * size : (group + 1) * size].reshape(size, -1).T.astype(np.float64)
            mean = vectors.sum(0) / len(vectors)
            similarity = np.array([vector @ mean for vector in vectors])
            spread = np.sqrt(((similarity - similarity.mean()) ** 2).sum() / (len(vectors) - 1))
            normalised = (similarity - similarity.mean()) / (spread + eps)
            gate = 1 / (1 + np.exp(-(gamma[group] * normalised + beta[group])))
            gates[n, group] = gate.reshape(height, width)
    return gates


def regnet():
    """A slim RegNet of Detectron2's, of three blocks."""
    return AnyNet(
        stem_class=SimpleStem,
        stem_width=16,
        block_class=ResBottleneckBlock,
        depths=[1, 2],
        widths=[16, 32],
        group_widths=[8, 8],
        strides=[2, 2],
        bottleneck_ratios=[1.0, 1.0],
        se_ratio=0.25,
        activation_class=lambda: nn.ReLU(inplace=True),
        norm="BN",
        out_features=["s2"],
    )
