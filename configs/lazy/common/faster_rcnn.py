from .rcnn import model

for part in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads.pop(part)
