from ..common.large_scale_jitter import baseline

name = "mask_rcnn_R_101_FPN_100ep_LSJ"
dataloader, lr_multiplier, model, optimizer, train = baseline(name)
