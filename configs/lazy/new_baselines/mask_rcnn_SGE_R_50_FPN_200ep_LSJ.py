from ..common.large_scale_jitter import baseline

name = "mask_rcnn_R_50_FPN_200ep_LSJ"
dataloader, lr_multiplier, model, optimizer, train = baseline(name)
