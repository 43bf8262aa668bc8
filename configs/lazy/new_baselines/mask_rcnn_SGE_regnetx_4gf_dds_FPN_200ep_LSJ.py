from ..common.large_scale_jitter import baseline

name = "mask_rcnn_regnetx_4gf_dds_FPN_200ep_LSJ"
dataloader, lr_multiplier, model, optimizer, train = baseline(name, groups=40)  # 64 do not divide 80 channels
