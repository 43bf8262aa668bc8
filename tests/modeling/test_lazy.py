"""A detector of Detectron2's lazy configs with SGE in its stages is that of the YAML config."""

import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall, get_cfg, instantiate
from detectron2.modeling import build_model

import sge_det


def test_lazy_and_yaml_build_the_same_detector():
    lazy = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
    lazy.backbone.bottom_up.stages = LazyCall(sge_det.make_sge_stages)(
        depth=18, norm="FrozenBN", groups=8, stages=["res3", "res5"]
    )
    lazy.backbone.bottom_up.freeze_at = 2
    cfg = get_cfg()
    sge_det.add_sge_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_sge_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.SGE.GROUPS, cfg.MODEL.SGE.STAGES = 8, ["res3", "res5"]
    ours, yaml = instantiate(lazy).eval(), build_model(cfg).eval()
    assert {key: tensor.shape for key, tensor in ours.state_dict().items()} == {
        key: tensor.shape for key, tensor in yaml.state_dict().items()
    }
    assert sum(".sge." in key for key in ours.state_dict()) == 2 * 4
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, p in yaml.named_parameters() if p.requires_grad
    }
    torch.manual_seed(0)
    for name, parameter in yaml.named_parameters():
        if ".sge." in name:
            torch.nn.init.normal_(parameter)
    ours.load_state_dict(yaml.state_dict())
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        features = [model.backbone(model.preprocess_image([{"image": image}]).tensor) for model in (ours, yaml)]
        assert all(torch.equal(features[0][name], features[1][name]) for name in features[0])
        found = [model([{"image": image, "height": 64, "width": 96}])[0]["instances"] for model in (ours, yaml)]
    assert torch.equal(found[0].scores, found[1].scores)
    assert torch.equal(found[0].pred_boxes.tensor, found[1].pred_boxes.tensor)
